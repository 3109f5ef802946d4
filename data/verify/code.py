"""Correctness of programs: Python code against its tests, run in the sandbox.

A prompt's ``verifier_args`` say what the tests are:

- {"kind": "stdin", "inputs": [str], "outputs": [str], "tolerance": float, optional}: the program reads an input and
  writes the output. Outputs are compared by lines, without the space at their ends and the blank lines behind them;
  with a tolerance also number by number (an absolute or a relative error up to it). code_contests, LiveCodeBench.
- {"kind": "call", "function": str, "inputs": [str], "outputs": [str]}: the function, or the method of a class Solution,
  is called with the JSON values of an input's lines, and its result is the JSON value of the output.
- {"kind": "livecodebench", ...}: the tests of that data set, packed (see ``livecodebench``).
- {"kind": "asserts", "tests": [str], "setup": str, optional}: statements that must not raise, in the program's own
  namespace, after ``setup`` and the program. MBPP.
- {"kind": "function", "entry_point": str, "test": str, "setup": str, optional}: ``test`` defines ``check(candidate)``.
  HumanEval, whose prompts are the ``setup``: answers often leave out their imports and helpers.

With the first two, a ``setup`` runs before the program. Their expected outputs never enter the sandbox: a program
can't pass without computing them. In the last two the tests share the program's process. Ending early or printing
passes nothing there (a random token reports what has passed), but a program written against this very checker could
search the interpreter for the token, or return an object that equals everything. Prefer ``stdin`` where a task offers
both.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import secrets
import textwrap
import warnings
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from itertools import zip_longest
from pathlib import Path
from typing import Any

from r1distill.data.verify import checker, livecodebench
from r1distill.data.verify.check import Finding, failed, passed, unverifiable
from r1distill.data.verify.sandbox import Run, Sandbox, SandboxError, SandboxSettings, opened, unavailable

VERSION = "code 2"

_BLOCK = re.compile(r"^[ \t]*(?P<fence>```+|~~~+)[ \t]*(?P<label>[^\s`]*)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)", re.M | re.S)  # fmt: skip # noqa: E501
# What calls a function: a line "token result" behind everything that the program itself has written.
_CALL = """
import json as _json, sys as _sys
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else {name}
_given = [_json.loads(_line) for _line in _sys.stdin.read().split("\\n") if _line.strip()]
_sys.__stdout__.write("\\n" + {token!r} + " " + _json.dumps(_function(*_given)) + "\\n")
"""
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(0\b")
_FUTURE = re.compile(r"^from __future__ import .*$", re.M)
_PYTHON = ("python", "py", "python3", "py3")
_ENDINGS = {
    "error": "the program raised an error",
    "time": "the program ran out of time",
    "memory": "the program ran out of memory",
    "output": "the program wrote too much",
    "gone": "the program broke its sandbox",
}


def examine(response: str, arguments: dict[str, Any], settings: SandboxSettings) -> Finding:
    """Judge the program in ``response`` (what follows the thinking) by the tests in ``arguments``.

    Stops at the first test that fails, and says which. Starts one sandbox. Takes up to ``settings.total_seconds``, and
    is unverifiable where that is not enough.
    """
    if arguments.get("kind") == "livecodebench":
        unpacked = livecodebench.arguments(arguments)
        if isinstance(unpacked, str):
            return unverifiable("the tests can't be read", unpacked)
        arguments = unpacked
    problem = _problem(arguments)
    if problem:
        return unverifiable("the tests can't be read", problem)
    program = program_of(response, _wanted_names(arguments))
    if program is None:
        return failed("no Python code in the response")
    tree = _parsed(program)
    if isinstance(tree, str):
        return failed("the code is not valid Python", tree)
    if missing := unavailable():
        return unverifiable("no sandbox", missing)
    try:
        with opened(settings) as sandbox:
            by = _by_output if arguments["kind"] in ("stdin", "call") else _by_asserts
            return by(program, arguments, sandbox)
    except SandboxError as error:
        return unverifiable("the sandbox did not start", str(error))


def _problem(arguments: dict[str, Any]) -> str:
    """Why the tests are none, or ""."""
    kind = arguments.get("kind")
    texts: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "stdin": ((), ("inputs", "outputs")),
        "call": (("function",), ("inputs", "outputs")),
        "asserts": ((), ("tests",)),
        "function": (("entry_point", "test"), ()),
    }
    if kind not in texts:
        return f"kind is {_short(repr(kind))}, expected stdin, call, asserts or function"
    for name in (*texts[kind][0], *(["setup"] if "setup" in arguments else [])):
        if not isinstance(arguments.get(name), str):
            return f"{name} is no text"
    for name in texts[kind][1]:
        value = arguments.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            return f"{name} is no list of texts"
    if kind in ("stdin", "call") and len(arguments["inputs"]) != len(arguments["outputs"]):
        return f"{len(arguments['inputs'])} inputs, {len(arguments['outputs'])} outputs"
    tolerance = arguments.get("tolerance")
    return "" if tolerance is None or isinstance(tolerance, (int, float)) else "tolerance is no number"


def program_of(response: str, names: Sequence[str] = ()) -> str | None:
    """The program in a response: its last Python block that defines one of ``names`` or, without names, that reads its
    input; else its last Python block. What stands behind a program may be an example of its use.

    A block without a label counts where it is valid Python, and so does a response that is code from start to end.
    Blocks are not joined: one that relies on an earlier one fails.
    """
    blocks = []
    for match in _BLOCK.finditer(response):
        label, code = match["label"].lower(), textwrap.dedent(match["code"]).strip("\n")
        if code.strip() and (label in _PYTHON or (not label and _is_program(code))):
            blocks.append(code)
    for code in reversed(blocks):
        if not _defined(code).isdisjoint(names) if names else _READS.search(code):
            return code
    if blocks:
        return blocks[-1]
    return response if _is_program(response) else None


def _is_program(text: str) -> bool:
    """Valid Python that does something: a word, a number or a comparison alone is prose."""
    tree = _parsed(text)
    if isinstance(tree, str):
        return False
    doing = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.For, ast.While, ast.Call)
    return any(isinstance(node, doing) for node in ast.walk(tree))


def _parsed(text: str) -> ast.Module | str:
    """The syntax tree, or what is wrong with the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return _short(f"{type(error).__name__}: {error}")


def _defined(code: str) -> set[str]:
    """The names that a program defines at its top level."""
    tree = _parsed(code)
    names = set()
    for node in tree.body if isinstance(tree, ast.Module) else []:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def _wanted_names(arguments: dict[str, Any]) -> list[str]:
    """The names that the tests call."""
    if arguments["kind"] == "function":
        return [arguments["entry_point"]]
    if arguments["kind"] == "call":
        return ["Solution", arguments["function"]]
    found = set()
    for test in arguments.get("tests", []):
        tree = _parsed(test)
        for node in ast.walk(tree) if isinstance(tree, ast.Module) else []:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                found.add(node.func.id)
    return sorted(found - set(dir(builtins)))


def _by_output(program: str, arguments: dict[str, Any], sandbox: Sandbox) -> Finding:
    tests = list(zip(arguments["inputs"], arguments["outputs"], strict=True))
    token = secrets.token_hex(16) if arguments["kind"] == "call" else ""
    script = _script(program, arguments, token)
    for number, (given, wanted) in enumerate(tests, 1):
        where = f"test {number} of {len(tests)}"
        run = sandbox.run(script, given)
        if run.status != "ok":
            return _ended(run, where, sandbox)
        found = run.stdout.rpartition(f"\n{token} ")[2].strip() if token else run.stdout
        right = _same_value(wanted, found) if token else same_output(wanted, found, arguments.get("tolerance"))
        if not right:
            return failed("wrong output", f"{where}: {_first_difference(wanted, found)}")
    return passed(f"{len(tests)} tests")


def _script(program: str, arguments: dict[str, Any], token: str) -> str:
    """The program behind its setup, and what calls its function. Imports from the future have to come first."""
    call = _CALL.format(name=arguments["function"], token=token) if token else ""
    if not arguments.get("setup") and not call:
        return program
    future = "\n".join(_FUTURE.findall(program))
    return "\n".join([future, arguments.get("setup", ""), _FUTURE.sub("", program), call])


def _same_value(wanted: str, found: str) -> bool:
    """Whether two texts are the same JSON value; a tuple has become a list by then."""
    try:
        return bool(json.loads(wanted) == json.loads(found))
    except (ValueError, RecursionError):
        return False


def _by_asserts(program: str, arguments: dict[str, Any], sandbox: Sandbox) -> Finding:
    if arguments["kind"] == "function":
        tests = [f"{arguments['test']}\n\ncheck({arguments['entry_point']})"]
    else:
        tests = arguments["tests"]
    pieces = [arguments.get("setup", ""), program, *tests]
    token = secrets.token_hex(16)
    script = Path(checker.__file__).read_text(encoding="utf-8")
    run = sandbox.run(script, json.dumps({"pieces": pieces, "token": token}))
    reports = [line.split(" ", 2)[1:] for line in run.stdout.splitlines() if line.startswith(f"{token} ")]
    done = sum(len(report) == 1 for report in reports)
    if done == len(pieces):
        return passed(f"{len(tests)} tests")
    where = f"test {done - 1} of {len(tests)}" if done > 1 else ("setup", "the program")[done]
    if not reports or len(reports[-1]) == 1:  # it never said why
        if run.status in ("ok", "error"):
            return failed("the program ended before its tests did", where)
        return _ended(run, where, sandbox)
    said, number = _why(reports[-1][1])
    if done == 0:
        return unverifiable("the tests' setup raised an error", _short(said))
    if said.startswith("ModuleNotFoundError"):
        return _missing_module(said)
    if done == 1:
        return failed("the program raised an error", _short(said))
    lines = pieces[done].splitlines()
    line = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return failed("a test failed", f"{where}: {_short(line)} ({_short(said)})")


def _why(report: str) -> tuple[str, int]:
    """The error that ended a piece, and the line of it; a program may have meddled with what writes this."""
    try:
        found = json.loads(report)
        return str(found["error"]), int(found["line"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it hid its error", 0


def _ended(run: Run, where: str, sandbox: Sandbox) -> Finding:
    """The finding for a run that did not end well."""
    last = run.stderr.strip().rpartition("\n")[2]
    if last.startswith("ModuleNotFoundError"):
        return _missing_module(last)
    if run.status == "gone" and sandbox.expired:
        return unverifiable("the tests took too long together", where)
    return failed(_ENDINGS[run.status], f"{where}: {_short(last)}" if last else where)


def _missing_module(said: str) -> Finding:
    return unverifiable("the program needs more than the standard library", _short(said))


def same_output(wanted: str, found: str, tolerance: float | None = None) -> bool:
    """Whether two outputs have the same lines; with a ``tolerance``, numbers may differ by it."""
    ours, theirs = _lines(wanted), _lines(found)
    if ours == theirs:
        return True
    if tolerance is None or len(ours) != len(theirs):
        return False
    return all(_close(a.split(), b.split(), tolerance) for a, b in zip(ours, theirs, strict=True))


def _close(ours: list[str], theirs: list[str], tolerance: float) -> bool:
    return len(ours) == len(theirs) and all(a == b or _near(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _near(wanted: str, found: str, tolerance: float) -> bool:
    if tolerance == 0:  # exactly: two floats may be the same where the numbers are not
        try:
            return Decimal(wanted) == Decimal(found)
        except InvalidOperation:
            return False
    try:
        a, b = float(wanted), float(found)
    except ValueError:
        return False
    return abs(a - b) <= tolerance * max(1.0, abs(a))  # False for nan and for infinity beside a number


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _first_difference(wanted: str, found: str) -> str:
    for number, (ours, theirs) in enumerate(zip_longest(_lines(wanted), _lines(found)), 1):
        if ours != theirs:
            said = [_short(line) if line is not None else "the end" for line in (ours, theirs)]
            return f"line {number}: expected {said[0]}, found {said[1]}"
    return "the same"


def _short(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
