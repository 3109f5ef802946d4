"""The traces stage: every prompt asked as often as the settings say, and one row for each, whatever became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1distill.data import models, schema
from r1distill.data.errors import R1DistillError
from r1distill.data.prompts import user_message
from r1distill.data.result import Result
from r1distill.teacher import recorded
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.serve import serving, spec_of
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Teacher, VllmTeacher


def build(teacher: Teacher, prompts: Path, out: Path, home: Path, instruction: str | dict[str, str]) -> Result:
    """Write the TRACE table from what the ledger has, after asking for what it lacks.

    Counts are of (prompt, sample): kept are the answers that ended by themselves, the others are counted by state.
    Nothing is started where nothing is to be asked. Raises R1DistillError where more than ``max_failed_share`` failed:
    a rerun asks only for those again.
    """
    if isinstance(teacher, RecordedTeacher):
        return recorded.build(teacher, prompts, out)
    questions = Questions(schema.read(prompts, schema.PROMPT), teacher.sampling.samples, instruction)
    order = Order(questions, teacher.sampling, identity_of(teacher), teacher.opens_thinking)
    asked: dict[str, Any] = {"asked": 0}
    with Ledger(home / "ledger") as ledger:
        if pending(order, ledger):
            with serving(spec_of(teacher, home), home / "logs") as endpoint:
                asked = ask(order, endpoint, ledger, teacher.client, f"asking {teacher.name}")
        return _written(out, rows(order, ledger), teacher, asked)


def identity_of(teacher: VllmTeacher | EndpointTeacher) -> dict[str, Any]:
    """Who answers, as the ledger's keys and the rows' ``teacher_revision`` have it."""
    if isinstance(teacher, VllmTeacher):
        name = (
            None if isinstance(teacher.model, models.FolderModel) else models.title(teacher.model)
        )  # a path says nothing
        return {"model": name, "revision": models.revision(teacher.model)}
    return {"base_url": teacher.base_url, "model": teacher.model, "revision": teacher.revision}


@dataclass(frozen=True)
class Questions:
    """The requests of a prompts table, made anew each time they are gone through: they need not fit in memory."""

    prompts: pa.Table
    samples: int
    instruction: str | dict[str, str]

    def __len__(self) -> int:
        return int(self.prompts.num_rows * self.samples)

    def __iter__(self) -> Iterator[Request]:
        for row in schema.rows(self.prompts, ["prompt_id", "question", "domain"]):
            messages = [{"role": "user", "content": user_message(row, self.instruction)}]
            for sample in range(self.samples):
                yield Request(row["prompt_id"], sample, messages)


def _written(
    out: Path, traces: Iterator[dict[str, Any]], teacher: VllmTeacher | EndpointTeacher, asked: dict[str, Any]
) -> Result:
    states: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    tokens, cost = 0, 0
    with schema.writing(out, schema.TRACE) as table:
        for row in traces:
            states[row["state"]] += 1
            errors[row["error"] or ""] += row["state"] == "failed"
            tokens += row["completion_tokens"] or 0
            cost += row["cost_usd"] or 0
            table.append(row)
    read, failed = states.total(), states["failed"]
    if failed > teacher.max_failed_share * read:
        common = "\n".join(f"{count:6,} x {error}" for error, count in (+errors).most_common(3))
        raise R1DistillError(
            f"{failed:,} of {read:,} requests to '{teacher.name}' failed, more than max_failed_share "
            f"({teacher.max_failed_share:.1%}):\n{common}\nThe other answers are kept. See to the cause and run again: "
            "only what failed is asked again."
        )
    kept = states.pop("done", 0)
    metrics = {"completion_tokens": tokens, "cost_usd": str(cost), "asked_now": asked["asked"]}
    if asked["asked"]:
        metrics["tokens_per_second"] = round(asked["completion_tokens"] / asked["seconds"], 1)
    return Result(read, kept, dict(states), metrics, unit="answers")
