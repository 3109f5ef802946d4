"""The traces stage: every prompt asked as often as the settings say, and one row for each, whatever became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
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
from r1distill.teacher.lengths import Lengths
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.serve import Endpoint, serving, spec_of
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Teacher, VllmTeacher
from r1distill.teacher.shares import ask_on_ray, take_in


def build(
    teacher: Teacher,
    prompts: Path,
    out: Path,
    home: Path,
    instruction: str | dict[str, str],
    ray_address: str | None = None,
) -> Result:
    """Write the TRACE table from what the ledger has, after asking for what it lacks.

    Counts are of (prompt, sample): kept are the answers that ended by themselves, the others are counted by state.
    Nothing is started where nothing is to be asked. Raises R1DistillError where more than ``max_failed_share`` failed:
    a rerun asks only for those again. A teacher that others serve is asked from all cores of the Ray cluster at
    ``ray_address``; one that we serve here has all its requests from here.
    """
    if isinstance(teacher, RecordedTeacher):
        return recorded.build(teacher, prompts, out)
    questions = Questions(schema.read(prompts, schema.PROMPT), teacher.sampling.samples, instruction)
    order = Order(questions, teacher.sampling, identity_of(teacher), teacher.opens_thinking)
    asked: dict[str, Any] = {"asked": 0}
    with Ledger(home / "ledger") as ledger:
        take_in(ledger, order)
        if pending(order, ledger):
            with answering(teacher, home, ray_address) as endpoint:
                job = (order, endpoint, ledger, teacher.client, f"asking {teacher.name}")
                asked = ask_on_ray(*job, ray_address) if ray_address and endpoint.recover is None else ask(*job)
        return _written(out, rows(order, ledger), teacher, asked)


def answering(
    teacher: VllmTeacher | EndpointTeacher, home: Path, ray_address: str | None = None
) -> AbstractContextManager[Endpoint]:
    """Where the teacher is asked: nothing is started where its own file says who serves it."""
    if isinstance(teacher, VllmTeacher) and (urls := teacher.client.base_urls):
        return nullcontext(Endpoint(urls[0], teacher.served_name, models.revision(teacher.model)))
    return serving(spec_of(teacher, home, ray_address=ray_address), home / "logs")


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
    errors: Counter[str] = Counter()
    lengths = Lengths()
    tokens, cost = 0, 0
    with schema.writing(out, schema.TRACE) as table:
        for row in traces:
            lengths.add(row["state"], row["completion_tokens"], row["seconds"], row["cost_usd"])
            errors[row["error"] or ""] += row["state"] == "failed"
            tokens += row["completion_tokens"] or 0
            cost += row["cost_usd"] or 0
            table.append(row)
    states = lengths.states
    read, failed = states.total(), states["failed"]
    if failed > teacher.max_failed_share * read:
        common = "\n".join(f"{count:6,} x {error}" for error, count in (+errors).most_common(3))
        raise R1DistillError(
            f"{failed:,} of {read:,} requests to '{teacher.name}' failed, more than max_failed_share "
            f"({teacher.max_failed_share:.1%}):\n{common}\nThe other answers are kept. See to the cause and run again: "
            "only what failed is asked again."
        )
    metrics: dict[str, Any] = {
        "completion_tokens": tokens,
        "cost_usd": str(cost),
        "asked_now": asked["asked"],
        "answers": lengths.summary(),
    }
    if "first_answers" in asked:
        metrics["first_answers"] = asked["first_answers"]
    if asked["asked"]:
        metrics["tokens_per_second"] = round(asked["completion_tokens"] / asked["seconds"], 1)
    kept = states.pop("done", 0)
    return Result(read, kept, dict(states), metrics, unit="answers")
