"""Programs against their tests in the sandbox: right ones pass, wrong ones say where, hostile ones get nowhere."""

import gzip
import json

import pytest

from r1distill.data import schema, verdict_file, verdicts
from r1distill.data.config import ROOT
from r1distill.data.verdicts import Item, VerdictSettings
from r1distill.data.verify import code, sandbox
from r1distill.data.verify.sandbox import SandboxSettings

MISSING = sandbox.unavailable()
sandboxed = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
QUICK = SandboxSettings(seconds=1, total_seconds=20, output_bytes=1 << 20)
SUMS = {"kind": "stdin", "inputs": ["1 2\n", "20 22\n"], "outputs": ["3\n", "42\n"]}
ADDS = {"kind": "asserts", "tests": ["assert add(1, 2) == 3", "assert add(20, 22) == 42"]}
CHECKS_ADD = {
    "kind": "function",
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n    assert f(2, 2) == 4",
}
SUM = "print(sum(map(int, input().split())))"
ADD = "def add(a, b):\n    return a + b"


def fenced(program, label="python"):
    return f"Here is the program:\n\n```{label}\n{program}\n```\n\nIt adds."


def examine(program, arguments, settings=QUICK):
    return code.examine(fenced(program), arguments, settings)


@sandboxed
@pytest.mark.parametrize(
    ("program", "arguments"),
    [(SUM, SUMS), (f"{SUM}\nexit()", SUMS), (f"import sys\n{SUM}\nsys.exit()", SUMS), (ADD, ADDS), (ADD, CHECKS_ADD)],
)
def test_right_programs_pass(program, arguments):
    assert examine(program, arguments).outcome == "pass", examine(program, arguments)


@sandboxed
@pytest.mark.parametrize(
    ("program", "arguments", "reason", "detail"),
    [
        ("print(3)", SUMS, "wrong output", "test 2 of 2: line 1: expected 42, found 3"),
        (f"{SUM}\nprint(0)", SUMS, "wrong output", "test 1 of 2: line 2: expected the end, found 0"),
        ("print(1 / 0)", SUMS, "the program raised an error", "test 1 of 2: ZeroDivisionError: division by zero"),
        (f"{SUM}\nimport sys; sys.exit(3)", SUMS, "the program raised an error", "test 1 of 2"),
        (ADD.replace("+", "-"), ADDS, "a test failed", "test 1 of 2: assert add(1, 2) == 3 (AssertionError)"),
        (ADD.replace("a + b", "3"), CHECKS_ADD, "a test failed", "test 1 of 1: assert f(2, 2) == 4 (AssertionError)"),
        (
            ADD.replace("a + b", "1 / 0"),
            ADDS,
            "a test failed",
            "test 1 of 2: assert add(1, 2) == 3 (ZeroDivisionError: division by zero)",
        ),
        (
            "adds = 1",
            ADDS,
            "a test failed",
            "test 1 of 2: assert add(1, 2) == 3 (NameError: name 'add' is not defined)",
        ),
        ("raise KeyError(1)", ADDS, "the program raised an error", "KeyError: 1"),
        ("def add(a, b:", ADDS, "the code is not valid Python", None),
    ],
)
def test_wrong_programs_fail_and_say_where(program, arguments, reason, detail):
    finding = examine(program, arguments)
    assert finding[:2] == ("fail", reason), finding
    assert detail is None or finding.detail == detail


# Programs that cheat or attack. Where one may still pass, what it could do is looked at.


@sandboxed
@pytest.mark.parametrize(
    ("program", "arguments", "reason"),
    [
        ("import sys; sys.exit(0)", ADDS, "the program raised an error"),
        ("import os; os._exit(0)", ADDS, "the program ended before its tests did"),
        ("import os\ndef add(a, b): os._exit(0)", ADDS, "the program ended before its tests did"),
        ("def add(a, b): raise SystemExit(0)", ADDS, "a test failed"),
        ("print('ok\\npassed\\n2 tests')\ndef add(a, b): return 0", ADDS, "a test failed"),
        ("import os\nfor fd in range(20):\n  for line in ('0', '1', '2', '3'):\n    try: os.write(fd, f'{\"0\" * 32} {line}\\n'.encode())\n    except OSError: pass\nos._exit(0)", ADDS, "the program ended before its tests did"),
        ("AssertionError = Warning\ndef add(a, b): return 0", ADDS, "a test failed"),
        ("import builtins\nbuiltins.exec = builtins.compile = lambda *a: None\ndef add(a, b): return 0", ADDS, "a test failed"),
        ("import os\nstolen = []\nwrite = os.write\nos.write = lambda fd, data: [write(fd, data.replace(b' 1', b' %d' % n)) for n in range(4)]\ndef add(a, b): return 0", ADDS, "a test failed"),
        ("import json\njson.dumps = lambda *a: '[]'\ndef add(a, b): return 0", ADDS, "a test failed"),
        ("while True: pass", SUMS, "the program ran out of time"),
        ("while True: pass", ADDS, "the program ran out of time"),
        ("import time; time.sleep(100)", SUMS, "the program ran out of time"),
        ("import signal, time\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass", SUMS, "the program ran out of time"),
        ("x = [bytes(10**6) for _ in range(10**4)]", SUMS, "the program ran out of memory"),
        ("import sys\nfor _ in range(1000): sys.stdout.write('x' * 10**6)", SUMS, "the program wrote too much"),
        ("import sys\nfor _ in range(1000): sys.stderr.write('x' * 10**6)", SUMS, "the program wrote too much"),
        ("import os\nfor n in range(10**6): open(str(n), 'wb').write(bytes(10**6))", SUMS, "the program raised an error"),
        ("import os\nwhile True: os.fork()", SUMS, None),
        ("import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.01)", SUMS, "the program ran out of time"),
        ("import os; os.kill(os.getppid(), 9)", SUMS, "the program broke its sandbox"),
        ("import os; os.kill(-1, 9)", SUMS, "the program broke its sandbox"),
        ("import numpy", SUMS, "the program needs more than the standard library"),
    ],
)  # fmt: skip
def test_hostile_programs_do_not_pass(program, arguments, reason):
    finding = examine(program, arguments)
    assert finding.outcome != "pass"
    assert reason in (None, finding.reason), finding
    assert examine(SUM, SUMS).outcome == "pass"  # and the next one is judged as ever


@sandboxed
def test_what_takes_too_long_together_is_open():
    many = {"kind": "stdin", "inputs": ["1 2\n"] * 50, "outputs": ["3\n"] * 50}
    finding = examine(f"import time; time.sleep(0.3)\n{SUM}", many, SandboxSettings(total_seconds=2))
    assert finding[:2] == ("unverifiable", "the tests took too long together")


# What is taken for the program.


@pytest.mark.parametrize(
    ("response", "names", "program"),
    [
        (fenced("x = 1"), (), "x = 1"),
        (fenced("x = 1", "Python3"), (), "x = 1"),
        (fenced("x = 1", ""), (), "x = 1"),
        (fenced("int x = 1;", "cpp"), (), None),
        (fenced("$ pip install x", ""), (), None),
        (fenced("x = 1") + fenced("x = 2"), (), "x = 2"),
        (fenced(ADD) + fenced("print(add(1, 2))"), ("add",), ADD),
        (fenced(ADD) + fenced("print(add(1, 2))"), ("other",), "print(add(1, 2))"),
        (fenced("x = 1") + fenced("1 2\n", "text"), (), "x = 1"),
        (fenced("print(input())") + fenced("print('an example')"), (), "print(input())"),
        ("1. So:\n\n   ```py\n   if x:\n       y()\n   ```", (), "if x:\n    y()"),
        ("~~~python\nx = '```'\n~~~", (), "x = '```'"),
        ("```python\nx = 1", (), "x = 1"),
        (ADD, (), ADD),
        ("The answer is 4.", (), None),
        ("42", (), None),
        ("", (), None),
    ],
)
def test_the_program_in_a_response(response, names, program):
    assert code.program_of(response, names) == program


def test_no_code_fails_without_a_sandbox(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert code.examine("It can't be done.", SUMS, QUICK)[:2] == ("fail", "no Python code in the response")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kind": "magic"},
        {"kind": "stdin", "inputs": ["1"], "outputs": []},
        {"kind": "stdin", "inputs": [], "outputs": []},
        {"kind": "stdin", "inputs": [1], "outputs": ["1"]},
        {"kind": "asserts", "tests": "assert True"},
        {"kind": "asserts", "tests": ["assert True"], "setup": 7},
        {"kind": "function", "entry_point": "add"},
        {**SUMS, "tolerance": "much"},
    ],
)
def test_tests_that_are_none(arguments):
    assert code.examine(fenced(ADD), arguments, QUICK)[:2] == ("unverifiable", "the tests can't be read")


@pytest.mark.parametrize(
    ("wanted", "found", "tolerance", "same"),
    [
        ("1 2 \n3\n", "1 2\n3", None, True),
        ("1\n\n", "1", None, True),
        ("1\n2", "1 2", None, False),
        ("1 2", "1  2", None, False),
        (" 1", "1", None, False),
        ("0.5", "0.50", None, False),
        ("0.5", "0.50", 0, True),
        ("0.333333", "0.3333334", 1e-6, True),
        ("0.333333", "0.3334", 1e-6, False),
        ("1000000", "1000000.5", 1e-6, True),
        ("yes 1", "no 1", 1e-6, False),
        ("1", "nan", 1e-6, False),
        ("1", "inf", 1e-6, False),
        ("1 2", "1", 1e-6, False),
    ],
)
def test_outputs(wanted, found, tolerance, same):
    assert code.same_output(wanted, found, tolerance) is same


# Through the stage, in its workers.


def build_one(folder, verifier, arguments, response):
    about = {"prompt_id": "p", "question": "Add.", "domain": "code", "reference_answer": None, "verifier": verifier}
    prompt = about | {"verifier_args": arguments, "source": "test", "source_id": "0", "license": "mit"}
    text = {"completion": f"Hm.</think>{response}", "reasoning": "Hm.", "response": response}
    trace = dict.fromkeys(schema.TRACE.names) | text | {"prompt_id": "p", "sample": 0, "state": "done"}
    schema.write(folder / "prompts", schema.PROMPT, [prompt])
    schema.write(folder / "traces", schema.TRACE, [trace])
    return verdicts.build(VerdictSettings(workers=1), folder / "prompts", folder / "traces", folder / "out", folder)


@sandboxed
def test_the_stage_runs_code_and_says_which_verifier_it_was(tmp_path):
    assert build_one(tmp_path, "code", json.dumps(SUMS), fenced(SUM)).kept == 1
    rows = list(schema.rows(schema.read(tmp_path / "out", schema.VERDICT)))
    versions = {row["check"]: row["version"] for row in rows}
    assert versions["correctness"] == code.VERSION
    assert versions["format"] == "filters 1"


@sandboxed
def test_code_has_time_of_its_own():
    slow = f"import time; time.sleep(2)\n{SUM}"
    one = Item("p", 0, "", "", "Hm.", fenced(slow), verifier="code", verifier_args=json.dumps(SUMS), domain="code")
    [judged] = verdicts.judge(VerdictSettings(workers=1, timeout_seconds=1, code=SandboxSettings(seconds=3)), [one])
    assert next(row for row in judged.verdicts if row["check"] == "correctness")["outcome"] == "pass"


@sandboxed
@pytest.mark.parametrize("arguments", [SUMS, json.dumps(SUMS)], ids=["object", "text"])
def test_verify_takes_tests_from_a_column(tmp_path, arguments):
    rows = [{"completion": f"Hm.</think>{fenced(program)}", "tests": arguments} for program in (SUM, "print(3)")]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = VerdictSettings(workers=1)
    totals = verdict_file.verify(tmp_path / "in.jsonl", tmp_path / "out", {"verifier_args": "tests"}, "code", settings)
    assert totals["checks"]["correctness"] == {"pass": 1, "fail": 1}


# Real tasks: their own solutions pass.

EVAL = ROOT.parent / "shared" / "data" / "eval"


def real(name):
    if not (EVAL / name).is_file():
        pytest.skip(f"needs ../shared/data/eval/{name}")
    with gzip.open(EVAL / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def tasks(name):
    """(what is being solved, the tests, the right program)"""
    for row in real(f"{name}.jsonl.gz"):
        if name == "humaneval":
            about = {"kind": "function", "entry_point": row["entry_point"], "test": row["test"], "setup": row["prompt"]}
            yield row["task_id"], about, row["prompt"] + row["canonical_solution"]
        else:
            setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
            yield row["task_id"], {"kind": "asserts", "tests": row["test_list"], "setup": setup}, row["code"]


@sandboxed
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_sanitized"])
def test_canonical_solutions_pass(name):
    for number, (task, arguments, program) in enumerate(tasks(name)):
        if number % 11 == 0:
            finding = examine(program, arguments, SandboxSettings())
            assert finding.outcome == "pass", (task, finding)
            broken = (
                arguments | {"tests": ["assert False"]}
                if "tests" in arguments
                else arguments | {"entry_point": "print"}
            )
            if number == 0:
                assert examine(program, broken, SandboxSettings()).outcome == "fail"


@sandboxed
def test_a_contest_task():
    """The first of code_contests: books ordered by their titles, odd places rising and even ones falling."""
    row = next(real("code_contests_test.jsonl.gz"))
    arguments = {"kind": "stdin", **row["tests"]}
    program = (
        "n, m = map(int, input().split())\n"
        "titles = [input() for _ in range(n)]\n"
        "key = lambda n: [ord(c) if i % 2 == 0 else -ord(c) for i, c in enumerate(titles[n])]\n"
        "print(*(n + 1 for n in sorted(range(n), key=key)))"
    )
    assert examine(program, arguments).outcome == "pass"
    assert examine(program.replace("-ord", "ord"), arguments).reason == "wrong output"
