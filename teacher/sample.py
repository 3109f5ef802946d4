"""The client: asks one model many questions, a fixed number of them at any moment, and keeps every answer.

A slot that becomes free takes the next request at once; nothing waits for a batch. Between the last byte of an answer
and its place in the ledger nothing else happens, so a killed run asks again only what had not come back.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from typing import Any, Protocol

from r1distill.data.errors import R1DistillError
from r1distill.teacher.ledger import Exchange, Ledger, digest
from r1distill.teacher.reply import Outcome, Reply, outcome
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Sampling

LONGEST_BACKOFF_SECONDS = 60.0
COST_STEP = Decimal("1e-9")  # US dollars, as the traces table holds them
FEWEST_FAILURES_TO_GIVE_UP = 20  # in a row; never fewer than there are requests in flight


@dataclass(frozen=True)
class Request:
    """One answer that is wanted: ``sample`` numbers the answers to one prompt from 0."""

    prompt_id: str
    sample: int
    messages: list[dict[str, str]]


class Requests(Protocol):
    """Requests that can be counted, and gone through more than once."""

    def __iter__(self) -> Iterator[Request]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Order:
    """Requests to one model with one set of settings. ``identity`` names the model and its revision, in JSON values."""

    requests: Requests
    sampling: Sampling
    identity: dict[str, Any]
    opens_thinking: bool = False

    @cached_property
    def scope(self) -> str:
        """The hash of all that is common to the requests."""
        return digest([self.identity, self.sampling.of_one(), self.opens_thinking])

    def key(self, request: Request) -> str:
        """The request's name in the ledger: a change of whatever decides the answer asks again, nothing else does."""
        return digest([self.scope, request.messages, request.sample])

    def body(self, request: Request, model: str) -> str:
        """What is sent. Seeds differ from request to request, or the samples of a prompt would be one and the same."""
        settings = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        seed = {} if self.sampling.seed is None else {"seed": int(self.key(request)[:7], 16)}
        limit = {"max_tokens": self.sampling.max_tokens}
        return json.dumps({"model": model, "messages": request.messages, **settings, **limit, **seed})


def sample(
    endpoint: Endpoint,
    requests: Requests,
    sampling: Sampling,
    ledger: Ledger,
    client: Client,
    *,
    identity: dict[str, Any],
    opens_thinking: bool = False,
    title: str = "sampling",
) -> Iterator[dict[str, Any]]:
    """Ask for what the ledger lacks, then return an iterator over one TRACE row for each request, in their order."""
    order = Order(requests, sampling, identity, opens_thinking)
    ask(order, endpoint, ledger, client, title)
    return rows(order, ledger)


def pending(order: Order, ledger: Ledger) -> bool:
    """Whether anything of the order would be asked."""
    return any(not ledger.settled(order.key(request)) for request in order.requests)


def ask(order: Order, endpoint: Endpoint, ledger: Ledger, client: Client, title: str = "sampling") -> dict[str, Any]:
    """Bring every request of the order into the ledger; what failed before is asked again.

    Returns counts of this call: asked, completion_tokens, seconds. A request that fails is kept as failed; raises
    R1DistillError where going on makes no sense (the account, the model's name, the budget, many failures in a row, a
    server that keeps dying, a ledger that can't be written), after the answers under way have been kept.
    """
    from tqdm import tqdm

    with (
        ledger.asking(order.scope),
        tqdm(total=len(order.requests), desc=title, unit="answer", disable=None, delay=2) as progress,
    ):
        asker = _Asker(order, endpoint, ledger, client, progress)
        try:
            asyncio.run(asker.run())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
    if asker.stopped:
        raise R1DistillError(asker.stopped)
    seconds = time.monotonic() - asker.began
    return {"asked": asker.asked, "completion_tokens": asker.tokens, "seconds": round(seconds, 2)}


def rows(order: Order, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """One TRACE row for each request of the order, in order, as the ledger has it."""
    for request in order.requests:
        exchange = ledger.get(order.key(request))
        if exchange is None:
            raise R1DistillError(f"the ledger {ledger.file} has nothing on prompt {request.prompt_id}: run again.")
        yield _row(order, request, exchange)


def _row(order: Order, request: Request, exchange: Exchange) -> dict[str, Any]:
    sent = json.loads(exchange.request)
    reply = Reply.read(exchange.body, order.opens_thinking) if exchange.body else None
    parts = ("completion", "reasoning", "response", "finish_reason", "prompt_tokens", "reasoning_tokens")
    return {
        "prompt_id": request.prompt_id,
        "sample": request.sample,
        "teacher": (reply and reply.model) or sent["model"],
        "teacher_revision": order.identity.get("revision"),
        "sampling": json.dumps(order.sampling.of_one(), sort_keys=True),
        "request_text": json.dumps(sent["messages"], ensure_ascii=False),
        **{part: getattr(reply, part, None) for part in parts},
        "completion_tokens": reply and reply.completion_tokens,
        "state": exchange.state,
        "error": exchange.error,
        "seconds": exchange.seconds,
        "cost_usd": exchange.cost_usd and Decimal(exchange.cost_usd),
        "created_at": exchange.created_at,
    }


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
    _resume_at: float = 0.0  # when a rate limit ends
    _in_flight: int = 0

    async def run(self) -> None:
        import httpx

        self._key = self.endpoint.key()
        self._spent = self.ledger.spent_usd(self.order.scope) if self.endpoint.budget_usd is not None else Decimal(0)
        self._todo = self._unsettled()
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        # Proxies of the environment are for somebody else's servers, not for those on this machine.
        async with (
            httpx.AsyncClient(
                base_url=self.endpoint.base_url,
                headers=headers,
                timeout=httpx.Timeout(self.client.timeout_seconds, connect=30),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.client.in_flight),
                trust_env="//127.0.0.1:" not in self.endpoint.base_url,
            ) as self._http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(min(self.client.in_flight, len(self.order.requests))):
                group.create_task(self._slot())

    def _unsettled(self) -> Iterator[tuple[str, Request]]:
        """What has to be asked, each key once: the same question may stand in the order twice."""
        seen = set()
        for request in self.order.requests:
            key = self.order.key(request)
            if key in seen or self.ledger.settled(key):
                self.progress.update()
            else:
                seen.add(key)
                yield key, request

    async def _slot(self) -> None:
        """One of the requests in flight at any moment, one after another."""
        for key, request in self._todo:
            if self.stopped or not await self._affordable(request):
                return
            self._in_flight += 1
            await self._exchange(key, self.order.body(request, self.endpoint.model))
            self._in_flight -= 1

    async def _exchange(self, key: str, body: str) -> None:
        """Ask until there is something to keep, and keep it; or until everything has to stop."""
        attempt, limited, began = 1, 0, time.monotonic()
        while True:
            await self._pause()
            if self.stopped:
                return
            sent = time.monotonic()
            got, raw = await self._attempt(body)
            if got.kind == "stop":
                self._stop(f"{self.endpoint.base_url} refuses: {got.error}. {self._advice()}")
                return
            patient = time.monotonic() - began < self.client.timeout_seconds
            again = patient if got.kind == "limited" else got.kind == "retry" and attempt < self.client.attempts
            if not again:
                exchange = self._to_keep(key, body, got, raw, attempt, time.monotonic() - sent)
                self.ledger.put(exchange)
                return self._count(exchange, got.reply)
            backoff = min(self.client.backoff_seconds * 2 ** (attempt + limited - 1), LONGEST_BACKOFF_SECONDS)
            wait = backoff * random.uniform(0.5, 1.5) if got.wait_seconds is None else got.wait_seconds
            if got.kind == "limited":
                limited += 1
                self._resume_at = max(self._resume_at, time.monotonic() + wait)
            else:
                attempt += 1
                await asyncio.sleep(wait)

    async def _attempt(self, body: str) -> tuple[Outcome, bytes | None]:
        import httpx

        try:
            async with asyncio.timeout(self.client.timeout_seconds):
                response = await self._http.post("chat/completions", content=body.encode())
        except TimeoutError:
            return Outcome("retry", f"no answer in {self.client.timeout_seconds:g} s (timeout_seconds)"), None
        except httpx.TransportError as error:
            if self.endpoint.recover:
                self.endpoint.recover()  # blocks everything, as long as there is nobody to ask
            return Outcome("retry", f"no answer: {type(error).__name__} {error}".strip()), None
        return outcome(response, self.order.opens_thinking), response.content

    async def _pause(self) -> None:
        """Wait out a rate limit, and not all to the same moment."""
        while (wait := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait + random.uniform(0, min(1.0, wait)))

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
            cost_usd=self._cost(got.reply) if got.reply else None,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _count(self, exchange: Exchange, reply: Reply | None) -> None:
        self.asked += 1
        self.tokens += (reply and reply.completion_tokens) or 0
        self._spent += Decimal(exchange.cost_usd or 0)
        self.progress.set_postfix_str(f"{self.tokens / (time.monotonic() - self.began):.0f} tokens/s", refresh=False)
        self.progress.update()
        self._failures_in_a_row = self._failures_in_a_row + 1 if exchange.state == "failed" else 0
        if self._failures_in_a_row >= max(FEWEST_FAILURES_TO_GIVE_UP, self.client.in_flight):
            self._stop(
                f"{self._failures_in_a_row} requests in a row failed at {self.endpoint.base_url}, the last one with: "
                f"{exchange.error}. Answers so far are kept; see to the server and run again."
            )

    async def _affordable(self, request: Request) -> bool:
        """Wait until the budget holds even if all that is in flight, and this one, become as long as they may."""
        price, budget = self.endpoint.price, self.endpoint.budget_usd
        if budget is None or price is None:
            return True
        letters = sum(len(message["content"]) for message in request.messages)  # at most a token each, but for emojis
        dearest = (price.input * letters + price.output * self.order.sampling.max_tokens) / 1_000_000
        while self._spent + dearest * (self._in_flight + 1) > budget:
            if not self._in_flight:
                self._stop(
                    f"the budget of {budget} USD is used up: {self._spent:.4f} USD spent, one more answer may cost "
                    f"{dearest:.4f}. Answers so far are kept; raise budget_usd and run again to get the others."
                )
            if self.stopped:
                return False
            await asyncio.sleep(0.05)
        return True

    def _stop(self, why: str) -> None:
        """Ask nothing more; what is under way is waited for and kept. The first reason is the one to tell."""
        self.stopped = self.stopped or self._safe(why)

    def _cost(self, reply: Reply) -> str | None:
        price = self.endpoint.price
        if price is None:
            return None
        cost = price.input * (reply.prompt_tokens or 0) + price.output * (reply.completion_tokens or 0)
        return str((cost / 1_000_000).quantize(COST_STEP))

    def _safe(self, text: str) -> str:
        """Without the key, should a server send it back."""
        return text.replace(self._key, "***") if self._key else text

    def _advice(self) -> str:
        if self.endpoint.key_variable:
            return f"Check the key in {self.endpoint.key_variable}, the account's balance and the model's name."
        return "Check the model's name; a service that wants a key is told by 'key_variable' which variable holds it."
