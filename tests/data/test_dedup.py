"""Near-duplicates: what is proposed and confirmed is what comparing every pair would find."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from r1distill.data import dedup, words
from r1distill.data.dedup import near_duplicates

LEXICON = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
QUESTION = (
    "Nadia collects stamps from all over the world. On Monday she has 12 of them, on Tuesday she is given 7 more by "
    "her uncle, and on Friday she sells 4. How many stamps does Nadia have at the end of the week?"
)


def shingles(text):
    found = words.WORD.findall(words.fold(text))
    return {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))} if found else set()


def jaccard(a, b):
    return len(a & b) / len(a | b) if a and b else 0.0


def all_pairs(texts, threshold, figures=True):
    """The same by comparing each text with every kept one before it."""
    sets = [shingles(text) for text in texts]
    numbers = [words.FIGURE.findall(words.fold(text)) if figures else None for text in texts]
    kept, pairs = [], []
    for text in range(len(texts)):
        for other in kept:
            if numbers[text] == numbers[other] and jaccard(sets[text], sets[other]) >= threshold:
                pairs.append((text, other, jaccard(sets[text], sets[other])))
                break
        else:
            kept.append(text)
    return pairs


def texts_with_copies(count, seed):
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        if texts and rng.random() < 0.5:
            copy = rng.choice(texts).split(" ")
            for _ in range(rng.randrange(5)):
                copy[rng.randrange(len(copy))] = rng.choice([*LEXICON, "7", "x=3"])
            texts.append(" ".join(copy))
        else:
            texts.append(" ".join(rng.choices(LEXICON, k=rng.choice([0, 1, 2, 3, 5, 20, 40, 80]))))
    return texts


@pytest.mark.parametrize("figures", [True, False])
def test_it_finds_what_comparing_every_pair_finds(figures):
    texts = texts_with_copies(350, seed=4)
    expected = all_pairs(texts, 0.8, figures)
    keep, pairs = near_duplicates(iter(texts), 0.8, figures=figures)
    assert len(expected) > 30
    assert [tuple(pair) for pair in pairs] == expected
    assert keep.tolist() == [number not in {pair.text for pair in pairs} for number in range(len(texts))]


def test_batches_do_not_change_the_answer(monkeypatch):
    texts = texts_with_copies(300, seed=5)
    whole = near_duplicates(texts)[1]
    monkeypatch.setattr(words, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(dedup, "_BATCHES", 2)
    assert near_duplicates(texts)[1] == whole


@pytest.mark.parametrize(
    ("change", "duplicate"),
    [
        (("stamps from all", "stamps  from\nall"), True),
        (("She", "she"), True),
        (("over the world", "over the whole world"), True),
        (("12", "13"), False),  # another question
        (("7 more", "7 + 1 more"), False),
        (("12 of them, on Tuesday she is given 7", "7 of them, on Tuesday she is given 12"), False),
        (("On Monday", "- On Monday"), False),  # a list's dash reads as a minus: kept rather than lost
    ],
)
def test_numbers_and_operators_have_to_be_the_same(change, duplicate):
    keep, _ = near_duplicates([QUESTION, QUESTION.replace(*change)], 0.7)
    assert keep.tolist() == [True, not duplicate]


def test_a_template_with_other_numbers_is_never_even_a_candidate(monkeypatch):
    rng = random.Random(6)
    texts = list({re.sub(r"\d+", lambda _: str(rng.randrange(1000)), QUESTION) for _ in range(400)})
    monkeypatch.setattr(dedup._Sets, "similarity", lambda *_: pytest.fail("compared"))
    assert near_duplicates(texts)[0].all()


def test_traces_may_differ_in_a_number():
    slip = QUESTION.replace("12", "13")
    pairs = near_duplicates([QUESTION, slip], 0.7, figures=False)[1]
    assert pairs == [(1, 0, jaccard(shingles(QUESTION), shingles(slip)))]


def test_texts_of_few_words_are_duplicates_only_where_their_words_are_the_same():
    texts = ["Hi", "hi!", "Hi there", "", "?!", "...", "there, hi", "漢字漢字かな", "漢字、漢字かな"]
    assert [pair[:2] for pair in near_duplicates(texts, 0.5)[1]] == [(1, 0), (8, 7)]


def test_nothing_comes_of_nothing():
    keep, pairs = near_duplicates([])
    assert (keep.tolist(), pairs) == ([], [])
    assert near_duplicates(["?", ""])[0].all()


def test_signatures_are_the_minima_of_every_permutation():
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 300, 500)
    shingle_hashes = rng.integers(0, 1 << 64, lengths.sum(), dtype=np.uint64)
    signature = dedup.signatures(shingle_hashes, lengths)
    permuted = (shingle_hashes >> np.uint64(32)).astype(np.uint32)[None] * dedup._factors()[:, None]
    expected = np.minimum.reduceat(permuted, np.cumsum(lengths) - lengths, axis=1)
    assert (signature == expected).all()


def test_signatures_agree_as_often_as_sets_are_similar():
    rng = np.random.default_rng(8)
    for similarity in (0.3, 0.6, 0.9):
        shared = int(400 * similarity)
        agreed = []
        for _ in range(40):
            pool = rng.integers(0, 1 << 64, 400, dtype=np.uint64)
            rest = (400 - shared) // 2
            a = np.concatenate([pool[:shared], pool[shared : shared + rest]])
            b = np.concatenate([pool[:shared], pool[shared + rest : shared + 2 * rest]])
            signature = dedup.signatures(np.concatenate([a, b]), np.array([len(a), len(b)]))
            agreed.append((signature[:, 0] == signature[:, 1]).mean())
        assert np.mean(agreed) == pytest.approx(shared / (shared + 2 * rest), abs=0.02)


def test_a_key_that_too_many_share_is_not_compared_without_end(monkeypatch):
    monkeypatch.setattr(dedup, "MOST_PER_KEY", 3)
    compared = []
    monkeypatch.setattr(dedup._Sets, "similarity", lambda _, a, b: compared.append((a, b)) or 0.0)
    near_duplicates([QUESTION] * 50)
    assert len(compared) == 1 + 2 + 47 * 3
