"""Our verdicts beside lm-evaluation-harness's own scoring functions, on the same real R1 answers and real references.

Where the two differ, ours says right and theirs wrong, and each difference stands here with its reason. There is no
answer that they call right and we don't.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from r1distill.data.config import ROOT
from r1distill.data.thinking import split_thinking
from r1distill.data.verify.math import examine

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness (pip install --no-deps lm_eval)")
DATA = ROOT.parent / "shared" / "data"
TRACES = DATA / "traces" / "mip_deepseek_r1.jsonl.gz"
pytestmark = pytest.mark.skipif(not TRACES.is_file(), reason="needs ../shared/data/traces/mip_deepseek_r1.jsonl.gz")

# gsm8k's flexible-extract: the last number of the text, compared as a string.
OTHER_NUMBER = "a number stands behind the answer (20 miles apart after 2 hours)"
CENTS = "the same number written with decimals (132.00 and 132)"
UNIT = "the answer is a time or duration in another unit than the reference's"
GSM8K = {
    **dict.fromkeys((34, 95, 110, 142, 175, 222, 296, 385, 540), CENTS),
    **dict.fromkeys((200, 203, 205, 330, 479, 529), OTHER_NUMBER),
    **dict.fromkeys((5, 27, 109), "the amount in the box follows a dollar sign that opens the formula ($\\boxed{26}$)"),
    **dict.fromkeys((207, 513), UNIT),
}
# What minerva_math and lighteval call: math-verify on the response and the reference in dollar signs.
MATH_VERIFY = {
    **dict.fromkeys((35, 190, 200), "an escaped dollar sign in prose opens a formula for math-verify (\\$140)"),
    **dict.fromkeys((207, 513), UNIT),
}
# aime's and hendrycks_math's string comparison, where there is a box at all: without one it compares the whole text.
STRINGS = {
    **{f"gsm8k/{n}": CENTS for n in (95, 110, 142, 175, 222, 296, 385, 540)},
    **{f"gsm8k/{n}": "thousands separated by commas in the reference" for n in (150, 379, 451, 516)},
    **{f"gsm8k/{n}": UNIT for n in (207, 513)},
    "math/7": "a word in \\text and without", "math/42": "a word in \\text and without",
    "math/36": "a letter in parentheses and without", "math/45": "a set in another order, with ± written out",
}  # fmt: skip


def key(row: dict) -> str:
    parts = row["id"].split("/")
    return f"{parts[1]}/{parts[-1]}"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """The 634 answers with a reference that belongs to them, what follows their thinking, and our verdict."""
    with gzip.open(TRACES, "rt", encoding="utf-8") as lines:
        found = [row for row in map(json.loads, lines) if row["variant"] == "normal"]
    for row in found:
        row["response"] = split_thinking(row["response"], opened=True)[1]
        row["gold"] = str(row["reference_answer"]).rpartition("####")[2].strip()
        row["ours"] = examine(row["response"], str(row["reference_answer"]), row["prompt"]).outcome == "pass"
    assert len(found) == 634
    return {key(row): row for row in found}


def harness() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def module_of(task: str) -> ModuleType:
    """A task's scoring functions, without the rest of the harness."""
    spec = importlib.util.spec_from_file_location(f"harness_{task}", harness() / "tasks" / task / "utils.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(rows: dict[str, dict], theirs: dict[str, bool]) -> set[str]:
    """Where they differ; always because ours is right."""
    found = {name for name, right in theirs.items() if right != rows[name]["ours"]}
    assert all(rows[name]["ours"] for name in found)
    return found


def test_gsm8ks_own_filter_and_metric(rows):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    task = yaml.load((harness() / "tasks" / "gsm8k" / "gsm8k.yaml").read_text(), yaml.BaseLoader)
    (flexible,) = (one for one in task["filter_list"] if one["name"] == "flexible-extract")
    step = flexible["filter"][0]
    extract = RegexFilter(regex_pattern=step["regex_pattern"], group_select=int(step["group_select"]))
    ignored = task["metric_list"][0]["regexes_to_ignore"]
    theirs = {}
    for name, row in rows.items():
        if name.startswith("gsm8k"):
            ((said,),) = extract.apply([[row["response"]]], [{}])
            compared = exact_match_hf_evaluate([said], [row["gold"]], regexes_to_ignore=ignored, ignore_case=True)
            theirs[name] = bool(compared["exact_match"])
    assert len(theirs) == 582
    assert differences(rows, theirs) == {f"gsm8k/{number}" for number in GSM8K}


def test_math_verify_as_minerva_math_and_lighteval_call_it(rows):
    from math_verify import parse, verify

    theirs = {
        name: bool(verify(gold=parse(f"${row['gold']}$"), target=parse(row["response"]))) for name, row in rows.items()
    }
    assert sum(theirs.values()) == 601
    assert differences(rows, theirs) == {f"gsm8k/{number}" for number in MATH_VERIFY}


def test_aimes_string_comparison(rows):
    aime = module_of("aime")
    theirs = {
        name: bool(aime.process_results({"answer": row["gold"]}, [row["response"]])["exact_match"])
        for name, row in rows.items()
    }
    boxed = {name for name in differences(rows, theirs) if "\\boxed" in rows[name]["response"]}
    assert boxed == set(STRINGS)


@pytest.mark.skipif(not (DATA / "eval" / "aime2024.jsonl").is_file(), reason="needs ../shared/data/eval/aime2024.jsonl")
def test_on_aime_itself_only_leading_zeros_differ():
    """All 30 real references: as they stand, as the number they are, and wrong."""
    aime = module_of("aime")
    lines = (DATA / "eval" / "aime2024.jsonl").read_text(encoding="utf-8").splitlines()
    zeros = 0
    for gold in [json.loads(line)["answer"] for line in lines]:
        for said, right in ((gold, True), (str(int(gold)), True), (str(int(gold) + 1), False)):
            response = f"So the answer is $\\boxed{{{said}}}$."
            assert (examine(response, gold).outcome == "pass") == right
            theirs = bool(aime.process_results({"answer": gold}, [response])["exact_match"])
            zeros += theirs != right
            assert theirs == right or gold.startswith("0"), gold
    assert zeros > 0  # "025" and 25 are two answers to the harness
