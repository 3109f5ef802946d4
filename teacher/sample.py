"""The client: asks one model many questions, a fixed number of them at any moment, and keeps every answer.

A slot that becomes free takes the next request at once; nothing waits for a batch. An answer frees its slot, and
counts, when it is on the disk, so a killed run asks again only what had not come back.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from r1distill.data.errors import R1DistillError
from r1distill.teacher.endpoints import Endpoints, Place
from r1distill.teacher.ledger import Exchange, Ledger
from r1distill.teacher.lengths import Lengths
from r1distill.teacher.limits import Budget, RateLimits
from r1distill.teacher.order import (
    ANSWERS_A_LOOKUP,
    Call,
    Order,
    Request,
    Requests,
    cut_off,
    in_batches,
    unsettled,
)
from r1distill.teacher.reply import Outcome, Reply, outcome
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Continue, Drop

__all__ = ["Order", "Request", "Requests", "ask", "pending", "rows"]

LONGEST_BACKOFF_SECONDS = 60.0
COST_STEP = Decimal("1e-9")  # US dollars, as the traces table holds them
FEWEST_FAILURES_TO_GIVE_UP = 20  # in a row; never fewer than there are requests in flight

Round = Callable[[Order, Ledger, Collection[str]], Iterator[tuple[int, list[Call]]]]


def pending(order: Order, ledger: Ledger) -> bool:
    """Whether anything of the order would be asked."""
    return any(calls for round_ in (unsettled, cut_off) for _, calls in round_(order, ledger, ()))


def ask(order: Order, endpoint: Endpoint, ledger: Ledger, client: Client, title: str = "sampling") -> dict[str, Any]:
    """Bring every request of the order into the ledger; what failed before is asked again.

    Answers that were cut off are then gone on with as ``sampling.truncated`` says, each once, after their lengths have
    been shown. Returns counts of this call: asked, completion_tokens, seconds; and first_answers (as ``Lengths`` sums
    them up) where some were gone on with. A request that fails is kept as failed; raises R1DistillError where going on
    makes no sense (the account, the model's name, the budget, many failures in a row, nobody there, a server that keeps
    dying, a ledger that can't be written), after the answers under way have been kept.
    """
    began, shown = time.monotonic(), {}
    with ledger.asking(order.scope):
        rounds = [_asked(order, endpoint, ledger, client, title, unsettled)]
        if not isinstance(order.sampling.truncated, Drop) and any(calls for _, calls in cut_off(order, ledger)):
            kind, found = order.sampling.truncated.kind, lengths(order, ledger)
            shown = {"first_answers": found.summary()}
            print(f"{title}: what was cut off is asked again ({kind}). So far:\n{found}", file=sys.stderr)
            rounds.append(_asked(order, endpoint, ledger, client, f"{title} ({kind})", cut_off))
    asked, tokens = (sum(counts) for counts in zip(*rounds, strict=True))
    return {"asked": asked, "completion_tokens": tokens, "seconds": time.monotonic() - began, **shown}


def rows(order: Order, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """One TRACE row for each request of the order, in order, as the ledger has it; a few of them in memory."""
    for batch in in_batches(order.requests, ANSWERS_A_LOOKUP):
        keys = [order.key(request) for request in batch]
        firsts = ledger.fetch(keys)
        seconds: dict[str, Call] = {}
        if not isinstance(order.sampling.truncated, Drop):
            short = [(k, r) for k, r in zip(keys, batch, strict=True) if k in firsts and firsts[k].state == "truncated"]
            seconds = {key: order.second(key, request, firsts[key]) for key, request in short}
        others = ledger.fetch([call.key for call in seconds.values()]) if seconds else {}
        for key, request in zip(keys, batch, strict=True):
            if key not in firsts:
                raise R1DistillError(f"the ledger {ledger.file} has nothing on prompt {request.prompt_id}: run again.")
            yield _row(order, request, firsts[key], others.get(seconds[key].key) if key in seconds else None)


def lengths(order: Order, ledger: Ledger) -> Lengths:
    """How long the first answers are, and how many were cut off; what was not asked yet is left out."""
    found = Lengths()
    for batch in in_batches(order.requests, ANSWERS_A_LOOKUP):
        for one in ledger.fetch([order.key(request) for request in batch]).values():
            reply = Reply.read(one.body, order.opens_thinking) if one.body else None
            found.add(one.state, reply.completion_tokens if reply else None, one.seconds, one.cost_usd)
    return found


def _row(order: Order, request: Request, first: Exchange, second: Exchange | None) -> dict[str, Any]:
    """A trace as the schema has it; ``second`` is what became of an answer that was cut off, if it was asked again."""
    reply = Reply.read(first.body, order.opens_thinking) if first.body else None
    error, decides, sampling, both = first.error, first, order.sampling.of_one(), [first, *([second] if second else [])]
    if second is not None and second.state in ("done", "truncated") and reply and second.body:
        then = Reply.read(second.body, order.opens_thinking)
        going_on = isinstance(order.sampling.truncated, Continue)
        reply = reply.continued(then, order.opens_thinking) if going_on else then
        decides, sampling = second, {**sampling, "truncated": order.sampling.truncated.model_dump()}
    elif second is not None:
        error = f"asked again, and {second.state}: {second.error}"
    sent = json.loads(first.request)
    parts = ("completion", "reasoning", "response", "finish_reason", "prompt_tokens", "reasoning_tokens")
    costs = [Decimal(one.cost_usd) for one in both if one.cost_usd is not None]
    return {
        "prompt_id": request.prompt_id,
        "sample": request.sample,
        "teacher": (reply and reply.model) or sent["model"],
        "teacher_revision": order.identity.get("revision"),
        "sampling": json.dumps(sampling, sort_keys=True),
        "request_text": json.dumps(sent["messages"], ensure_ascii=False),
        **{part: getattr(reply, part, None) for part in parts},
        "completion_tokens": reply and reply.completion_tokens,
        "state": decides.state,
        "error": error,
        "seconds": sum(one.seconds for one in both),
        "cost_usd": sum(costs, Decimal(0)) if costs else None,
        "created_at": decides.created_at,
    }


def _asked(
    order: Order, endpoint: Endpoint, ledger: Ledger, client: Client, title: str, round_: Round
) -> tuple[int, int]:
    """Make one round's calls; returns how many there were and how many tokens they brought."""
    import uvloop
    from tqdm import tqdm

    with tqdm(total=len(order.requests), desc=title, unit="answer", disable=None, delay=2) as progress:
        asker = _Asker(order, endpoint, ledger, client, progress)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(asker.run(round_))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
    if asker.stopped:
        raise R1DistillError(asker.stopped)
    return asker.asked, asker.tokens


@dataclass
class _Asker:
    order: Order
    endpoint: Endpoint
    ledger: Ledger
    client: Client
    progress: Any
    stopped: str | None = None  # why nothing more is asked
    asked: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    _failures_in_a_row: int = 0

    async def run(self, round_: Round) -> None:
        self._key = self.endpoint.key()
        budget = self.endpoint.budget_usd
        spent = self.ledger.spent_usd(self.order.scope) if budget is not None else Decimal(0)
        self._budget = Budget(self.endpoint.price, budget, spent)
        self._limits = RateLimits(self.client, self.order.sampling.max_tokens)
        self._stopping, self._answer = asyncio.Event(), asyncio.Event()
        self._under_way: set[str] = set()
        self._todo = self._calls(round_)
        urls = self.client.base_urls or [self.endpoint.base_url]
        self._recover = None if self.client.base_urls else self.endpoint.recover
        async with (
            Endpoints(urls, self._key, self.client) as self._endpoints,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.client.in_flight, len(self.order.requests))):
                group.create_task(self._slot())

    def _calls(self, round_: Round) -> Iterator[Call]:
        """What has to be asked, looked up as it is needed."""
        for gone_through, calls in round_(self.order, self.ledger, self._under_way):
            self.progress.update(gone_through - len(calls))
            for call in calls:
                self._under_way.add(call.key)
                yield call

    async def _slot(self) -> None:
        """One of the requests in flight at any moment, one after another."""
        for call in self._todo:
            most_usd = self._budget.most(call.prompt_bytes, call.max_tokens)
            if self.stopped or not await self._affordable(most_usd):
                return
            cost_usd = await self._exchange(call)
            self._under_way.remove(call.key)
            self._budget.spend(most_usd, cost_usd)
            self._answer.set()

    async def _exchange(self, call: Call) -> Decimal:
        """Ask until there is something to keep, and keep it; or until everything has to stop. Returns what it cost.

        An answer that can't be used and is charged for is kept as failed at once: its cost stays on the account.
        """
        attempt, limited, began, place = 1, 0, time.monotonic(), None
        body = self.order.body(call, self.endpoint.model)
        while (turn := await self._turn(call, place)) is not None:
            place, tokens = turn
            sent = time.monotonic()
            got, raw = await self._attempt(place, body)
            self._limits.answered(tokens, got.reply if got else None)
            if got is None:  # no attempt of this request's: it goes elsewhere, or waits
                continue
            if got.kind == "stop":
                self._stop(f"{place.url} refuses: {got.error}. {self._advice()}")
                break
            patient = time.monotonic() - began < self.client.timeout_seconds
            again = patient if got.kind == "limited" else got.kind == "retry" and attempt < self.client.attempts
            exchange = self._to_keep(call.key, body, got, raw, attempt, time.monotonic() - sent)
            cost_usd = Decimal(exchange.cost_usd or 0)
            again = again and self._budget.reserve(cost_usd)
            if cost_usd or not again:
                await asyncio.wrap_future(self.ledger.keep(exchange))
            if not again:
                self._count(call, exchange, got.reply)
                return cost_usd
            self._budget.spend(cost_usd, cost_usd)
            backoff = min(self.client.backoff_seconds * 2 ** (attempt + limited - 1), LONGEST_BACKOFF_SECONDS)
            wait = backoff * random.uniform(0.5, 1.5) if got.wait_seconds is None else got.wait_seconds
            if got.kind == "limited":
                limited += 1
                self._endpoints.limited(place, wait)
            else:
                attempt += 1
                await self._rest(wait)
        return Decimal(0)

    async def _turn(self, call: Call, last: Place | None) -> tuple[Place, float] | None:
        """The server to ask, when it may be asked, and what the limits were charged; None where all has to stop.

        Not the one that the ``last`` attempt was made at, if there is another.
        """
        wait, tokens = self._limits.take(call.prompt_bytes)
        await self._rest(wait)
        while not self.stopped:
            place, wait = self._endpoints.choose(last)
            if place is not None:
                return place, tokens
            if self._endpoints.down_seconds() > self.client.down_seconds:
                self._stop(
                    f"nobody to ask for {self.client.down_seconds:g} s (down_seconds) at {self._endpoints.named()}: "
                    f"{self._endpoints.reason}. Answers so far are kept; see to the server and run again."
                )
            await self._rest(wait)
        return None

    async def _attempt(self, place: Place, body: str) -> tuple[Outcome | None, bytes | None]:
        """What one request brought: None where it is the server that is to blame, which is out or was being probed."""
        import aiohttp

        why, reachable, probe = "", True, place.probing
        try:
            status, headers, raw = await place.post(body)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            why, reachable = f"no answer: {error}", self._recover is not None
        except TimeoutError:
            why = f"no answer in {self.client.timeout_seconds:g} s (timeout_seconds)"
        except aiohttp.ClientError as error:
            why = f"no answer: {type(error).__name__} {error}".strip()
        finally:
            self._endpoints.leave(place)
        if why:
            if self._recover:
                self._recover()  # blocks everything, as long as there is nobody to ask
            self._endpoints.failed(place, why, reachable)
            return (Outcome("retry", why) if reachable and not probe else None), None
        got = outcome(status, headers, raw, self.order.opens_thinking)
        if status >= 500 and got.kind == "retry":
            self._endpoints.failed(place, got.error or "", True)
            return (None if probe else got), raw
        self._endpoints.answered(place)
        return got, raw

    async def _rest(self, seconds: float) -> None:
        """Wait, unless everything has to stop."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    def _to_keep(self, key: str, sent: str, got: Outcome, raw: bytes | None, attempts: int, seconds: float) -> Exchange:
        settled = got.kind == "settled"
        return Exchange(
            key=key,
            scope=self.order.scope,
            state=got.reply.state if got.reply else "refused" if settled else "failed",
            error=self._safe(got.error) if got.error else None,
            request=sent,
            body=raw if got.reply else None,
            attempts=attempts,
            seconds=round(seconds, 3),
            cost_usd=self._cost(got),
            created_at=datetime.now(UTC).isoformat(),
        )

    def _count(self, call: Call, exchange: Exchange, reply: Reply | None) -> None:
        self.asked += 1
        self.tokens += (reply and reply.completion_tokens) or 0
        self.progress.set_postfix_str(f"{self.tokens / (time.monotonic() - self.began):.0f} tokens/s", refresh=False)
        self.progress.update()
        if exchange.state != "failed":
            self._failures_in_a_row = 0
        elif not call.again:
            self._failures_in_a_row += 1
        if self._failures_in_a_row >= max(FEWEST_FAILURES_TO_GIVE_UP, self.client.in_flight):
            self._stop(
                f"{self._failures_in_a_row} requests in a row failed at {self._endpoints.named()}, the last one with: "
                f"{exchange.error}. Answers so far are kept; see to the server and run again."
            )

    async def _affordable(self, most_usd: Decimal) -> bool:
        """Wait until the budget holds even if all that is in flight, and this one, become as long as they may."""
        while not self._budget.reserve(most_usd):
            if not self._budget.reserved_usd:  # nothing is under way that may turn out to be cheaper
                self._stop(
                    f"the budget of {self._budget.budget_usd} USD is used up: {self._budget.spent_usd:.4f} USD spent, "
                    f"one more answer may cost {most_usd:.4f}. Answers so far are kept; raise budget_usd and run again "
                    "to get the others."
                )
            if self.stopped:
                return False
            self._answer.clear()
            await self._answer.wait()
        return True

    def _stop(self, why: str) -> None:
        """Ask nothing more; what is under way is waited for and kept. The first reason is the one to tell."""
        self.stopped = self.stopped or self._safe(why)
        self._stopping.set()
        self._answer.set()

    def _cost(self, got: Outcome) -> str | None:
        price, (prompt_tokens, completion_tokens) = self.endpoint.price, got.usage
        if price is None or not (got.reply or any(got.usage)):
            return None
        cost = price.input * prompt_tokens + price.output * completion_tokens
        return str((cost / 1_000_000).quantize(COST_STEP))

    def _safe(self, text: str) -> str:
        """Without the key, should a server send it back."""
        return text.replace(self._key, "***") if self._key else text

    def _advice(self) -> str:
        if self.endpoint.key_variable:
            return f"Check the key in {self.endpoint.key_variable}, the account's balance and the model's name."
        return "Check the model's name; a service that wants a key is told by 'key_variable' which variable holds it."
