"""A teacher as the judge of answers that no rule settles: its replies go through the same ledger as all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from r1distill.data.errors import RequestError
from r1distill.data.verify.judge import Judge, JudgeRequest
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import RecordedTeacher, Teacher
from r1distill.teacher.traces import answering, identity_of

REQUESTS_AT_ONCE = 4096


def judge(teacher: Teacher, home: Path) -> Judge:
    """Ask ``teacher``, started once and only where a reply is missing. Raises RequestError for a recorded one."""
    if isinstance(teacher, RecordedTeacher):
        raise RequestError(f"the teacher '{teacher.name}' is recorded: it can't be asked to judge. Name another.")

    def replies(requests: Iterable[JudgeRequest]) -> Iterator[str | None]:
        coming = iter(requests)
        with Ledger(home / "ledger") as ledger, ExitStack() as server:
            endpoint: Endpoint | None = None
            while batch := [Request(*request) for request in islice(coming, REQUESTS_AT_ONCE)]:
                identity = {"purpose": "judge", **identity_of(teacher)}
                order = Order(batch, teacher.sampling, identity, teacher.opens_thinking)
                if pending(order, ledger):
                    endpoint = endpoint or server.enter_context(answering(teacher, home))
                    ask(order, endpoint, ledger, teacher.client, f"{teacher.name} judges")
                for row in rows(order, ledger):
                    yield row["response"] if row["state"] == "done" else None

    return Judge(teacher.name, [identity_of(teacher), teacher.sampling.of_one()], replies)
