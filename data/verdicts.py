"""Verdicts: every check on every trace, in processes that can be killed, and what they amount to together."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from r1distill.data import cluster, schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.data.settings import CHECKS, CheckName, VerdictSettings
from r1distill.data.verify import agreement, filters, pool, sandbox, verifiers
from r1distill.data.verify import judge as judges
from r1distill.data.verify.check import Finding, failed, passed, unverifiable
from r1distill.data.verify.findings import Findings, content_key, finding_key, rule_key
from r1distill.data.verify.judge import Judge, JudgeRequest
from r1distill.data.verify.verifiers import Item, correctness

MAY_HANG: tuple[CheckName, ...] = ("correctness", "agreement")
TRACES_PER_BATCH = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Judged:
    """An item with its VERDICT rows, one a check, and what they come to: ``reason`` is "check: reason", or ""."""

    item: Item
    verdicts: list[dict[str, Any]]
    outcome: str
    reason: str
    kept: bool


Wanted = tuple[Item, Sequence[CheckName]]
Found = tuple[Item, dict[CheckName, Finding]]
Examine = Callable[[VerdictSettings, Iterable[Wanted]], Generator[Found, None, None]]


def item(prompt: dict[str, Any] | None, trace: dict[str, Any]) -> Item:
    """A row of the traces table with the row of the prompts table that it answers (None: there is no such prompt)."""
    about = prompt or {}
    return Item(
        prompt_id=trace["prompt_id"],
        sample=trace["sample"],
        question=about.get("question") or "",
        completion=trace["completion"] or "",
        reasoning=trace["reasoning"],
        response=trace["response"] or "",
        state=trace["state"],
        finish_reason=trace["finish_reason"],
        error=trace["error"],
        reference_answer=about.get("reference_answer"),
        verifier=about.get("verifier") or "",
        verifier_args=about.get("verifier_args") or "{}",
        domain=about.get("domain") or "",
        problem="" if prompt else "the trace answers no known prompt",
        completion_tokens=trace["completion_tokens"],
    )


def judge(settings: VerdictSettings, items: Iterable[Item]) -> Generator[Judged, None, None]:
    """Judge items in their order, a bounded number at a time; an item whose check hangs or dies is unverifiable."""
    for one, findings in _examined(settings, ((one, CHECKS) for one in items)):
        yield _judged(settings, one, findings)


def _examined(settings: VerdictSettings, wanted: Iterable[Wanted]) -> Generator[Found, None, None]:
    """Run some checks on each item, in processes that can be killed."""
    inputs = ((one, checks, settings) for one, checks in wanted)
    for (one, checks, _), findings in pool.ordered(_examine, inputs, workers(settings), _seconds):
        if isinstance(findings, str):  # filters are quick: what hung or died was the verifier
            others = _examine(one, [check for check in checks if check not in MAY_HANG], settings)
            findings = others | {check: unverifiable(findings) for check in checks if check in MAY_HANG}
        yield one, findings


def workers(settings: VerdictSettings) -> int:
    """How many processes check: as the settings say, else one for each core, at most 16."""
    return settings.workers or min(16, os.cpu_count() or 1)


def _seconds(one: Item, checks: Sequence[CheckName], settings: VerdictSettings) -> float:
    return verifiers.seconds(one, settings)


def _examined_on_ray(settings: VerdictSettings, wanted: Iterable[Wanted]) -> Generator[Found, None, None]:
    """The same on the connected Ray cluster."""
    for batch in cluster.ordered(_examine_batch, _batches(wanted), settings):
        yield from batch


def _examine_batch(batch: list[Wanted], settings: VerdictSettings) -> list[Found]:
    """On a worker of the cluster, which has one core."""
    return list(_examined(settings.model_copy(update={"workers": 1}), batch))


def _examine(one: Item, checks: Sequence[CheckName], settings: VerdictSettings) -> dict[CheckName, Finding]:
    return {check: _check(one, check, settings) for check in checks}


def _check(one: Item, check: CheckName, settings: VerdictSettings) -> Finding:
    """One check on one item; what never came back fails in its format alone."""
    if one.problem:
        return unverifiable(one.problem)
    if one.state in ("failed", "refused"):
        reason = "the request failed" if one.state == "failed" else "the teacher refused"
        return failed(reason, (one.error or "")[:200]) if check == "format" else unverifiable("there is no answer")
    text = f"{one.reasoning or ''}\n\n{one.response}" if one.reasoning or one.response else one.completion
    limits = settings.limits
    match check:
        case "format":
            return filters.form(one.completion, one.reasoning, one.response, one.domain, limits)
        case "truncation":
            return filters.truncation(one.completion, one.reasoning, one.response, one.finish_reason, one.state)
        case "repetition":
            return filters.repetition(text, limits)
        case "language":
            return filters.language(one.question, text, limits)
        case "correctness":
            return correctness(one, settings)
        case "agreement":
            if one.verifier != "math":
                return passed("answers of this kind are not compared")
            return agreement.examine(one.reasoning, one.response, one.question)


def _judged(settings: VerdictSettings, one: Item, findings: Mapping[CheckName, Finding]) -> Judged:
    rows = [
        {
            "prompt_id": one.prompt_id,
            "sample": one.sample,
            "check": check,
            "outcome": findings[check].outcome,
            "reason": findings[check].reason or None,
            "detail": findings[check].detail or None,
            "version": _version(one, check),
        }
        for check in CHECKS
    ]
    outcome, reason = overall(settings.required, rows)
    lenient = one.domain in settings.keep_unverified and not one.problem
    return Judged(one, rows, outcome, reason, outcome == "pass" or (outcome == "unverifiable" and lenient))


def _version(one: Item, check: CheckName) -> str:
    if check == "correctness":
        return verifiers.version(one)
    return agreement.VERSION if check == "agreement" else filters.VERSION


def overall(required: Sequence[str], verdicts: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """(outcome, "check: reason"): fail if a required check fails, else unverifiable if one is, else pass."""
    rows = [row for row in verdicts if row["check"] in required]
    for outcome in ("fail", "unverifiable"):
        for row in rows:
            if row["outcome"] == outcome:
                return outcome, f"{row['check']}: {row['reason']}"
    return "pass", ""


# What of the settings decides each check, beside the item itself; a finding is kept under these and its version.
_RULES: dict[CheckName, tuple[str, ...]] = {
    "format": ("limits.code_in_thinking", "limits.max_paragraph_characters"),
    "truncation": (),
    "correctness": ("timeout_seconds",),
    "agreement": ("timeout_seconds",),
    "repetition": ("limits.max_repeated_share",),
    "language": ("limits.max_foreign_words", "limits.min_target_share"),
}
_CONTENT = [field.name for field in fields(Item) if field.name not in ("prompt_id", "sample", "completion_tokens")]


def build(
    settings: VerdictSettings,
    prompts: Path,
    traces: Path,
    out: Path,
    home: Path,
    *,
    judge: Judge | None = None,
    ray_address: str | None = None,
) -> Result:
    """Write the VERDICT table: read = traces, kept = those that pass (or may be kept unverified), rejected by reason.

    Findings are kept under ``home/findings``: no check is run again that a killed run, or one with other policies, has
    made. The first pass over the traces makes what is missing, on the Ray cluster at ``ray_address`` if there is one;
    then the ``judge`` settles what the settings leave to a judge; the last pass writes the table. Raises RequestError
    where generated code is to be run and there is no sandbox.
    """
    table, asked = schema.read(traces, schema.TRACE), _Prompts(prompts)
    if "code" in asked.verifiers:
        sandbox.require()

    def items() -> Iterator[Item]:
        return (item(asked[row["prompt_id"]], row) for row in schema.rows(table))

    with Findings(home / "findings") as findings:
        with cluster.connected(ray_address) if ray_address else nullcontext():
            examined = _examined_on_ray if ray_address else _examined
            _make_missing(settings, CHECKS, items(), table.num_rows, findings, examined)
        if settings.judge and judge is None:
            raise R1DistillError("the verdicts' settings name a judge, and there is nobody to ask it: pass judge.")
        if judge:
            _settle(settings, items(), findings, judge)
        return _written(settings, items(), findings, out, judge)


def examine(
    settings: VerdictSettings, checks: Sequence[CheckName], items: Callable[[], Iterable[Item]], count: int, home: Path
) -> Generator[Found, None, None]:
    """Some checks on each item, in order, as ``home/findings`` has them; what it lacks is made first.

    ``items`` are gone through twice, a batch in memory at a time; there are ``count`` of them, for the progress bar.
    """
    with Findings(home / "findings") as findings:
        _make_missing(settings, checks, items(), count, findings, _examined)
        keys = _Keys(settings, checks)
        for batch in _batches(items()):
            found = [keys(one) for one in batch]
            known = findings.known(key for each in found for key in each.values())
            for one, each in zip(batch, found, strict=True):
                yield one, {check: known[key] for check, key in each.items()}


def _make_missing(
    settings: VerdictSettings,
    checks: Sequence[CheckName],
    items: Iterable[Item],
    count: int,
    findings: Findings,
    examine: Examine,
) -> None:
    from tqdm import tqdm

    keys = _Keys(settings, checks)
    under_way: deque[dict[CheckName, bytes]] = deque()  # in the order in which they come back
    with tqdm(total=count, disable=None, delay=2, desc="verdicts", unit=" traces") as progress:

        def missing() -> Iterator[Wanted]:
            for batch in _batches(items):
                found = [keys(one) for one in batch]
                known = findings.known(key for each in found for key in each.values())
                for one, each in zip(batch, found, strict=True):
                    if lacking := [check for check, key in each.items() if key not in known]:
                        under_way.append(each)
                        yield one, lacking
                    else:
                        progress.update()

        with closing(examine(settings, missing())) as examined:
            for batch in _batches(examined):
                made = [(under_way.popleft(), found) for _, found in batch]
                findings.add({each[check]: finding for each, found in made for check, finding in found.items()})
                progress.update(len(batch))


def _judged_before(settings: VerdictSettings, items: Iterable[Item], findings: Findings) -> Iterator[Judged]:
    """What the verifiers' findings, all of which are there, say of the items."""
    keys = _Keys(settings)
    for batch in _batches(items):
        found = [keys(one) for one in batch]
        known = findings.known(key for each in found for key in each.values())
        for one, each in zip(batch, found, strict=True):
            yield _judged(settings, one, {check: known[key] for check, key in each.items()})


def _settle(settings: VerdictSettings, items: Iterable[Item], findings: Findings, judge: Judge) -> None:
    """Ask the judge about every trace that is open to it and keep its finding as it comes; no reply is no finding."""
    waiting: deque[Item] = deque()

    def requests() -> Iterator[JudgeRequest]:
        for judged in _judged_before(settings, items, findings):
            one = judged.item
            if _open(settings, judged) and not findings.known([_judge_key(one, judge)]):
                waiting.append(one)
                yield JudgeRequest(
                    one.prompt_id, one.sample, judges.messages(one.question, one.reference_answer, one.response)
                )

    coming = requests()
    for reply in judge.ask(coming):
        one = waiting.popleft()
        if reply is not None:
            findings.add({_judge_key(one, judge): judges.read(reply)})
    if waiting or any(coming):
        raise R1DistillError("the judge's replies ended before its requests did. Run the same command again.")


def _open(settings: VerdictSettings, judged: Judged) -> bool:
    """Whether the judge is asked: where nothing speaks against a trace and its correctness alone is open."""
    one = judged.item
    if settings.judge is None or one.domain not in settings.judge.domains or judged.outcome != "unverifiable":
        return False
    outcomes = {row["check"]: row["outcome"] for row in judged.verdicts}
    return outcomes["correctness"] == "unverifiable" and not one.problem and bool(one.response.strip())


def _written(
    settings: VerdictSettings, items: Iterable[Item], findings: Findings, out: Path, judge: Judge | None
) -> Result:
    """The table and its account, from findings that are all there."""
    rejected: Counter[str] = Counter()
    checks = {check: Counter[str]() for check in CHECKS}
    kept = 0
    with schema.writing(out, schema.VERDICT) as writer:
        for judged in _judged_before(settings, items, findings):
            if judge and _open(settings, judged):
                judged = _settled(settings, judged, findings, judge)
            kept += judged.kept
            rejected[judged.reason] += not judged.kept
            for row in judged.verdicts:
                checks[row["check"]][row["outcome"]] += 1
                writer.append(row)
    metrics = {"checks": {check: dict(counts) for check, counts in checks.items()}}
    return Result(kept + rejected.total(), kept, dict(+rejected), metrics, unit="traces")


def _settled(settings: VerdictSettings, judged: Judged, findings: Findings, judge: Judge) -> Judged:
    """With the judge's finding in the place of the verifier's."""
    key = _judge_key(judged.item, judge)
    finding = findings.known([key]).get(key) or judges.read(None)
    rows = {row["check"]: row for row in judged.verdicts}
    made = {check: Finding(row["outcome"], row["reason"] or "", row["detail"] or "") for check, row in rows.items()}
    settled = _judged(settings, judged.item, {**made, "correctness": finding})
    for row in settled.verdicts:
        if row["check"] == "correctness":
            row["version"] = f"{judges.VERSION}, {judge.name}"
    return settled


class _Keys:
    """Under what each check's finding on an item is kept."""

    def __init__(self, settings: VerdictSettings, checks: Sequence[CheckName] = CHECKS):
        self._settings, self._checks = settings, checks
        self._rules: dict[tuple[CheckName, str], bytes] = {}

    def __call__(self, one: Item) -> dict[CheckName, bytes]:
        content = _content(one)
        return {check: finding_key(content, self._rule(check, one)) for check in self._checks}

    def _rule(self, check: CheckName, one: Item) -> bytes:
        if (check, one.verifier) not in self._rules:
            values: list[Any] = [attrgetter(name)(self._settings) for name in _RULES[check]]
            if check == "correctness" and one.verifier == "code":
                values.append(self._settings.code.model_dump(mode="json"))
            self._rules[check, one.verifier] = rule_key(check, _version(one, check), *values)
        return self._rules[check, one.verifier]


def _judge_key(one: Item, judge: Judge) -> bytes:
    return finding_key(_content(one), rule_key("judge", judges.VERSION, judge.name, judge.identity))


def _content(one: Item) -> bytes:
    return content_key(*(getattr(one, name) for name in _CONTENT))


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(things)
    while batch := list(islice(iterator, TRACES_PER_BATCH)):
        yield batch


class _Prompts:
    """Prompts by id, over the memory-mapped table: only ids and positions are held."""

    def __init__(self, folder: Path):
        self._table = schema.read(folder, schema.PROMPT)
        self._at = {key: place for place, key in enumerate(self._table["prompt_id"].to_pylist())}
        self._last: dict[str, Any] | None = None
        self.verifiers = set(self._table["verifier"].unique().to_pylist())

    def __getitem__(self, prompt_id: str) -> dict[str, Any] | None:
        if self._last is None or self._last["prompt_id"] != prompt_id:  # a prompt's traces stand together
            place = self._at.get(prompt_id)
            self._last = None if place is None else self._table.slice(place, 1).to_pylist()[0]
        return self._last
