"""What is wanted of one model with one set of settings: requests, their names in the ledger, and what is sent."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from r1distill.data.thinking import OPEN
from r1distill.teacher.ledger import Exchange, Ledger, digest
from r1distill.teacher.reply import Reply
from r1distill.teacher.settings import Continue, Drop, Sampling

REQUESTS_A_LOOKUP = 512
ANSWERS_A_LOOKUP = 64  # of up to some 100 kB each


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
class Share:
    """Every ``of``-th of some requests, from ``number`` on: what one of several clients asks."""

    requests: Requests
    number: int
    of: int

    def __iter__(self) -> Iterator[Request]:
        return islice(iter(self.requests), self.number, None, self.of)

    def __len__(self) -> int:
        return len(range(self.number, len(self.requests), self.of))


@dataclass(frozen=True)
class Call:
    """What is sent to get one answer, or the second half of one; ``more`` goes into the body as it is.

    ``again``: it failed in an earlier run, and that it fails once more says nothing new about the server.
    """

    key: str
    messages: list[dict[str, Any]]
    max_tokens: int
    more: dict[str, Any] = field(default_factory=dict)
    again: bool = False

    @cached_property
    def prompt_bytes(self) -> int:
        """At least as many as the prompt has tokens, the template's own included."""
        return sum(len(str(text).encode("utf-8", "replace")) + 8 for one in self.messages for text in one.values())


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

    def second(self, key: str, request: Request, first: Exchange) -> Call:
        """What is asked where the ``first`` answer was cut off, as ``sampling.truncated`` says: not where it drops."""
        policy, messages, more = self.sampling.truncated, request.messages, {}
        assert not isinstance(policy, Drop) and first.body
        reply = Reply.read(first.body, self.opens_thinking)
        written = reply.completion if isinstance(policy, Continue) else None
        key = digest([key, policy.model_dump(), written])
        if not isinstance(policy, Continue):
            return Call(key, messages, policy.max_tokens)
        if policy.protocol == "deepseek":
            last: dict[str, Any] = {"role": "assistant", "content": reply.response, "prefix": True}
            if reply.reasoning is not None:
                last["reasoning_content"] = reply.reasoning
        else:
            last = {"role": "assistant", "content": self._prefix(reply)}
            more = {"continue_final_message": True, "add_generation_prompt": False}
        return Call(key, [*messages, last], policy.max_tokens - self.sampling.max_tokens, more)

    def _prefix(self, reply: Reply) -> str:
        """The beginning of the answer as the model saw it: R1's generation prompt ends in a tag and a new line."""
        written = reply.completion
        if reply.apart:
            return f"{OPEN}\n{written.removeprefix(OPEN).removeprefix(chr(10))}"
        return f"{OPEN}\n{written}" if self.opens_thinking and not written.lstrip().startswith(OPEN) else written

    def body(self, call: Call, model: str) -> str:
        """What is sent. Seeds differ from request to request, or the samples of a prompt would be one and the same."""
        settings = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        seed = {} if self.sampling.seed is None else {"seed": int(call.key[:7], 16)}
        limit = {"max_tokens": call.max_tokens}
        return json.dumps({"model": model, "messages": call.messages, **settings, **limit, **seed, **call.more})


def in_batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """The requests, ``size`` at a time."""
    coming = iter(requests)
    while batch := list(islice(coming, size)):
        yield batch


def unsettled(order: Order, ledger: Ledger, under_way: Collection[str] = ()) -> Iterator[tuple[int, list[Call]]]:
    """What the ledger has no answer to, by batches: how many requests were gone through, and the calls to make.

    Each key comes once, as the same question may stand in the order twice; those ``under_way`` at that time don't come.
    """
    for batch in in_batches(order.requests, REQUESTS_A_LOOKUP):
        wanted = {order.key(request): request for request in batch}
        states = ledger.states(list(wanted))
        yield (
            len(batch),
            [
                Call(key, request.messages, order.sampling.max_tokens, again=key in states)
                for key, request in wanted.items()
                if states.get(key, "failed") == "failed" and key not in under_way
            ],
        )


def cut_off(order: Order, ledger: Ledger, under_way: Collection[str] = ()) -> Iterator[tuple[int, list[Call]]]:
    """The second calls that the ledger has no answer to, as ``unsettled`` gives them; none where the policy is drop."""
    if isinstance(order.sampling.truncated, Drop):
        return
    for batch in in_batches(order.requests, ANSWERS_A_LOOKUP):
        wanted = {order.key(request): request for request in batch}
        short = [key for key, state in ledger.states(list(wanted)).items() if state == "truncated"]
        calls = {key: order.second(key, wanted[key], first) for key, first in ledger.fetch(short).items()}
        states = ledger.states([call.key for call in calls.values()])
        todo = [call for call in calls.values() if states.get(call.key, "failed") == "failed"]
        yield len(batch), [replace(call, again=call.key in states) for call in todo if call.key not in under_way]
