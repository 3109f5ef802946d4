"""Selection: which of the passing traces go into the dataset, and why each of the others does not."""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import CHECKS, Band, Selection, VerdictSettings
from r1distill.data.verdicts import overall

Key = tuple[str, int]  # prompt_id, sample


@dataclass
class Choice:
    """The selected traces, the others counted by their reason, and the share of right traces of each prompt.

    ``pass_rates`` leaves out what was never judged right or wrong: traces that failed or are unverifiable.
    """

    chosen: set[Key] = field(default_factory=set)
    rejected: Counter[str] = field(default_factory=Counter)
    pass_rates: dict[str, float] = field(default_factory=dict)


def outcomes(verdicts: Path, required: Sequence[str] = CHECKS) -> Iterator[tuple[Key, str, str]]:
    """(key, outcome, first reason against it) of every trace over its required checks, in the order of the traces."""
    columns = ["prompt_id", "sample", "check", "outcome", "reason"]
    rows = schema.rows(schema.read(verdicts, schema.VERDICT), columns)
    for key, checks in itertools.groupby(rows, key=lambda row: (row["prompt_id"], row["sample"])):
        yield key, *overall(required, checks)


@dataclass(frozen=True)
class Removed:
    """What one check removed of the traces: all that fail it, and those that fail no other."""

    check: str
    traces: int
    alone: int


def removed(verdicts: Path) -> list[Removed]:
    """What each check removed, alone and together with others, in the order of the checks."""
    rows = schema.rows(schema.read(verdicts, schema.VERDICT), ["prompt_id", "sample", "check", "outcome"])
    failing: Counter[tuple[str, ...]] = Counter()
    for _, checks in itertools.groupby(rows, key=lambda row: (row["prompt_id"], row["sample"])):
        failing[tuple(row["check"] for row in checks if row["outcome"] == "fail")] += 1
    return [
        Removed(check, sum(count for names, count in failing.items() if check in names), failing[check,])
        for check in CHECKS
    ]


def choose(
    settings: Selection, rules: VerdictSettings, traces: pa.Table, verdicts: Path, domains: Mapping[str, str]
) -> Choice:
    """Select from a TRACE table by its VERDICT table; ``domains`` gives each prompt's. Read = chosen + rejected.

    A trace is held against, in this order: its verdicts, its prompt's band, what its prompt may give, the thinking of
    those before it, its domain's quota. Raises RequestError where a domain that has a proportion has no passing trace.
    """
    choice = Choice()
    passing = _passing(settings, rules, traces, verdicts, domains, choice)
    _keep_band(settings.pass_rate, passing, choice)
    for prompt_id, found in passing.items():
        best = found if settings.policy == "all" else heapq.nsmallest(settings.per_prompt, found)
        choice.chosen |= {(prompt_id, sample) for _, sample in best}
        choice.rejected["not selected"] += len(found) - len(best)
    if settings.near_duplicates:
        _drop_near_duplicates(settings.near_duplicates, traces, choice)
    if settings.proportions:
        _keep_proportions(settings.proportions, domains, choice)
    choice.rejected = +choice.rejected
    return choice


def _passing(
    settings: Selection,
    rules: VerdictSettings,
    traces: pa.Table,
    verdicts: Path,
    domains: Mapping[str, str],
    choice: Choice,
) -> dict[str, list[tuple[int, int]]]:
    """{prompt: [(what it is ranked by, sample)]} of the traces that passed; counts the others and the pass rates."""
    passing: dict[str, list[tuple[int, int]]] = {}
    judged: Counter[str] = Counter()
    right: Counter[str] = Counter()
    found = outcomes(verdicts, rules.required)
    for row in schema.rows(traces, ["prompt_id", "sample", "completion_tokens", "state"]):
        prompt_id, sample = row["prompt_id"], row["sample"]
        key, outcome, reason = next(found, (None, "", ""))
        if key != (prompt_id, sample):
            raise R1DistillError(f"{verdicts} judges other traces than it was made from. Delete it and run again.")
        judged[prompt_id] += outcome != "unverifiable" and row["state"] != "failed"  # which says nothing of the teacher
        right[prompt_id] += outcome == "pass"
        if outcome == "pass" or (outcome == "unverifiable" and domains.get(prompt_id) in rules.keep_unverified):
            length = (row["completion_tokens"] or 0) if settings.policy == "shortest" else 0
            passing.setdefault(prompt_id, []).append((length, sample))
        else:
            choice.rejected[reason] += 1
    choice.pass_rates = {prompt_id: right[prompt_id] / count for prompt_id, count in judged.items() if count}
    return passing


def _keep_band(band: Band | None, passing: dict[str, list[tuple[int, int]]], choice: Choice) -> None:
    """Take prompts outside the band out of ``passing``; one without a rate has no difficulty to judge by, and stays."""
    if band is None:
        return
    for prompt_id in [one for one in passing if one in choice.pass_rates]:
        rate = choice.pass_rates[prompt_id]
        if not band.min <= rate <= band.max:
            reason = "its prompt is too hard" if rate < band.min else "its prompt is too easy"
            choice.rejected[reason] += len(passing.pop(prompt_id))


def _drop_near_duplicates(threshold: float, traces: pa.Table, choice: Choice) -> None:
    """Of traces that think nearly the same text the first stays; numbers may differ, a slip makes no other text."""
    from r1distill.data.dedup import near_duplicates

    keys: list[Key] = []

    def thinkings() -> Iterator[str]:
        for row in schema.rows(traces, ["prompt_id", "sample", "reasoning"]):
            if (key := (row["prompt_id"], row["sample"])) in choice.chosen:
                keys.append(key)
                yield row["reasoning"] or ""

    keep, _ = near_duplicates(thinkings(), threshold, figures=False)
    for key, stays in zip(keys, keep, strict=True):
        if not stays:
            choice.chosen.discard(key)
            choice.rejected["near duplicate of another trace"] += 1


def _keep_proportions(proportions: Mapping[str, float], domains: Mapping[str, str], choice: Choice) -> None:
    """The largest selection in which the domains stand in these proportions; others than the named are left out.

    Who stays is decided by a hash of the key: the same traces as the selection grows, and no source before another.
    """
    by_domain: dict[str, list[Key]] = {}
    for key in choice.chosen:
        by_domain.setdefault(domains[key[0]], []).append(key)
    if missing := [name for name, weight in proportions.items() if weight and name not in by_domain]:
        raise RequestError(
            f"dataset.proportions wants traces of the domain {missing[0]}, and none passed. "
            f"Passed: { {name: len(keys) for name, keys in by_domain.items()} }. Add prompts, or take it out."
        )
    unit = min(len(by_domain[name]) / weight for name, weight in proportions.items() if weight)
    for name, keys in by_domain.items():
        room = int(unit * proportions.get(name, 0) + 1e-9)
        for key in sorted(keys, key=_lot)[room:]:
            choice.chosen.discard(key)
            choice.rejected["over its domain's quota"] += 1


def _lot(key: Key) -> str:
    return hashlib.sha256(f"quota:{key[0]}:{key[1]}".encode()).hexdigest()
