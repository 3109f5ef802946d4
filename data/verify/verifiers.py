"""Every way to tell whether an answer is right, by the name that a prompt gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from r1distill.data.settings import VerdictSettings
from r1distill.data.verify import choice, code, gym, judge, math
from r1distill.data.verify.check import Finding, unverifiable

KILL_SECONDS = 10  # beyond the time that a verifier keeps by itself


@dataclass(frozen=True)
class Item:
    """One trace to be judged, with what it has to answer to. ``reasoning`` is None where no thinking was found;
    ``problem`` says why there is nothing to judge (a damaged row)."""

    prompt_id: str
    sample: int
    question: str
    completion: str
    reasoning: str | None
    response: str
    state: str = "done"
    finish_reason: str | None = None
    error: str | None = None
    reference_answer: str | None = None
    verifier: str = "math"
    verifier_args: str = "{}"
    domain: str = "math"
    problem: str = ""
    completion_tokens: int | None = None  # as the server counts; no check looks at it


class Verifier(NamedTuple):
    """``examine`` gets the item and its verifier_args; ``version`` goes into each of its verdicts."""

    examine: Callable[[Item, dict[str, Any], VerdictSettings], Finding]
    version: str
    needs_reference: bool = True


def _math(one: Item, arguments: dict[str, Any], settings: VerdictSettings) -> Finding:
    return math.examine(one.response, one.reference_answer or "", one.question)


def _choice(one: Item, arguments: dict[str, Any], settings: VerdictSettings) -> Finding:
    return choice.examine(one.response, one.reference_answer or "", one.question, arguments.get("choices"))


def _code(one: Item, arguments: dict[str, Any], settings: VerdictSettings) -> Finding:
    return code.examine(one.response, arguments, settings.code)


def _reasoning_gym(one: Item, arguments: dict[str, Any], settings: VerdictSettings) -> Finding:
    return gym.examine(one.response, one.reference_answer, one.question, arguments)


def _judge(one: Item, arguments: dict[str, Any], settings: VerdictSettings) -> Finding:
    return unverifiable("no rule settles it")  # the judge does, where the settings name one


VERIFIERS = {
    "math": Verifier(_math, math.VERSION),
    "choice": Verifier(_choice, choice.VERSION),
    "code": Verifier(_code, code.VERSION, needs_reference=False),
    "reasoning_gym": Verifier(_reasoning_gym, gym.VERSION, needs_reference=False),
    "judge": Verifier(_judge, judge.VERSION, needs_reference=False),
}


def correctness(one: Item, settings: VerdictSettings) -> Finding:
    """Whether the response of an item is right. May hang: call it where it can be killed, after ``seconds``."""
    if one.problem:
        return unverifiable(one.problem)
    if one.state in ("failed", "refused"):
        return unverifiable("there is no answer to judge")
    verifier = VERIFIERS.get(one.verifier)
    if verifier is None:
        return unverifiable("no verifier of this name", one.verifier)
    if verifier.needs_reference and not (one.reference_answer or "").strip():
        return unverifiable("no reference answer")
    try:
        arguments = json.loads(one.verifier_args)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        return unverifiable("verifier_args is no JSON object", one.verifier_args[:100])
    return verifier.examine(one, arguments, settings)


def has_rule(name: str, reference_answer: str | None) -> bool:
    """Whether a rule can tell the right answers to a prompt with this verifier and reference from the wrong ones."""
    verifier = VERIFIERS.get(name)
    if verifier is None or name == "judge":
        return False
    return bool((reference_answer or "").strip()) or not verifier.needs_reference


def version(one: Item) -> str:
    """Of the item's verifier; "none" where no verifier has its name."""
    return VERIFIERS[one.verifier].version if one.verifier in VERIFIERS else "none"


def seconds(one: Item, settings: VerdictSettings) -> float:
    """The most that judging an item may take."""
    return settings.code.total_seconds + KILL_SECONDS if one.verifier == "code" else settings.timeout_seconds
