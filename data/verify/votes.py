"""The vote among the answers to one question: which of them say the same, by the rules of the question's verifier."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from r1distill.data.verify import choice, math, pool
from r1distill.data.verify.verifiers import Item

SECONDS = 30  # for all answers to one question; math-verify can hang
_INTEGER = re.compile(r"-?\d{1,18}")

Ballot = tuple[str, tuple[str, ...]]  # a verifier's name and the different answers to one question


def answer(one: Item) -> str | None:
    """The final answer as the item's verifier reads it; None where there is none to vote with.

    What was cut off or refused does not vote, and programs have no answers that could be counted.
    """
    if one.state != "done" or one.problem:
        return None
    if one.verifier == "math":
        return math.answer_of(one.response, one.question)
    if one.verifier == "choice":
        return choice.letters_of(one.response, one.question, json.loads(one.verifier_args).get("choices"))
    return None


def groups(ballots: Iterable[Ballot], workers: int = 1) -> Iterator[list[int]]:
    """For each ballot, and for each of its answers, the place of the first answer that says the same.

    Formulas are compared in processes that can be killed; where that happens, only equal texts say the same.
    """
    waiting = list(ballots)
    hard = [ballot for ballot in waiting if _easy(ballot) is None]
    grouped = iter(pool.ordered(_compared, hard, min(workers, len(hard)), SECONDS)) if hard else iter(())
    for ballot in waiting:
        found = _easy(ballot)
        if found is None:
            _, result = next(grouped)
            found = list(range(len(ballot[1]))) if isinstance(result, str) else result
        yield found


def _easy(ballot: Ballot) -> list[int] | None:
    """What needs no process: one answer, letters, whole numbers ("016" is 16)."""
    verifier, answers = ballot
    if verifier != "math" or len(answers) < 2:
        return [answers.index(one) for one in answers]
    if all(_INTEGER.fullmatch(one) for one in answers):
        values = [int(one) for one in answers]
        return [values.index(value) for value in values]
    return None


def _compared(verifier: str, answers: Sequence[str]) -> list[int]:
    places: list[int] = []
    for place, one in enumerate(answers):
        heads = [head for head in dict.fromkeys(places) if math.compared(answers[head], one) is True]
        places.append(heads[0] if heads else place)
    return places
