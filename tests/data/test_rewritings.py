"""Every reference of the benchmarks against itself, rewritten, and against its wrong neighbours.

All of the first pass and none of the second. Each is written as R1 writes answers: boxed, bold, behind "Answer:", with
other fractions, separators, spaces and brackets.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator

import pytest

from r1distill.data.config import ROOT
from r1distill.data.verify import pool
from r1distill.data.verify.math import examine, reference_of

EVAL = ROOT / ".." / "shared" / "data" / "eval"
ALL = ("math500.jsonl.gz", "aime2024.jsonl", "aime1983_2023.jsonl.gz", "amc2022_2023.jsonl.gz", "gsm8k_test.jsonl.gz")
pytestmark = pytest.mark.skipif(not EVAL.is_dir(), reason=f"{EVAL} is not on this machine: no references to rewrite")


def references(names: tuple[str, ...], every: int) -> list[str]:
    """Every so-manieth of the different references of some files, as they are written there."""
    found: dict[str, str] = {}
    for name in names:
        path = EVAL / name
        with gzip.open(path, "rt") if name.endswith(".gz") else path.open() as lines:
            for line in lines:
                reference = str(json.loads(line)["answer"])
                found.setdefault(reference_of(reference), reference)
    return list(found.values())[::every]


def rewritten(answer: str) -> Iterator[str]:
    yield f"**Final Answer**\n\n\\[\n\\boxed{{{answer}}}.\n\\]"
    yield f"So it is $\\boxed{{\n{answer}\n}}$."
    larger, plain = answer.replace("\\frac", "\\dfrac"), answer.replace("\\left", "").replace("\\right", "")
    yield f"\\boxed{{\\,{larger}\\,}}"
    yield f"\\boxed{{{plain}}}"
    yield f"**Answer:** $\\boldsymbol{{{answer}}}$"
    yield f"**Final Answer:** ${answer}$"
    if re.fullmatch(r"-?\d+", answer):
        number = int(answer)
        yield f"**Answer:** {number:,}"
        yield f"\\boxed{{{number:,}}}".replace(",", "{,}")
        yield f"\\boxed{{x = {answer}.00}}"
        yield f"\\boxed{{{answer} \\text{{ apples}}}}"
        yield f"Altogether it is **\\${number:,}**."
        yield f"Some work.\n#### {number}"
    if whole := re.fullmatch(r"\\frac\{(-?\d+)\}\{(\d+)\}", answer):
        yield f"The probability is **{whole[1]}/{whole[2]}**."
        yield f"\\boxed{{\\frac{{{2 * int(whole[1])}}}{{{2 * int(whole[2])}}}}}"
    if answer.startswith("\\text{"):
        yield f"\\boxed{{\\textbf{{{answer[6:-1]}}}}}"


def neighbours(answer: str) -> Iterator[str]:
    """Wrong answers: a number in it is another, or its sign has changed."""
    numbers = list(re.finditer(r"\d+(?:\.\d+)?", answer))
    wrong = []
    for number in {one.start(): one for one in (*numbers[:1], *numbers[-1:])}.values():
        value = float(number[0]) if "." in number[0] else int(number[0])
        others = [value + 1, *([value - 1] if type(value) is int and value else [])]
        wrong += [f"{answer[: number.start()]}{other}{answer[number.end() :]}" for other in others]
    if re.fullmatch(r"-?[\d,.]*[1-9][\d,.]*", answer):
        wrong.append(answer[1:] if answer[0] == "-" else f"-{answer}")
    for one in wrong:
        yield f"\\boxed{{{one}}}"
        yield f"**Answer:** ${one}$"


@pytest.mark.parametrize(
    ("names", "every"), [(ALL[:1], 10), (ALL[1:], 9), pytest.param(ALL, 1, marks=pytest.mark.soak)]
)
def test_references_pass_in_every_form_and_their_neighbours_in_none(names, every):
    pairs = [
        (text, reference, expected)
        for reference in references(names, every)
        for expected, texts in ((True, rewritten), (False, neighbours))
        for text in texts(reference_of(reference))
    ]
    assert len(pairs) > 400
    inputs = ((text, reference, "") for text, reference, _ in pairs)
    found = [getattr(finding, "outcome", finding) == "pass" for _, finding in pool.ordered(examine, inputs, 2, 20)]
    wrong = [pair for pair, passed in zip(pairs, found, strict=True) if passed != pair[2]]
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:5]}"
