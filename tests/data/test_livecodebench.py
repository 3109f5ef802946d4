"""LiveCodeBench's rows: window, prompts, packed tests read without running a pickle, and programs judged by them."""

from __future__ import annotations

import base64
import json
import pickle  # to make what the data set holds; the project itself never loads one
import zlib

import pytest

from r1distill.data import benchmarks
from r1distill.data.config import load
from r1distill.data.settings import Benchmark
from r1distill.data.sources import FileSource
from r1distill.data.verify import code, livecodebench
from r1distill.data.verify.sandbox import SandboxSettings, unavailable

needs_sandbox = pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))


def packed(tests: list[dict], protocol: int = 4) -> str:
    """As the data set packs them: JSON, pickle, zlib, base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests), protocol))).decode()


def case(given: str, wanted: str, kind: str = "stdin") -> dict:
    return {"input": given, "output": wanted, "testtype": kind}


def row(name: str, day: str, tests: list[dict], starter: str = "", function: str | None = None) -> dict:
    return {
        "question_title": name,
        "question_content": f"Problem {name}: add two numbers {{not a field}}.",
        "question_id": name,
        "contest_date": f"{day}T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed(tests[1:]),
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


SUMS = [case("1 2\n", "3\n"), case("5 6\n", "11\n"), case("0 0\n", "0\n")]
CALLS = [case("[1, 2]\n3", "[4, 5]", "functional"), case("[0]\n1", "[1]", "functional")]
STARTER = "class Solution:\n    def addAll(self, nums: List[int], k: int) -> List[int]:\n        "


@pytest.fixture
def bench(tmp_path) -> Benchmark:
    rows = [
        row("early", "2024-07-31", SUMS),
        row("sum", "2024-08-01", SUMS),
        row("all", "2025-01-31", CALLS, STARTER, "addAll"),
        row("late", "2025-02-01", SUMS),
    ]
    file = tmp_path / "lcb.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    published = load("benchmarks", "livecodebench", Benchmark)
    columns = published.source.columns
    source = FileSource(kind="file", path=str(file), columns=columns, domain="code", verifier="code", license="cc")
    return published.model_copy(update={"source": source})


def test_only_problems_of_the_window_are_asked_each_with_its_own_prompt(bench):
    one, other = benchmarks.asked(bench)
    assert (one.row["source_id"], other.row["source_id"]) == ("sum", "all")
    assert one.difficulty == "easy"
    assert "{not a field}" in one.message and "{question}" not in one.message
    assert "Read the inputs from stdin" in one.message and "starter code" not in one.message
    assert STARTER.strip() in other.message and "stdin" not in other.message
    assert "Read the inputs" not in one.row["question"]  # or prompts of the same form would count as contaminated


def test_another_window_is_a_setting(bench):
    wider = bench.layout.model_copy(update={"first": "2024-07-01", "last": "2024-07-31"})
    (one,) = benchmarks.questions(bench.model_copy(update={"layout": wider}))
    assert one["source_id"] == "early"
    assert benchmarks.release_files(3) == ["test.jsonl", "test2.jsonl", "test3.jsonl"]


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("size", [1, 300, 70_000, 200_000])
def test_the_one_string_of_a_pickle_is_read_without_running_it(protocol, size):
    text = ("é" + "x" * size)[:size]
    assert livecodebench.only_string(pickle.dumps(text, protocol)) == text


class Harmful:
    def __reduce__(self):
        return (print, ("a pickle has run",))


@pytest.mark.parametrize("thing", [Harmful(), ["a", "b"], {"a": 1}, ("x",), 5, None, b"bytes"])
def test_any_other_pickle_is_refused(thing, capsys):
    with pytest.raises(ValueError, match="pickle"):
        livecodebench.only_string(pickle.dumps(thing))
    assert "has run" not in capsys.readouterr().out


def test_damaged_tests_make_an_answer_unverifiable_and_no_traceback():
    good = {"kind": "livecodebench", "public": json.dumps(SUMS), "private": None, "function": None}
    for bad in (
        "%%%",
        packed(SUMS)[:-8],
        base64.b64encode(zlib.compress(b"\x80\x04.")).decode(),
        '[{"input": 1}]',
        "[1]",
    ):
        finding = code.examine("```python\nprint(1)\n```", {**good, "private": bad}, SandboxSettings())
        assert (finding.outcome, finding.reason) == ("unverifiable", "the tests can't be read")
    mixed = livecodebench.arguments({**good, "private": packed(CALLS)})
    assert isinstance(mixed, str) and "functional, stdin" in mixed


def judged(question: benchmarks.Question, program: str):
    arguments = json.loads(question.row["verifier_args"])
    return code.examine(f"Here it is:\n```python\n{program}\n```", arguments, SandboxSettings(seconds=2))


@needs_sandbox
def test_programs_are_judged_by_public_and_private_tests(bench):
    one, other = benchmarks.asked(bench)
    assert judged(one, "a, b = map(int, input().split())\nprint(float(a + b))").outcome == "pass"  # 3.0 is 3
    finding = judged(one, "a, b = map(int, input().split())\nprint(a + b if a < 5 else 0)")
    assert (finding.outcome, finding.reason) == ("fail", "wrong output") and "test 2 of 3" in finding.detail
    # Starter code names List and leaves the import out, and so do answers.
    solution = f"from __future__ import annotations\n{STARTER}print('noise'); return tuple(n + k for n in nums)"
    assert judged(other, solution).outcome == "pass"
    assert judged(other, f"{STARTER}return nums").reason == "wrong output"
    assert judged(other, f"{STARTER}import sys; sys.exit()").reason == "wrong output"
    assert judged(other, "def addAll(nums, k):\n    return [n + k for n in nums]").outcome == "pass"


def test_large_numbers_are_compared_exactly():
    assert not code.same_output("50000000000000001", "50000000000000000", 0.0)
    assert code.same_output("2 1.50\n", "2.0 1.5\n\n", 0.0)
    assert not code.same_output("a 1", "b 1", 0.0)
