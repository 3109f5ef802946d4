"""The dataset stage: the selected traces as messages, split by prompt, as Arrow for us and Parquet for others."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from r1distill.data import cards, schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.data.settings import CHECKS, Selection, VerdictSettings
from r1distill.data.verdicts import overall

Key = tuple[str, int]
SPLITS = ("train", "validation")


def build(
    settings: Selection,
    rules: VerdictSettings,
    prompts: Path,
    traces: Path,
    verdicts: Path,
    out: Path,
    *,
    title: str,
    lineage: dict[str, Any],
) -> Result:
    """Write ``train`` and ``validation`` tables (TRAINING_ROW), their Parquet twins and the card.

    Counts are of traces: a trace that its verdicts rejected counts under their first reason, one that passed and was
    not needed under "not selected".
    """
    trace_table = schema.read(traces, schema.TRACE)
    about = {row["prompt_id"]: row for row in schema.rows(schema.read(prompts, schema.PROMPT), _ABOUT)}
    domains = {key: row["domain"] for key, row in about.items()}
    chosen, rejected = _choose(settings, rules, trace_table, verdicts, domains)
    facts = cards.Facts(title=title, lineage=lineage)
    kept: Counter[str] = Counter()
    writers = {name: schema.TableWriter(out / name, schema.TRAINING_ROW) for name in SPLITS}
    for trace in schema.rows(trace_table):
        if (trace["prompt_id"], trace["sample"]) in chosen:
            row = training_row(trace, about[trace["prompt_id"]])
            split = split_of(trace["prompt_id"], settings.validation_share)
            writers[split].append(row)
            kept[split] += 1
            facts.add(row, trace)
    for writer in writers.values():
        writer.close()
    if not kept.total():
        raise R1DistillError(
            f"no trace passed its verdicts: {dict(rejected)}. Look at them: r1distill inspect {traces}"
        )
    schema.write_splits(out, list(SPLITS))
    _write_parquet(out)
    facts.rejected = rejected
    (out / "README.md").write_text(facts.card(), encoding="utf-8")
    metrics = {"splits": dict(kept), "prompts": len({key for key, _ in chosen}), "completion_tokens": facts.tokens}
    return Result(trace_table.num_rows, kept.total(), dict(rejected), metrics, unit="traces")


_ABOUT = ["prompt_id", "domain", "source", "license"]


def outcomes_of(verdicts: Path, required: Sequence[str] = CHECKS) -> dict[Key, tuple[str, str]]:
    """(outcome, first reason against it) of every trace over its required checks."""
    columns = ["prompt_id", "sample", "check", "outcome", "reason"]
    rows = schema.rows(schema.read(verdicts, schema.VERDICT), columns)
    by_trace = itertools.groupby(rows, key=lambda row: (row["prompt_id"], row["sample"]))
    return {key: overall(required, checks) for key, checks in by_trace}


def _choose(
    settings: Selection, rules: VerdictSettings, traces: Any, verdicts: Path, domains: dict[str, str]
) -> tuple[set[Key], Counter[str]]:
    """The keys of the selected traces, and the reasons of all others."""
    outcomes = outcomes_of(verdicts, rules.required)
    passing: dict[str, list[tuple[int, int]]] = {}
    rejected: Counter[str] = Counter()
    for row in schema.rows(traces, ["prompt_id", "sample", "completion_tokens"]):
        outcome, reason = outcomes.get((row["prompt_id"], row["sample"]), ("unverifiable", "no verdict"))
        unruled = outcome == "unverifiable" and domains.get(row["prompt_id"]) in rules.keep_unverified
        if outcome == "pass" or unruled:
            length = (row["completion_tokens"] or 0) if settings.policy == "shortest" else 0
            passing.setdefault(row["prompt_id"], []).append((length, row["sample"]))
        else:
            rejected[reason] += 1
    chosen: set[Key] = set()
    for key, found in passing.items():
        best = found if settings.policy == "all" else heapq.nsmallest(settings.per_prompt, found)
        chosen |= {(key, sample) for _, sample in best}
        rejected["not selected"] += len(found) - len(best)
    return chosen, +rejected


def split_of(prompt_id: str, validation_share: float) -> str:
    """The split of a prompt: all its traces share it, and it stays as others come and go."""
    point = int(hashlib.sha256(f"split:{prompt_id}".encode()).hexdigest()[:8], 16) / 2**32
    return "validation" if point < validation_share else "train"


def training_row(trace: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """A trace as messages: exactly what the teacher was told, then its thinking and its response."""
    told = [message for message in json.loads(trace["request_text"]) if message["role"] == "user"][-1]["content"]
    return {
        "prompt_id": trace["prompt_id"],
        "sample": trace["sample"],
        "messages": [
            {"role": "user", "content": told, "thinking": None},
            {"role": "assistant", "content": trace["response"], "thinking": trace["reasoning"]},
        ],
        "domain": about["domain"],
        "source": about["source"],
        "license": about["license"],
        "completion_tokens": trace["completion_tokens"],
    }


def _write_parquet(out: Path) -> None:
    folder = out / "parquet"
    folder.mkdir(exist_ok=True)
    for name in SPLITS:
        table = schema.read(out / name, schema.TRAINING_ROW)
        if table.num_rows:  # an empty split would make the Hub's viewer fail
            pq.write_table(table, folder / f"{name}-00000-of-00001.parquet", compression="zstd")


def rows_of(dataset: Path, split: str) -> Iterator[dict[str, Any]]:
    """The training rows of one split of a dataset artifact."""
    yield from schema.rows(schema.read(dataset / split, schema.TRAINING_ROW))
