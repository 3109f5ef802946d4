"""The dataset stage: the selected traces as messages, split by prompt, as Arrow for us and Parquet for others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from r1distill.data import cards, parquet, schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.data.selection import choose, removed
from r1distill.data.settings import Selection, VerdictSettings

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
    about = {row["prompt_id"]: row for row in schema.rows(schema.read(prompts, schema.PROMPT), ABOUT)}
    domains = {key: row["domain"] for key, row in about.items()}
    choice = choose(settings, rules, trace_table, verdicts, domains)
    facts = cards.Facts(title=title, lineage=lineage, keep_unverified=rules.keep_unverified)
    kept: Counter[str] = Counter()
    writers = {name: schema.TableWriter(out / name, schema.TRAINING_ROW) for name in SPLITS}
    for trace in schema.rows(trace_table):
        if (trace["prompt_id"], trace["sample"]) in choice.chosen:
            row = training_row(trace, about[trace["prompt_id"]], choice.pass_rates.get(trace["prompt_id"]))
            split = split_of(trace["prompt_id"], settings.validation_share)
            writers[split].append(row)
            kept[split] += 1
            facts.add(row, trace)
    for writer in writers.values():
        writer.close()
    if not kept.total():
        raise R1DistillError(
            f"no trace was selected: {dict(choice.rejected)}. Look at them: r1distill inspect {traces}"
        )
    schema.write_splits(out, list(SPLITS))
    _write_parquet(out)
    facts.rejected, facts.removed = choice.rejected, removed(verdicts)
    facts.prompts, facts.splits = _account(prompts), [name for name in SPLITS if kept[name]]
    (out / "README.md").write_text(facts.card(), encoding="utf-8")
    metrics = {
        "splits": dict(kept),
        "prompts": len({key for key, _ in choice.chosen}),
        "completion_tokens": facts.tokens,
    }
    return Result(trace_table.num_rows, kept.total(), dict(choice.rejected), metrics, unit="traces")


ABOUT = ["prompt_id", "domain", "source", "license"]


def split_of(prompt_id: str, validation_share: float) -> str:
    """The split of a prompt: all its traces share it, and it stays as others come and go."""
    point = int(hashlib.sha256(f"split:{prompt_id}".encode()).hexdigest()[:8], 16) / 2**32
    return "validation" if point < validation_share else "train"


def training_row(trace: dict[str, Any], about: dict[str, Any], pass_rate: float | None) -> dict[str, Any]:
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
        "pass_rate": pass_rate,
    }


def _account(artifact: Path) -> dict[str, int]:
    """What became of the rows that an artifact's stage read, by its manifest."""
    file = artifact / "manifest.json"
    if not file.is_file():
        return {}
    manifest = json.loads(file.read_text(encoding="utf-8"))
    return {
        "kept": manifest["kept"],
        **{f"not kept: {reason}": count for reason, count in manifest["rejected"].items()},
    }


def _write_parquet(out: Path) -> None:
    for name in SPLITS:  # an empty split makes no file, and is not in the card: the Hub's viewer would fail on it
        table = schema.read(out / name, schema.TRAINING_ROW)
        parquet.write(table.to_batches(parquet.ROWS_PER_GROUP), schema.TRAINING_ROW, out / "parquet", name)
