"""8-gram decontamination beside a plain set of n-grams, as open-r1's scripts/decontaminate.py has it.

The peer: https://github.com/huggingface/open-r1, commit 0c68e8c: one lookup a benchmark, from n-gram to questions; for
each prompt and benchmark the set of the prompt's n-grams, each looked up. It is given our definition of a word (open-r1
splits at spaces, so a comma hides a hit) and may look at all benchmarks at once. The hits are asserted to be the same.
Both run on one core; their CPU time is taken, which other work on the machine sways less.
The second row is the same pass with rewording looked for too, which the peer doesn't do.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain

from r1distill.data import words
from r1distill.data.config import ROOT
from r1distill.data.decontaminate import HeldOut, Question

EVAL = ROOT / ".." / "shared" / "data" / "eval"
PROMPTS = {
    "math_train_7474.jsonl.gz": "problem",
    "gsm8k_train.jsonl.gz": "question",
    "aime1983_2023.jsonl.gz": "problem",
}
BENCHMARKS = {
    "math500.jsonl.gz": "problem",
    "aime2024.jsonl": "problem",
    "gsm8k_test.jsonl.gz": "question",
    "code_contests_test.jsonl.gz": "problem",
    "humaneval.jsonl.gz": "prompt",
}
SIZE, COUNT, LEAKED, ROUNDS = 8, 30_000, 0.02, 3


def texts(name: str, column: str) -> list[str]:
    path = EVAL / name
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        return [json.loads(line)[column] for line in lines]


def corpus() -> tuple[list[str], list[Question], str]:
    """Prompts, of which a few hold a part of a benchmark's question, and the benchmarks' questions."""
    rng = random.Random(3)
    if EVAL.is_dir():
        originals = list(chain(*(texts(*item) for item in PROMPTS.items())))
        asked = [
            Question(name, str(i), text) for name in BENCHMARKS for i, text in enumerate(texts(name, BENCHMARKS[name]))
        ]
        what = "real questions"
    else:
        lexicon = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(5000)]
        made = [" ".join(rng.choices(lexicon, k=rng.randrange(10, 90))) for _ in range(18_000)]
        originals, what = made[2000:], "made-up sentences"
        asked = [Question("made-up", str(i), text) for i, text in enumerate(made[:2000])]
    prompts = rng.choices(originals, k=COUNT)
    for place in rng.sample(range(COUNT), int(LEAKED * COUNT)):
        leaked = rng.choice(asked).text.split(" ")
        begin = rng.randrange(len(leaked))
        prompts[place] += " " + " ".join(leaked[begin : begin + 20])
    return prompts, asked, what


def ngrams(text: str) -> set[str]:
    found = words.WORD.findall(words.fold(text))
    return {" ".join(found[i : i + SIZE]) for i in range(len(found) - SIZE + 1)}


def plain(prompts: list[str], asked: list[Question]) -> list[bool]:
    lookup: dict[str, set[int]] = defaultdict(set)
    for number, question in enumerate(asked):
        for gram in ngrams(question.text):
            lookup[gram].add(number)
    return [any(gram in lookup for gram in ngrams(prompt)) for prompt in prompts]


def ours(prompts: list[str], asked: list[Question], reworded: float | None = None) -> list[bool]:
    held_out = HeldOut(asked, SIZE, reworded)
    return [match is not None for batch in words.batches(prompts) for match in held_out.matches(batch)]


def measure() -> Iterator[dict]:
    prompts, asked, what = corpus()
    ours(prompts[:100], asked[:100])  # tables that are made once
    seconds = defaultdict(list)
    for _ in range(ROUNDS):
        hits = {}
        for name, run in (
            ("ours", lambda: ours(prompts, asked)),
            ("peer", lambda: plain(prompts, asked)),
            ("both", lambda: ours(prompts, asked, 0.65)),
        ):
            began = time.process_time()
            hits[name] = run()
            seconds[name].append(time.process_time() - began)
        if hits["ours"] != hits["peer"]:
            differ = [i for i in range(COUNT) if hits["ours"][i] != hits["peer"][i]]
            raise AssertionError(f"other hits than the plain pass in {len(differ)} prompts, as {prompts[differ[0]]!r}")
    rate = {name: COUNT / statistics.median(each) for name, each in seconds.items()}
    note = f"{COUNT:,} prompts ({what}) against {len(asked):,} questions; {sum(hits['ours']):,} hits, the same ones"
    shared = {"peer": rate["peer"], "unit": "prompts/s", "peer_name": "set of n-grams (open-r1's way)"}
    yield {"what": f"{SIZE}-gram decontamination", "ours": rate["ours"], "goal": 4.0, "note": note, **shared}
    also = f"the peer looks for no rewording; {sum(hits['both']):,} hits"
    yield {"what": f"{SIZE}-grams and rewording", "ours": rate["both"], "goal": 0.0, "note": also, **shared}
