"""Sampling by several clients on a Ray cluster: each asks a share of the requests into a part of the ledger of its own.

``home`` lies on a disk that all nodes see. A part outlives its client: one that is killed goes on from what it had, and
a run that was cut off takes its parts into the ledger before it asks for anything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from r1distill.data import cluster
from r1distill.teacher.ledger import FILE, Ledger, merge
from r1distill.teacher.order import Order, Share
from r1distill.teacher.sample import ask
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client


def ask_on_ray(
    order: Order, endpoint: Endpoint, ledger: Ledger, client: Client, title: str, address: str
) -> dict[str, Any]:
    """What ``sample.ask`` does, by one client for each core of the cluster at ``address``. Counts as it does.

    The clients share what is in flight, the rates and what is left of the budget evenly. URLs and the key's variable
    have to be good on every node.
    """
    with cluster.connected(address):
        clients = min(cluster.cores(), client.in_flight, max(1, len(order.requests)))
        spent = ledger.spent_usd(order.scope)
        budget = None if endpoint.budget_usd is None else spent + (endpoint.budget_usd - spent) / clients
        job = {
            "order": order,
            "endpoint": replace(endpoint, budget_usd=budget, recover=None),
            "folder": str(ledger.file.parent),
            "client": _share_of(client, clients),
            "title": title,
            "clients": clients,
        }
        try:
            told = list(cluster.ordered(_ask_share, range(clients), job))
        finally:
            take_in(ledger, order)
    sums = {name: sum(one[name] for one in told) for name in ("asked", "completion_tokens")}
    return {**sums, "seconds": max((one["seconds"] for one in told), default=0.0)}


def take_in(ledger: Ledger, order: Order) -> int:
    """Merge the parts of an order's shares into the ledger beside which they lie, and delete them; how many came.

    Raises RequestError where another run is asking for the same.
    """
    parts = sorted(ledger.file.parent.glob(FILE.replace(".", f"-{_part(order)}*.", 1)))
    if not parts:
        return 0
    with ledger.asking(order.scope):
        got = merge(ledger, parts)
        for part in parts:
            for file in (part, part.with_name(f"{part.name}-wal"), part.with_name(f"{part.name}-shm")):
                file.unlink(missing_ok=True)
    return got


def _part(order: Order) -> str:
    return f"share-{order.scope[:16]}-"


def _ask_share(number: int, job: dict[str, Any]) -> dict[str, Any]:
    """On a worker of the cluster."""
    order: Order = job["order"]
    share = Order(Share(order.requests, number, job["clients"]), order.sampling, order.identity, order.opens_thinking)
    with Ledger(Path(job["folder"]), f"{_part(order)}{number}") as part:
        return ask(share, job["endpoint"], part, job["client"], job["title"])


def _share_of(client: Client, clients: int) -> Client:
    def part(value: int | None) -> int | None:
        return None if value is None else max(1, value // clients)

    return client.model_copy(
        update={
            "in_flight": max(1, client.in_flight // clients),
            "requests_per_minute": part(client.requests_per_minute),
            "tokens_per_minute": part(client.tokens_per_minute),
        }
    )
