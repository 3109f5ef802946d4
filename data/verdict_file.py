"""Verdicts on traces that lie in a file: what `r1distill verify` does, one row for each row of its input."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1distill.data import sources
from r1distill.data.config import nearest
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import CheckName, VerdictSettings
from r1distill.data.thinking import CLOSE, OPEN, split_thinking
from r1distill.data.verdicts import judge
from r1distill.data.verify import sandbox
from r1distill.data.verify.verifiers import VERIFIERS, Item

# What `r1distill verify` writes: one row for each row of its input.
COLUMNS: tuple[CheckName, ...] = ("correctness", "format", "truncation", "repetition", "language", "agreement")
VERIFIED = pa.schema(
    [("row", pa.int64()), ("outcome", pa.string()), ("reason", pa.string()), *((name, pa.string()) for name in COLUMNS)]
)
_OURS = (
    "prompt",
    "completion",
    "reasoning",
    "response",
    "reference_answer",
    "finish_reason",
    "domain",
    "verifier",
    "verifier_args",
)
_ROWS_PER_BATCH = 1024


def verify(input: Path, out: Path, columns: dict[str, str], verifier: str, settings: VerdictSettings) -> dict[str, Any]:
    """Judge the rows of a JSONL(.gz) or Parquet file or a ``datasets`` folder into ``out/verdicts.parquet``, in order.

    ``columns`` maps ours (prompt, completion, or reasoning and response, reference_answer, finish_reason, domain,
    verifier, verifier_args: JSON or an object) to the file's; those that are not mapped are looked for under our name.
    A row that can't be read is unverifiable. Returns {"rows", "outcomes", "checks": {check: {outcome: rows}},
    "reasons": {reason: rows}}. Raises RequestError where the file as a whole, a column that was asked for, or the
    ``verifier`` or the sandbox that it needs, is not there.
    """
    if verifier not in VERIFIERS:
        raise RequestError(f"--verifier {verifier}: there is none of this name.{nearest(verifier, list(VERIFIERS))}")
    if verifier == "code":
        sandbox.require()
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
    reference, arguments = values["reference_answer"], values["verifier_args"]
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
        verifier_args=arguments if isinstance(arguments, str) else _as_json(arguments or {}),
        domain=values["domain"] or "math",
    )


def _as_json(arguments: dict[str, Any]) -> str:
    """An object column's value; Parquet gives every row all the keys that any row has, with nothing in them."""
    return json.dumps({key: value for key, value in arguments.items() if value is not None}, default=str)


def _problem(values: dict[str, Any]) -> str:
    """Why the values of a row can't be judged, or ""."""
    if values["completion"] is None and values["response"] is None:
        return "completion is missing"
    for name, value in values.items():
        allowed = {"reference_answer": (str, int, float), "verifier_args": (str, dict)}.get(name, (str,))
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
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
