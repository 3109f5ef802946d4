"""The verdicts stage: judging in order, killing what hangs, resuming after SIGKILL."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data import schema, verdicts
from r1distill.data.verdicts import CHECKS, Item, VerdictSettings
from r1distill.data.verify import pool

HANGS = r"\boxed{9^{9^{9^{9}}}}"  # sympy would expand it


def an_item(response="It is \\boxed{4}.", **changes):
    values = {"prompt_id": "p", "sample": 0, "question": "What is 2 + 2?", "reasoning": "Two and two make four."}
    values |= {"completion": f"Two and two make four.\n</think>\n\n{response}", "response": response}
    return Item(**{**values, "reference_answer": "4", **changes})


def judged(*items, **settings):
    return list(verdicts.judge(VerdictSettings(**{"workers": 2, **settings}), items))


def test_items_come_back_in_order_with_one_verdict_a_check():
    found = judged(*(an_item(f"It is \\boxed{{{number % 7}}}.", sample=number) for number in range(80)))
    assert [one.item.sample for one in found] == list(range(80))
    assert [one.outcome for one in found] == ["pass" if number % 7 == 4 else "fail" for number in range(80)]
    for one in found:
        assert [row["check"] for row in one.verdicts] == list(CHECKS)
        assert all(row.keys() == set(schema.VERDICT.names) and row["version"] for row in one.verdicts)


def test_a_verifier_that_hangs_is_killed_and_costs_only_its_row():
    began = time.monotonic()
    found = judged(an_item(), an_item(HANGS, reference_answer="\\sqrt{2}"), an_item(), timeout_seconds=3)
    assert [one.outcome for one in found] == ["pass", "unverifiable", "pass"]
    assert found[1].reason == "correctness: the verifier ran out of time"
    assert [row["outcome"] for row in found[1].verdicts if row["check"] not in verdicts.MAY_HANG] == ["pass"] * 4
    assert time.monotonic() - began < 60


def test_a_process_that_dies_costs_only_its_row():
    assert [result for _, result in pool.ordered(os._exit, [(3,)], 1, 30)] == ["the verifier died"]
    results = [result for _, result in pool.ordered(divmod, [(7, 2), (7, 0), (9, 2)], 1, 30)]
    assert results == [(3, 1), "the verifier raised ZeroDivisionError", (4, 1)]


def test_inputs_are_drawn_as_they_are_needed():
    drawn = []
    results = pool.ordered(abs, ((drawn.append(n) or n,) for n in range(10_000)), 1, 30)
    assert next(results) == ((0,), 0)
    results.close()
    assert len(drawn) <= 2 * pool.IN_FLIGHT_PER_WORKER


@pytest.mark.parametrize(
    ("changes", "outcome", "reason"),
    [
        ({"verifier": "astrology"}, "unverifiable", "correctness: no verifier of this name"),
        ({"verifier": ""}, "unverifiable", "correctness: no verifier of this name"),
        ({"reference_answer": None}, "unverifiable", "correctness: no reference answer"),
        ({"problem": "damaged"}, "unverifiable", "format: damaged"),
        (
            {"state": "failed", "completion": "", "response": "", "error": "HTTP 500"},
            "fail",
            "format: the request failed",
        ),
        ({"state": "truncated"}, "fail", "truncation: the token limit was reached"),
        ({"response": "", "completion": "Two and two make"}, "fail", "format: no </think>"),
    ],
)
def test_outcomes(changes, outcome, reason):
    [one] = judged(an_item(**changes))
    assert (one.outcome, one.reason, one.kept) == (outcome, reason, False)


def test_general_writing_may_be_kept_unverified():
    [one] = judged(an_item(domain="general", verifier="none"), keep_unverified=("general",))
    assert (one.outcome, one.kept) == ("unverifiable", True)
    [one] = judged(
        an_item("", completion="Hm.</think>", domain="general", verifier="none"), keep_unverified=("general",)
    )
    assert (one.outcome, one.kept) == ("fail", False)


def test_a_check_that_is_not_required_is_reported_and_rejects_nothing():
    one = an_item("It is \\boxed{4}, that is 四.")
    assert judged(one)[0].reason == "language: mixed languages"
    [lenient] = judged(one, required=("correctness", "format"))
    assert lenient.kept
    assert next(row for row in lenient.verdicts if row["check"] == "language")["outcome"] == "fail"


# The stage, over tables.

TRACES = 1500
THINKING = " ".join(f"Step {n} adds {n * 7} to {n * n}, which leaves {n % 13} of them." for n in range(60))


def write_inputs(folder: Path) -> None:
    prompts = [
        {"prompt_id": f"p{n}", "question": f"What is {n} + {n}?", "domain": "math", "reference_answer": str(2 * n)}
        | {"verifier": "math", "verifier_args": "{}", "source": "test", "source_id": str(n), "license": "mit"}
        for n in range(TRACES)
    ]
    schema.write(folder / "prompts", schema.PROMPT, prompts)
    empty = dict.fromkeys(schema.TRACE.names)
    traces = []
    for n in range(TRACES):
        response = f"It is \\boxed{{{2 * n + (n % 3 == 0)}}}."
        text = {"completion": f"{THINKING}</think>{response}", "reasoning": THINKING, "response": response}
        traces.append({**empty, **text, "prompt_id": f"p{n}", "sample": 0, "finish_reason": "stop", "state": "done"})
    traces[7] |= {"prompt_id": "unknown"}
    schema.write(folder / "traces", schema.TRACE, traces)


RUN = (
    "import sys; from pathlib import Path; from r1distill.data import verdicts\n"
    "if __name__ == '__main__':\n"
    "    home = Path(sys.argv[1])\n"
    "    settings = verdicts.VerdictSettings(workers=2)\n"
    "    result = verdicts.build(settings, home / 'prompts', home / 'traces', home / 'out', home)\n"
    "    print(result.read, result.kept, sum(result.rejected.values()))\n"
)


def descendants(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(stat.parent.name)
            found |= {child} | descendants(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_stage_resumes_and_leaves_no_process(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while kept(tmp_path) < 2 * verdicts.TRACES_PER_BATCH * len(CHECKS):
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    family = descendants(running.pid)
    running.send_signal(signal.SIGKILL)
    running.wait()
    finished = mark(tmp_path)
    assert finished < TRACES * len(CHECKS)
    deadline = time.monotonic() + 30
    while alive := [pid for pid in family if "python" in _command(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1500", "999", "501"]
    table = schema.read(tmp_path / "out", schema.VERDICT)
    assert table["detail"].to_pylist().count("kept") == finished  # none was made again
    assert table.num_rows == TRACES * len(CHECKS)
    keys = list(zip(table["prompt_id"].to_pylist(), table["check"].to_pylist(), strict=True))
    assert keys[:: len(CHECKS)] == [("unknown" if n == 7 else f"p{n}", CHECKS[0]) for n in range(TRACES)]


def kept(home: Path) -> int:
    """How many findings there are."""
    file = home / "findings" / "findings.sqlite"
    if not file.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as db, contextlib.suppress(sqlite3.OperationalError):
        return int(db.execute("SELECT count(*) FROM findings").fetchone()[0])
    return 0  # it is being made


def mark(home: Path) -> int:
    """Change the detail of every finding, so that one that is made again shows; returns how many there are."""
    with contextlib.closing(sqlite3.connect(home / "findings" / "findings.sqlite")) as db:
        db.execute("UPDATE findings SET detail = 'kept'")
        db.commit()
    return kept(home)


def test_a_changed_policy_runs_no_check_again_and_a_changed_threshold_only_its_own(tmp_path):
    write_inputs(tmp_path)

    def build(**changes) -> tuple[int, set[str]]:
        """Passing traces, and the checks that were run again."""
        settings = VerdictSettings(**changes)
        result = verdicts.build(settings, tmp_path / "prompts", tmp_path / "traces", tmp_path / "out", tmp_path)
        rows = schema.rows(schema.read(tmp_path / "out", schema.VERDICT))
        return result.kept, {row["check"] for row in rows if row["detail"] != "kept"}

    assert build()[0] == 999
    mark(tmp_path)
    assert build(required=["format"]) == (TRACES - 1, set())
    assert build(limits={"max_repeated_share": 0.9}) == (999, {"repetition"})


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_the_account_adds_up(tmp_path):
    write_inputs(tmp_path)
    result = verdicts.build(VerdictSettings(), tmp_path / "prompts", tmp_path / "traces", tmp_path / "out", tmp_path)
    result.check("verdicts")
    assert (result.read, result.kept) == (TRACES, 999)
    assert result.rejected == {"correctness: wrong answer": 500, "format: the trace answers no known prompt": 1}
    assert result.metrics["checks"]["correctness"] == {"pass": 999, "fail": 500, "unverifiable": 1}
    assert json.dumps(result.metrics)
