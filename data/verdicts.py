"""Verdicts: every check on every trace, in processes that can be killed, and what they amount to together."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1distill.data import schema, sources
from r1distill.data.config import nearest
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.data.settings import CHECKS, CheckName, VerdictSettings
from r1distill.data.thinking import CLOSE, OPEN, split_thinking
from r1distill.data.verify import filters, math, pool
from r1distill.data.verify.check import Finding, failed, unverifiable

VERSIONS = dict.fromkeys(CHECKS, filters.VERSION) | {"correctness": math.VERSION}
TRACES_PER_CHUNK = 256

VERIFIERS = {"math": math.examine}  # name → (response, reference, question) → Finding


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


@dataclass(frozen=True)
class Judged:
    """An item with its VERDICT rows, one a check, and what they come to: ``reason`` is "check: reason", or ""."""

    item: Item
    verdicts: list[dict[str, Any]]
    outcome: str
    reason: str
    kept: bool


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
    )


def judge(settings: VerdictSettings, items: Iterable[Item]) -> Generator[Judged, None, None]:
    """Judge items in their order, a bounded number at a time; an item whose check hangs or dies is unverifiable."""
    workers = settings.workers or min(16, os.cpu_count() or 1)
    for one, findings in pool.ordered(_examine, ((one, settings) for one in items), workers, settings.timeout_seconds):
        if isinstance(findings, str):
            findings = {**_filtered(one[0], settings), "correctness": unverifiable(findings)}
        yield _judged(settings, one[0], findings)


def _examine(one: Item, settings: VerdictSettings) -> dict[str, Finding]:
    return {**_filtered(one, settings), "correctness": _correctness(one)}


def _correctness(one: Item) -> Finding:
    if one.problem:
        return unverifiable(one.problem)
    if one.state in ("failed", "refused"):
        return unverifiable("there is no answer to judge")
    verifier = VERIFIERS.get(one.verifier)
    if verifier is None:
        return unverifiable("no verifier of this name", one.verifier)
    if one.reference_answer is None or not one.reference_answer.strip():
        return unverifiable("no reference answer")
    return verifier(one.response, one.reference_answer, one.question)


def _filtered(one: Item, settings: VerdictSettings) -> dict[str, Finding]:
    """The checks of form; what never came back fails in its format alone."""
    if one.problem:
        return {check: unverifiable(one.problem) for check in CHECKS}
    if one.state in ("failed", "refused"):
        reason = "the request failed" if one.state == "failed" else "the teacher refused"
        none: dict[str, Finding] = dict.fromkeys(CHECKS, unverifiable("there is no text"))
        return none | {"format": failed(reason, (one.error or "")[:200])}
    text = f"{one.reasoning or ''}\n\n{one.response}" if one.reasoning or one.response else one.completion
    limits = settings.limits
    return {
        "format": filters.form(one.completion, one.reasoning, one.response, one.domain, limits),
        "truncation": filters.truncation(one.completion, one.reasoning, one.response, one.finish_reason, one.state),
        "repetition": filters.repetition(text, limits),
        "language": filters.language(one.question, text, limits),
    }


def _judged(settings: VerdictSettings, one: Item, findings: dict[str, Finding]) -> Judged:
    rows = [
        {
            "prompt_id": one.prompt_id,
            "sample": one.sample,
            "check": check,
            "outcome": findings[check].outcome,
            "reason": findings[check].reason or None,
            "detail": findings[check].detail or None,
            "version": VERSIONS[check],
        }
        for check in CHECKS
    ]
    outcome, reason = overall(settings.required, rows)
    kept = outcome == "pass" or (
        outcome == "unverifiable" and one.domain in settings.keep_unverified and not one.problem
    )
    return Judged(one, rows, outcome, reason, kept)


def overall(required: Sequence[str], verdicts: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """(outcome, "check: reason"): fail if a required check fails, else unverifiable if one is, else pass."""
    rows = [row for row in verdicts if row["check"] in required]
    for outcome in ("fail", "unverifiable"):
        for row in rows:
            if row["outcome"] == outcome:
                return outcome, f"{row['check']}: {row['reason']}"
    return "pass", ""


def build(settings: VerdictSettings, prompts: Path, traces: Path, out: Path) -> Result:
    """Write the VERDICT table: read = traces, kept = those that pass (or may be kept unverified), rejected by reason.

    Judged in chunks, each of which is on disk before the next is counted done: a killed run judges no chunk twice.
    """
    from tqdm import tqdm

    table = schema.read(traces, schema.TRACE)
    work = out / ".work"
    starts = range(0, table.num_rows, TRACES_PER_CHUNK)
    missing = {start for start in starts if _chunk(work, start) is None}
    pieces = (table.slice(start, TRACES_PER_CHUNK) for start in sorted(missing))
    asked = _Prompts(prompts)
    items = (item(asked[row["prompt_id"]], row) for piece in pieces for row in schema.rows(piece))
    progress = tqdm(total=table.num_rows, disable=None, delay=2, desc="verdicts", unit=" traces")
    with progress, closing(judge(settings, items)) as judged:
        for start in starts:
            if start in missing:
                _save(work, start, list(islice(judged, TRACES_PER_CHUNK)))
            progress.update(min(TRACES_PER_CHUNK, table.num_rows - start))
    return _assembled(work, starts, out)


def _assembled(work: Path, starts: Iterable[int], out: Path) -> Result:
    """The table and the account of all chunks."""
    rejected: Counter[str] = Counter()
    checks = {check: Counter[str]() for check in CHECKS}
    kept = 0
    with schema.writing(out, schema.VERDICT) as writer:
        for start in starts:
            chunk = _chunk(work, start) or {}
            kept += chunk["kept"]
            rejected.update(chunk["rejected"])
            for row in chunk["verdicts"]:
                checks[row["check"]][row["outcome"]] += 1
                writer.append(row)
    metrics = {"checks": {check: dict(counts) for check, counts in checks.items()}}
    return Result(kept + rejected.total(), kept, dict(rejected), metrics, unit="traces")


class _Prompts:
    """Prompts by id, over the memory-mapped table: only ids and positions are held."""

    def __init__(self, folder: Path):
        self._table = schema.read(folder, schema.PROMPT)
        self._at = {key: place for place, key in enumerate(self._table["prompt_id"].to_pylist())}

    def __getitem__(self, prompt_id: str) -> dict[str, Any] | None:
        place = self._at.get(prompt_id)
        return None if place is None else self._table.slice(place, 1).to_pylist()[0]


def _save(work: Path, start: int, judged: list[Judged]) -> None:
    chunk = {
        "kept": sum(one.kept for one in judged),
        "rejected": Counter(one.reason for one in judged if not one.kept),
        "verdicts": [row for one in judged for row in one.verdicts],
    }
    work.mkdir(parents=True, exist_ok=True)
    fresh = work / f"{start}.new"
    with fresh.open("w", encoding="utf-8") as handle:
        json.dump(chunk, handle)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.rename(work / f"{start}.json")


def _chunk(work: Path, start: int) -> dict[str, Any] | None:
    """A finished chunk, or None."""
    file = work / f"{start}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


# What `r1distill verify` writes: one row for each row of its input.
COLUMNS: tuple[CheckName, ...] = ("correctness", "format", "truncation", "repetition", "language")
VERIFIED = pa.schema(
    [("row", pa.int64()), ("outcome", pa.string()), ("reason", pa.string()), *((name, pa.string()) for name in COLUMNS)]
)
_OURS = ("prompt", "completion", "reasoning", "response", "reference_answer", "finish_reason", "domain", "verifier")
_ROWS_PER_BATCH = 1024


def verify_file(
    input: Path, out: Path, columns: dict[str, str], verifier: str, settings: VerdictSettings
) -> dict[str, Any]:
    """Judge the rows of a JSONL(.gz) or Parquet file or a ``datasets`` folder into ``out/verdicts.parquet``, in order.

    ``columns`` maps ours (prompt, completion, or reasoning and response, reference_answer, finish_reason, domain,
    verifier) to the file's; those that are not mapped are looked for under our name. A row that can't be read is
    unverifiable. Returns {"rows", "outcomes", "checks": {check: {outcome: rows}}, "reasons": {reason: rows}}.
    Raises RequestError where the file as a whole, or a column that was asked for, is not there.
    """
    rows = _known_columns(input, columns)
    names = {ours: columns.get(ours, ours) for ours in _OURS}
    items = (_recorded(number, row, names, verifier) for number, row in enumerate(rows))
    checks: dict[str, Counter[str]] = {name: Counter() for name in COLUMNS}
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with _writing(out) as write:
        for judged in judge(settings, items):
            found = {row["check"]: row["outcome"] for row in judged.verdicts}
            write({"row": judged.item.sample, "outcome": judged.outcome, "reason": judged.reason or None, **found})
            outcomes[judged.outcome] += 1
            reasons[judged.reason] += bool(judged.reason)
            for name in COLUMNS:
                checks[name][found[name]] += 1
    return {
        "rows": outcomes.total(),
        "outcomes": dict(outcomes),
        "checks": {name: dict(counts) for name, counts in checks.items()},
        "reasons": dict(+reasons),
    }


def _known_columns(input: Path, columns: dict[str, str]) -> Iterator[dict[str, Any] | str]:
    """The file's rows, once its first hundred have shown the columns that were asked for."""
    for ours in columns:
        if ours not in _OURS:
            raise RequestError(f"--columns: there is no column '{ours}' of ours.{nearest(ours, _OURS)}")
    if not input.exists():
        raise RequestError(
            f"{input} is not there. Expected a .jsonl, .jsonl.gz or .parquet file, or a datasets folder."
        )
    rows = sources.file_rows(input)
    first = list(islice(rows, 100))
    if not first:
        raise RequestError(f"{input} holds no rows. Expected at least one.")
    there = {name: None for row in first if isinstance(row, dict) for name in row}
    text = [columns.get(ours, ours) for ours in ("completion", "response")]
    for theirs in (*columns.values(), *([] if set(text) & there.keys() else text[:1])):
        if there and theirs not in there:
            raise RequestError(
                f"{input} has no column '{theirs}'.{nearest(theirs, list(there))} It has: {', '.join(there)}. "
                "Name yours: --columns prompt=…,completion=…,reference_answer=…"
            )
    return chain(first, rows)


def _recorded(number: int, row: dict[str, Any] | str, names: dict[str, str], verifier: str) -> Item:
    """A row of a file as an item; numbered by ``sample``. Recorded R1 text begins inside the thinking."""
    values = {ours: row.get(theirs) for ours, theirs in names.items()} if isinstance(row, dict) else {}
    if problem := row if isinstance(row, str) else _problem(values):
        return Item("", number, "", "", None, "", problem=problem)
    completion = values["completion"]
    if completion is None:
        thinking = f"{OPEN}{values['reasoning']}{CLOSE}" if values["reasoning"] is not None else ""
        completion = thinking + (values["response"] or "")
    reasoning, response = split_thinking(completion, opened=True)
    reference = values["reference_answer"]
    return Item(
        prompt_id="",
        sample=number,
        question=values["prompt"] or "",
        completion=completion,
        reasoning=reasoning,
        response=response,
        finish_reason=values["finish_reason"],
        reference_answer=None if reference is None or reference != reference else str(reference),  # NaN is no answer
        verifier=values["verifier"] or verifier,
        domain=values["domain"] or "math",
    )


def _problem(values: dict[str, Any]) -> str:
    """Why the values of a row can't be judged, or ""."""
    if values["completion"] is None and values["response"] is None:
        return "completion is missing"
    for name, value in values.items():
        allowed = (str, int, float) if name == "reference_answer" else str
        if value is not None and not isinstance(value, allowed):
            return f"{name} is {type(value).__name__}, expected text"
    return ""


@contextmanager
def _writing(out: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write rows of VERIFIED a batch at a time; ``out/verdicts.parquet`` appears when all of them are in it."""
    fresh, final = out / ".verdicts.parquet.new", out / "verdicts.parquet"
    pending: list[dict[str, Any]] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        final.unlink(missing_ok=True)  # of an earlier input
        with pq.ParquetWriter(fresh, VERIFIED, compression="zstd") as table:

            def write(row: dict[str, Any]) -> None:
                pending.append(row)
                if len(pending) == _ROWS_PER_BATCH:
                    table.write_batch(pa.RecordBatch.from_pylist(pending, schema=VERIFIED))
                    pending.clear()

            yield write
            table.write_batch(pa.RecordBatch.from_pylist(pending, schema=VERIFIED))
        fresh.rename(final)
    except OSError as error:
        raise R1DistillError(f"{final} can't be written: {error}.") from error
    finally:
        fresh.unlink(missing_ok=True)
