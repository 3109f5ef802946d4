"""Near-duplicate removal, text in, pairs out, beside datasketch's MinHash and LSH.

Both take 125 permutations in 25 bands of 5, propose candidates, confirm them by their numbers and operators and by the
exact Jaccard similarity of their 3-word shingles, and keep the first of each. The pairs are asserted to be the same.
Both run on one core; their CPU time is taken, which other work on the machine sways less.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import time
from collections.abc import Iterator

from r1distill.data import words
from r1distill.data.config import ROOT
from r1distill.data.dedup import BANDS, ROWS, Pair, near_duplicates

EVAL = ROOT / ".." / "shared" / "data" / "eval"
COLUMNS = {
    "math_train_7474.jsonl.gz": "problem",
    "gsm8k_train.jsonl.gz": "question",
    "gsm8k_test.jsonl.gz": "question",
    "aime1983_2023.jsonl.gz": "problem",
    "mbpp.jsonl.gz": "text",
}
TEXTS, THRESHOLD, ROUNDS = 20_000, 0.8, 3
SWAPPED_IN = ("the", "a", "some", "this", "one", "very")


def questions() -> tuple[list[str], str]:
    """Real questions, where the folder beside the project is there; otherwise sentences of made-up words."""
    found = [(EVAL / name, column) for name, column in COLUMNS.items() if (EVAL / name).is_file()]
    if found:
        rows = (
            (json.loads(line), column)
            for path, column in found
            for line in gzip.decompress(path.read_bytes()).splitlines()
        )
        return list(dict.fromkeys(row[column] for row, column in rows)), "real questions"
    rng = random.Random(1)
    lexicon = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(5000)]
    return [" ".join(rng.choices(lexicon, k=rng.randrange(10, 90))) for _ in range(15_000)], "made-up sentences"


def with_near_copies(originals: list[str], count: int) -> list[str]:
    """``originals`` and as many copies, changed in up to four words, as make ``count`` texts."""
    rng = random.Random(2)
    texts = originals[:count]
    while len(texts) < count:
        copy = rng.choice(originals).split(" ")
        for _ in range(rng.randrange(5)):
            copy[rng.randrange(len(copy))] = rng.choice(SWAPPED_IN)
        texts.append(" ".join(copy))
    rng.shuffle(texts)
    return texts


def shingles(text: str) -> set[str]:
    found = words.WORD.findall(words.fold(text))
    return {" ".join(found[i : i + 3]) for i in range(max(1, len(found) - 2))} if found else set()


def with_datasketch(texts: list[str]) -> list[Pair]:
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    kept: dict[int, set[str]] = {}
    pairs = []
    sets = [shingles(text) for text in texts]
    encoded = ([shingle.encode() for shingle in each] for each in sets)
    # Its generator makes the permutations once, not for each text.
    for number, signature in enumerate(MinHash.generator(encoded, num_perm=BANDS * ROWS)):
        mine = sets[number]
        if not mine:
            continue
        for other in sorted(lsh.query(signature)):
            similarity = len(mine & kept[other]) / len(mine | kept[other])
            if similarity >= THRESHOLD and figures(texts[number]) == figures(texts[other]):
                pairs.append(Pair(number, other, similarity))
                break
        else:
            lsh.insert(number, signature)
            kept[number] = mine
    return pairs


def figures(text: str) -> list[str]:
    return words.FIGURE.findall(words.fold(text))


def measure() -> Iterator[dict]:
    originals, what = questions()
    texts = with_near_copies(originals, TEXTS)
    near_duplicates(texts[:100])  # tables that are made once
    ours, peer = [], []
    for _ in range(ROUNDS):
        began = time.process_time()
        _, pairs = near_duplicates(texts, THRESHOLD)
        ours.append(time.process_time() - began)
        began = time.process_time()
        theirs = with_datasketch(texts)
        peer.append(time.process_time() - began)
        if pairs != theirs:
            raise AssertionError(f"other pairs than datasketch's: {sorted(set(pairs) ^ set(theirs))[:5]}")
    yield {
        "what": "near-duplicates (MinHash, LSH), text in, pairs out",
        "ours": len(texts) / statistics.median(ours),
        "peer": len(texts) / statistics.median(peer),
        "unit": "texts/s",
        "peer_name": "datasketch",
        "goal": 10.0,
        "note": f"{len(texts):,} texts ({what} and near copies), {len(pairs):,} pairs, the same ones, at {THRESHOLD}",
    }
