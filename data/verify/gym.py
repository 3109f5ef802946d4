"""Correctness by reasoning-gym's own scorers: many of its tasks have more than one right answer.

``arguments`` makes a prompt's ``verifier_args`` from an item of a task, {"task": str, "metadata": …}; ``examine`` gives
both back to the task's scorer. Some scorers evaluate the answer as Python or through sympy's ``parse_expr``: those get
only answers that can't call anything. Scorers may hang on odd answers: call ``examine`` where it can be killed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from r1distill.data.errors import R1DistillError
from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.check import Finding, failed, passed, unverifiable

VERSION = "reasoning_gym 1, reasoning-gym 0.1.25"
FULL_SCORE = 1.0  # less is given for partly right answers, and for the right form alone

_TAGGED = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.S)
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.M | re.S)
_MARKED = re.compile(
    r"^[\W_]{0,20}(?:the |my )?(?:final )?answer(?: is)?[\s*_]*[:：][ \t*]*(?P<answer>.*)", re.I | re.M | re.S
)
_SYMPY = re.compile(r"(?<![\w])(?:parse_expr|sympify)\(")
_PYTHON = re.compile(r"(?<![\w.])(?:eval|exec)\(")
_NAME = re.compile(r"[^\W\d]\w*")
_FUNCTIONS = {
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln",
    "sqrt", "pi", "Abs", "abs",
}  # fmt: skip


def arguments(task: str, item: dict[str, Any]) -> str:
    """The ``verifier_args`` of an item that ``task`` made, as JSON.

    JSON would turn tuples into lists and the keys of dictionaries into text, and scorers compare them: those are
    written as {"tuple": […]}, {"set": […]} and {"dict": [[key, value], …]}. Raises R1DistillError for a value that
    can't be written so.
    """
    try:
        return json.dumps({"task": task, "metadata": _written(item["metadata"])}, sort_keys=True)
    except TypeError as error:
        raise R1DistillError(
            f"the reasoning-gym task '{task}' can't be checked by its own scorer: {error}. Leave it out of the "
            "prompts, or check it with another verifier."
        ) from None


def _written(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_written(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_written(one) for one in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": sorted((_written(one) for one in value), key=lambda one: json.dumps(one, sort_keys=True))}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and not (len(value) == 1 and {*value} & {"tuple", "set", "dict"}):
            return {key: _written(one) for key, one in value.items()}
        return {"dict": [[_written(key), _written(one)] for key, one in value.items()]}
    if callable(plain := getattr(value, "tolist", None)):  # numpy's arrays and numbers
        return _written(plain())
    raise TypeError(f"its metadata holds a {type(value).__name__}, which JSON can't")


def _read(value: Any) -> Any:
    """What ``_written`` wrote."""
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(kind, inside)] = value.items()
        if kind in ("tuple", "set"):
            return (tuple if kind == "tuple" else set)(map(_read, inside))
        if kind == "dict":
            return {_read(key): _read(one) for key, one in inside}
    return {key: _read(one) for key, one in value.items()}


def examine(response: str, reference: str | None, question: str, arguments: dict[str, Any]) -> Finding:
    """Judge the final answer of ``response`` (what follows the thinking) by the scorer of the task that asked.

    ``reference`` is None for tasks that state no answer of their own.
    """
    task, metadata = arguments.get("task"), arguments.get("metadata")
    if not isinstance(task, str) or not isinstance(metadata, dict):
        return unverifiable("the task can't be read", "expected verifier_args with task and metadata")
    scorer = _scorer(task)
    if scorer is None:
        return unverifiable("reasoning-gym has no such task", task)
    if not response.strip():
        return failed("no response after the thinking")
    answer = answer_of(response, question)
    if answer is None:
        return unverifiable("no clear final answer in the response")
    score, evaluator = scorer
    if not _harmless(answer, evaluator):
        return unverifiable("the answer could run as code", _short(answer))
    points = score(answer, {"question": question, "answer": reference, "metadata": _read(metadata)})
    detail = f"{task} scores {_short(answer)} with {points:g}"
    return passed(detail) if points >= FULL_SCORE else failed("wrong answer", detail)


def answer_of(response: str, question: str = "") -> str | None:
    """What the scorer gets to see: the last <answer>, else the box, else the last fenced block, else what follows
    "Answer:", else a response of one paragraph, else what the closing sentence states."""
    if tagged := _TAGGED.findall(response):
        return str(tagged[-1]).strip()
    if "\\boxed" in response:
        return _plain(final_answer(response, question))
    if fenced := _FENCED.findall(response):
        return str(fenced[-1]).strip("\n")
    if marked := list(_MARKED.finditer(response)):
        return re.split(r"\n\s*\n", marked[-1]["answer"].strip())[0].strip().strip("*").strip() or None
    text = response.strip()
    if "\n\n" not in text and not re.search(r"[.!?]\s+\S|\bis\b", text):
        return text
    return _plain(final_answer(response, question))


def _plain(answer: str | None) -> str | None:
    """A boxed answer without the LaTeX around words: \\text{yes}."""
    if answer is None:
        return None
    bare = re.sub(r"\\(?:text|texttt|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"\\([_#%&${}])", r"\1", bare).strip() or None


@lru_cache(maxsize=256)
def _scorer(task: str) -> tuple[Callable[[str, dict[str, Any]], float], str] | None:
    """The task's scorer, and what its module evaluates text with: "python", "sympy" or ""."""
    import inspect

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        return None
    source = inspect.getsource(sys.modules[DATASETS[task][0].__module__])
    evaluator = "sympy" if _SYMPY.search(source) else "python" if _PYTHON.search(source) else ""
    return reasoning_gym.get_score_answer_fn(task), evaluator


def _harmless(answer: str, evaluator: str) -> bool:
    """Whether evaluating the answer can do no more than compute: nothing is called but functions of mathematics, no
    attribute is taken, and sympy (which evaluates the text in a text) gets no text."""
    if not evaluator:
        return True
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (RecursionError, MemoryError):
        return False
    except (SyntaxError, ValueError):
        # Python won't read it either, but sympy has forms of its own (3!, 0.[3]), in which a call could hide.
        names = [name for name in _NAME.findall(answer) if len(name) > 1 and name not in _FUNCTIONS]
        return evaluator == "python" or not (names or re.search(r"['\"\\]|__", answer))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            return False
        if isinstance(node, ast.Call):
            known = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            if evaluator == "python" or not known:
                return False
        if evaluator == "sympy" and isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            return False
    return True


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
