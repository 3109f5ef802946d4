"""Decontamination: n-grams as a plain pass finds them, rewordings that it can't find, and few false alarms."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from r1distill.data import decontaminate, words
from r1distill.data.config import ROOT
from r1distill.data.decontaminate import HeldOut, Question
from r1distill.data.settings import Decontaminate

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "rewordings.jsonl").read_text("utf-8").splitlines()]
EVAL = ROOT / ".." / "shared" / "data" / "eval"
THRESHOLD = Decontaminate().reworded


def held_out(*questions, ngram=None, reworded=None):
    return HeldOut([Question("bench", str(number), text) for number, text in enumerate(questions)], ngram, reworded)


def match(question, prompt, **methods):
    return held_out(question, **methods).matches([prompt])[0]


def test_words_are_what_the_expression_finds():
    rng = random.Random(1)
    texts = [
        "日本語のテキスト abc12、x_1",
        "",
        "...",
        "Ünïcode² ﬁ 3.5x  A\u0301b",
        "½ x²+1",
        "\ud800 lone",
        "a" * 300,
        "İI",
    ]
    pick = [
        lambda: rng.randrange(32, 127),
        lambda: rng.randrange(0x3000, 0x4000),
        lambda: rng.randrange(0x20000),
        lambda: 32,
    ]
    texts += ["".join(chr(rng.choice(pick)()) for _ in range(50)) for _ in range(500)]
    for batch in (texts, ["only ASCII, 2 of", "them"], [""]):
        split = words.split(batch)
        found = [split.folded[start:end] for start, end in zip(split.start, split.end, strict=True)]
        apart = [found[begin:end] for begin, end in zip(split.offsets, split.offsets[1:], strict=False)]
        assert apart == [words.WORD.findall(words.fold(text)) for text in batch]
        assert (
            len(set(zip(found, split.hashes.tolist(), strict=True)))
            == len(set(found))
            == len(set(split.hashes.tolist()))
        )


def test_figures_are_equal_where_the_expression_finds_the_same():
    texts = [
        "3-4",
        "3 - 4",
        "4-3",
        "34",
        "3 4",
        "well-known 3",
        "3 well",
        "-3",
        "x-3",
        "x - 3",
        "",
        "no",
        "1/2=.5",
        "12=5",
        "2 ≤ 3",
        "2",
        "a-1-b",
    ]
    hashes = words.split(texts).figures()
    for a, first in zip(texts, hashes, strict=True):
        for b, second in zip(texts, hashes, strict=True):
            assert (words.FIGURE.findall(a) == words.FIGURE.findall(b)) == (first == second), (a, b)


@pytest.mark.parametrize("size", [3, 8, 10])
def test_ngram_hits_are_those_of_a_plain_pass(size):
    rng = random.Random(2)
    lexicon = ["alpha", "beta", "Gamma", "δέλτα", "7", "x_1", "and,", "the."]
    made = [" ".join(rng.choices(lexicon, k=rng.randrange(0, 30))) for _ in range(400)]
    questions, prompts = made[:100], made[100:]

    def ngrams(text):
        found = words.WORD.findall(words.fold(text))
        return {tuple(found[i : i + size]) for i in range(len(found) - size + 1)}

    asked = set().union(*map(ngrams, questions))
    matches = held_out(*questions, ngram=size).matches(prompts)
    ids = [match is not None and match.method != "same question" for match in matches]
    same = {" ".join(words.fold(question).split()) for question in questions}
    for prompt, hit, found in zip(prompts, ids, matches, strict=True):
        if " ".join(words.fold(prompt).split()) in same:
            assert found.method == "same question"
            continue
        assert hit == bool(ngrams(prompt) & asked)
        if hit:
            assert ngrams(found.text) <= asked
            assert found.score == len(words.WORD.findall(found.text))
            assert ngrams(found.text) & ngrams(questions[int(found.question_id)])


def test_the_evidence_names_the_question_and_the_passage():
    questions = ["One two three four five six seven eight nine.", "Nothing of the kind is asked for here at all, is it"]
    found = held_out(*questions, ngram=5).matches(
        ["So: two, three; FOUR five\nsix seven? ten eleven", "one two three four"]
    )
    assert found[1] is None
    assert found[0] == ("5-gram", "bench", "0", "two, three; four five six seven", 6.0)


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("Compute $17 \\times 23 - 11$.", "What is 17 × 23 - 11?"),
        ("Is 91 prime?", "Prime or not: is 91 a prime"),
        ("The population of Graz is 1,234,567. Round it.", "Round the population of Graz, 1234567"),
        ("Mira eats 3 figs and Otto eats twice as many figs. How many figs are eaten?", "3 figs: Mira eats that many, Otto eats twice as many figs. How many eaten?"),
        ("Mira eats 3 figs and Otto eats 4 plums from the basket today", "From the basket, three figs Mira eats today, and Otto four plums."),
        ("What is the capital of Peru?", "Long ago I learned geography, and now: capital of Peru, what is it?"),
    ],
)  # fmt: skip
def test_short_questions_are_found_in_other_words(question, prompt):
    assert match(question, prompt, reworded=THRESHOLD).method == "reworded"
    assert match(question, prompt, ngram=10) is None


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        ("Compute $17 \\times 23 - 11$.", "What is 17 × 23 + 11?"),  # another operator
        ("Compute 3 - 4.", "Compute 4 - 3."),  # another order
        ("Is 91 prime?", "Is 97 prime?"),
        ("Is 91 prime?", "Find each prime factor of 91 between 2 and 20."),  # other numbers too
        ("What is the capital of Peru?", "What is the capital of Chile?"),
        (PAIRS[0]["question"], PAIRS[0]["question"].replace("36", "48")),  # the same template
        ("What is it?", "What is it not?"),  # nothing is said
    ],
)
def test_siblings_are_not_rewordings(question, prompt):
    assert match(question, prompt, reworded=THRESHOLD) is None


def test_most_rewordings_are_found_and_by_their_own_question():
    questions = [pair["question"] for pair in PAIRS]
    found = held_out(*questions, reworded=THRESHOLD).matches([pair["reworded"] for pair in PAIRS])
    right = [hit is not None and hit.question_id == str(number) for number, hit in enumerate(found)]
    assert sum(right) >= 23, [questions[number] for number, hit in enumerate(right) if not hit]
    assert not any(held_out(*questions, ngram=10).matches([pair["reworded"] for pair in PAIRS]))


def test_no_text_is_too_odd():
    odd = [
        "",
        " ",
        "?",
        "7",
        "a",
        "x" * 5000,
        "=" * 3000,
        "[asy] draw",
        "1,000,000 {,}000",
        "\\times\\timesx",
    ]
    for methods in ({"ngram": 10}, {"reworded": 0.65}, {"ngram": 1, "reworded": 1.0}):
        assert held_out(*odd, **methods).matches([]) == []
        assert all(held_out(*odd, **methods).matches(odd))  # each is its own question
        held_out(*odd, **methods).matches([text + " also" for text in odd])
        assert held_out(**methods).matches(odd) == [None] * len(odd)


def test_the_index_loses_no_question_over_the_threshold(monkeypatch):
    """Anchors are a shortcut: with every term an anchor, the same is found."""
    rng = random.Random(3)
    lexicon = [f"{a}{b}word" for a in "bcdfghklm" for b in "aeiou"] + list("2345")
    questions = [" ".join(rng.choices(lexicon, k=rng.randrange(2, 15))) for _ in range(150)]
    prompts = []
    for _ in range(300):
        prompt = rng.choice(questions).split()
        for _ in range(rng.randrange(4)):
            prompt[rng.randrange(len(prompt))] = rng.choice(lexicon)
        prompts.append(" ".join(rng.sample(prompt, len(prompt))))
    quick = held_out(*questions, reworded=0.7).matches(prompts)
    monkeypatch.setattr(decontaminate, "_CELLS", 1000)
    thorough = held_out(*questions, reworded=0.7)
    number = len(thorough._reworded._meant)
    rows = len(thorough._reworded._vocabulary.hashes)
    thorough._reworded._anchored = np.tile(np.arange(number), rows)
    thorough._reworded._anchors = np.arange(rows + 1) * number
    assert thorough.matches(prompts) == quick
    assert 50 < sum(hit is not None for hit in quick) < 300


@pytest.mark.skipif(not EVAL.is_dir(), reason=f"real questions are not part of the project: {EVAL} is absent")
@pytest.mark.parametrize(
    ("benchmark", "prompts", "most"),
    [("math500", "math_train_7474", 45), ("gsm8k_test", "gsm8k_train", 8)],
)
def test_false_alarms_are_rare_on_real_training_sets(benchmark, prompts, most):
    """math_train has templated siblings of MATH-500's questions; nearly all of the hits are these."""

    def read(name):
        rows = [json.loads(line) for line in gzip.decompress((EVAL / f"{name}.jsonl.gz").read_bytes()).splitlines()]
        return [row.get("problem", row.get("question")) for row in rows]

    index = held_out(*read(benchmark), reworded=THRESHOLD)
    hits = [hit for batch in words.batches(read(prompts)) for hit in index.matches(batch) if hit]
    assert len(hits) <= most
