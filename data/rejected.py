"""The traces that did not become training rows, with the reason against each: a second configuration of the dataset."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1distill.data import parquet, schema
from r1distill.data.dataset import ABOUT, SPLITS, training_row
from r1distill.data.selection import outcomes

NOT_SELECTED = "passed, and was not selected"

# A training row that is none, and why.
REJECTED_TRACE = pa.schema(
    [
        *schema.TRAINING_ROW,
        ("reason", pa.string()),  # the first check that stands against it, and why
        ("outcome", pa.string()),  # of all required checks: pass, fail, unverifiable
        ("state", pa.string()),  # done, truncated, refused
    ]
)


def write(prompts: Path, traces: Path, verdicts: Path, dataset: Path, out: Path) -> Counter[str]:
    """Write ``out/rejected-*.parquet`` and return how many rows there are for each reason.

    A request that failed brought no trace, and is left out.
    """
    rules = json.loads((verdicts / "manifest.json").read_text(encoding="utf-8"))["identity"]["decides"]["verdicts"]
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in _rows(prompts, traces, verdicts, dataset, rules["required"]):
            counts[row["reason"]] += 1
            yield row

    parquet.write(_batches(counted()), REJECTED_TRACE, out, "rejected")
    return counts


def _rows(prompts: Path, traces: Path, verdicts: Path, dataset: Path, required: list[str]) -> Iterator[dict[str, Any]]:
    about = {row["prompt_id"]: row for row in schema.rows(schema.read(prompts, schema.PROMPT), ABOUT)}
    chosen = {
        (row["prompt_id"], row["sample"])
        for split in SPLITS
        for row in schema.rows(schema.read(dataset / split, schema.TRAINING_ROW), ["prompt_id", "sample"])
    }
    table = schema.rows(schema.read(traces, schema.TRACE))
    for trace, (key, outcome, reason) in zip(table, outcomes(verdicts, required), strict=True):
        if key in chosen or trace["state"] == "failed" or key[0] not in about:
            continue
        why = reason if outcome != "pass" and reason else NOT_SELECTED
        row = training_row(trace, about[key[0]], None)
        yield {**row, "reason": why, "outcome": outcome, "state": trace["state"]}


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    iterator = iter(rows)
    while some := list(islice(iterator, parquet.ROWS_PER_GROUP)):
        yield pa.RecordBatch.from_pylist(some, schema=REJECTED_TRACE)
