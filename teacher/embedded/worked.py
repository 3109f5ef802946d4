"""Worked solutions to the small numeric tasks that the embedded teacher learns.

Every task is a reasoning-gym generator whose answers are plain integers. A worked solution is the completion that
follows the generation prompt's ``<think>`` line: a step a line, the closing tag, one sentence with the boxed answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Item = Mapping[str, Any]


def _finish(lines: list[str], answer: int) -> str:
    """Join the steps and close them with the response."""
    steps = "\n".join(lines)
    return f"{steps}\n</think>\n\nThe answer is \\boxed{{{answer}}}."


def _chain_sum(item: Item) -> str:
    """Work from left to right, one running result a line."""
    first, *rest = str(item["metadata"]["expression"]).split()
    total = int(first)
    lines: list[str] = []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        if sign not in "+-":
            raise ValueError(f"unexpected operator in chain_sum: {sign!r}")
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return _finish(lines, total)


def _leg_counting(item: Item) -> str:
    """Multiply for each animal, then add the products up."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    lines: list[str] = []
    legs: list[int] = []
    for name, count in item["metadata"]["animals"].items():
        legs.append(count * ANIMALS[name])
        lines.append(f"{name}: {count} * {ANIMALS[name]} = {legs[-1]}")
    total = legs[0]
    for more in legs[1:]:
        lines.append(f"{total} + {more} = {total + more}")
        total += more
    return _finish(lines, total)


_SOLVERS: dict[str, Callable[[Item], str]] = {
    "chain_sum": _chain_sum,
    "leg_counting": _leg_counting,
}


def worked_solution(task: str, item: Item) -> str:
    """Return the completion text for one generated item.

    The result is checked against the item's own answer, so that a change in the
    generator cannot put a wrong solution into the training text.
    """
    if task not in _SOLVERS:
        raise KeyError(f"no worked solution for task {task!r}; have {sorted(_SOLVERS)}")
    text = _SOLVERS[task](item)
    ending = f"\\boxed{{{item['answer']}}}."
    if not text.endswith(ending):
        raise ValueError(f"worked solution disagrees with the answer: {text!r} {ending!r}")
    return text
