"""The checks on real DeepSeek-R1 outputs; every disagreement with a reference was read by hand."""

import gzip
import json
from collections import Counter

import pytest

from r1distill.data.config import ROOT
from r1distill.data.thinking import split_thinking
from r1distill.data.verdicts import Item, VerdictSettings, judge

FILE = ROOT.parent / "shared" / "data" / "traces" / "mip_deepseek_r1.jsonl.gz"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/traces/mip_deepseek_r1.jsonl.gz")

# Where R1's answer and the reference are different numbers: mostly another reading of the question.
DIFFERENT = {
    "gsm8k": {11, 22, 29, 45, 54, 69, 71, 91, 104, 121, 123, 180, 243, 263, 265, 364, 407, 413, 439, 448, 459, 460}
    | {472, 502, 546},
    "math": {16, 40},
}
API_ERRORS = {"mip/gsm8k/normal/deepseekR1/66", "mip/svamp/MiP/deepseekR1/53", "mip/svamp/MiP/deepseekR1/71"}
MIXED = {"math": {18, 29}, "svamp": {42, 49, 70, 152, 166, 195, 237, 250, 270, 284, 294}}  # Chinese words in English
RUSSIAN = "mip/gsm8k/normal/deepseekR1/374"
CODE = "mip/math/MiP/deepseekR1/1"


def an_item(number, row):
    reasoning, response = split_thinking(row["response"], opened=True)
    reference = row["reference_answer"]
    return Item(
        prompt_id=row["id"],
        sample=number,
        question=row["prompt"],
        completion=row["response"],
        reasoning=reasoning,
        response=response,
        reference_answer=None if reference is None else str(reference),
    )


@pytest.fixture(scope="module")
def found():
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    judged = judge(VerdictSettings(), (an_item(number, row) for number, row in enumerate(rows)))
    checks = [{v["check"]: v["outcome"] for v in one.verdicts} for one in judged]
    return {row["id"]: (row, outcomes) for row, outcomes in zip(rows, checks, strict=True)}


def failing(found, check):
    return {key for key, (_, outcomes) in found.items() if outcomes[check] == "fail"}


def test_correctness_agrees_with_every_reference_that_the_answer_meets(found):
    normal = {key: outcomes for key, (row, outcomes) in found.items() if row["variant"] == "normal"}
    different = {f"mip/{name}/normal/deepseekR1/{n}" for name, numbers in DIFFERENT.items() for n in numbers}
    assert {
        key for key, outcomes in normal.items() if outcomes["correctness"] != "pass"
    } == different | API_ERRORS & set(normal)
    assert Counter(outcomes["correctness"] for outcomes in normal.values()) == {"pass": 606, "fail": 28}


def test_a_removed_premise_is_not_called_right(found):
    """The reference does not follow there; these 13 answers give its value nevertheless, in a box."""
    removed = [(row, outcomes) for row, outcomes in found.values() if row["variant"] != "normal"]
    right = [row for row, outcomes in removed if outcomes["correctness"] == "pass"]
    assert len(right) == 13
    assert all("\\boxed{" in row["response"] for row in right)
    assert all(
        outcomes["correctness"] == "unverifiable" for row, outcomes in removed if row["reference_answer"] is None
    )


def test_filters_find_what_is_known_to_be_there_and_nothing_else(found):
    mixed = {f"mip/{name}/MiP/deepseekR1/{n}" for name, numbers in MIXED.items() for n in numbers}
    assert failing(found, "language") == mixed | {RUSSIAN}
    assert failing(found, "format") == API_ERRORS | {CODE}
    assert failing(found, "truncation") == API_ERRORS
    assert failing(found, "repetition") == set()
