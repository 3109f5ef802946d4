"""What a server sent back: a chat completion's body as the parts of a trace, and an HTTP answer as what to do next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from r1distill.data.thinking import CLOSE, OPEN, split_thinking

STATES = {"stop": "done", "length": "truncated", "content_filter": "refused"}
EXCERPT = 300  # characters of an answer that end up in an error


@dataclass(frozen=True)
class Reply:
    """One answer. ``completion`` is all that the model wrote, its thinking in tags where the server took it apart."""

    model: str | None
    completion: str
    reasoning: str | None
    response: str
    finish_reason: str
    state: str  # done, truncated, refused
    prompt_tokens: int | None
    reasoning_tokens: int | None
    completion_tokens: int | None
    apart: bool = False  # the server took the thinking apart

    @classmethod
    def read(cls, body: bytes, opens_thinking: bool = False) -> Reply:
        """Read a chat completion; raises ValueError with the reason where it isn't a whole one.

        Servers give the thinking inside ``content`` (its opening tag may be part of the prompt: ``opens_thinking``), as
        ``reasoning_content`` (DeepSeek) or as ``reasoning`` (vLLM).
        """
        data = _parse(body)
        try:
            choice = data["choices"][0]
            message, finish_reason = choice["message"], choice["finish_reason"]
            content = _text(message.get("content"))
            thought = _text(message.get("reasoning_content") or message.get("reasoning"))
            refusal = _text(message.get("refusal"))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat completion ({error!r}): {_excerpt(body)}") from None
        if finish_reason not in STATES:
            raise ValueError(f"it ended with finish_reason {finish_reason!r}")
        tokens = _tokens(data.get("usage"))
        if not (content or thought or refusal or tokens["completion_tokens"] or finish_reason == "content_filter"):
            raise ValueError("an empty answer")
        if thought:
            completion = f"{OPEN}{thought}{CLOSE if content or finish_reason == 'stop' else ''}{content}"
            parts: tuple[str | None, str] = thought.strip(), content.strip()
        else:
            completion = content or refusal
            parts = split_thinking(completion, opened=opens_thinking)
        return cls(
            model=_text(data.get("model")) or None,
            completion=completion,
            reasoning=parts[0],
            response=parts[1],
            finish_reason=finish_reason,
            state="refused" if refusal else STATES[finish_reason],
            **tokens,
            apart=bool(thought),
        )

    def continued(self, then: Reply, opens_thinking: bool = False) -> Reply:
        """This answer, which was cut off, and ``then``, which went on from it, as one: all that the model wrote.

        Tokens that were written are added up; ``prompt_tokens`` stay those of the question.
        """
        rest = then.completion
        if rest.startswith(self.completion):  # llama.cpp repeats what it was sent
            rest = rest.removeprefix(self.completion)
        elif then.apart:  # by a parser that did not see how the answer began
            rest = rest.removeprefix(OPEN)
            if CLOSE in self.completion:
                rest = rest.replace(CLOSE, "", 1)
        elif self.apart and rest and CLOSE not in self.completion:
            rest = f"{CLOSE}{rest}"
        completion = self.completion + rest
        reasoning, response = split_thinking(completion, opened=opens_thinking)
        return replace(
            then,
            completion=completion,
            reasoning=reasoning,
            response=response,
            prompt_tokens=self.prompt_tokens,
            reasoning_tokens=_sum(self.reasoning_tokens, then.reasoning_tokens),
            completion_tokens=_sum(self.completion_tokens, then.completion_tokens),
            apart=self.apart or then.apart,
        )


@dataclass(frozen=True)
class Outcome:
    """What an HTTP answer means.

    settled   it is kept (``reply`` is None where the request itself was refused)
    retry     the same again, after a back-off
    limited   the same again, after ``wait_seconds`` where the server says so; all others wait too
    hopeless  the same again would get the same: this request failed
    stop      every other request would get the same: an account, a key or a model's name is wrong

    ``usage`` are the tokens, (prompt, completion), that are charged for it: also for an answer that can't be used.
    """

    kind: Literal["settled", "retry", "limited", "hopeless", "stop"]
    error: str | None = None
    reply: Reply | None = None
    wait_seconds: float | None = None
    usage: tuple[int, int] = (0, 0)


def outcome(status: int, headers: Mapping[str, str], body: bytes, opens_thinking: bool = False) -> Outcome:
    """Decide what an HTTP answer means; never raises. ``headers`` don't mind the case of a name."""
    if status == 200:
        try:
            reply = Reply.read(body, opens_thinking)
        except ValueError as error:
            return Outcome("retry", f"an answer that can't be used: {error}", usage=_usage(body))
        return Outcome("settled", reply=reply, usage=(reply.prompt_tokens or 0, reply.completion_tokens or 0))
    message = f"HTTP {status}: {_message(body)}"
    wait = _retry_after(headers.get("retry-after"))
    if status == 429 or (status == 503 and wait is not None):
        return Outcome("limited", message, wait_seconds=wait)
    if status in (401, 402, 403, 404):
        return Outcome("stop", message)
    if status in (400, 451) and ("content_filter" in message or "Content Exists Risk" in message):
        return Outcome("settled", message)
    return Outcome("retry" if status in (408, 409, 425) or status >= 500 else "hopeless", message)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {_excerpt(body)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"not a chat completion: {_excerpt(body)}")
    return data


def _text(value: Any) -> str:
    """A field's text; half a character, which a cut JSON escape leaves, becomes a replacement character."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    value = value or ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _tokens(usage: Any) -> dict[str, int | None]:
    """The counts that the server gives; those that it doesn't are None."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("completion_tokens_details")
    found = {**usage, **(details if isinstance(details, dict) else {})}
    names = ("prompt_tokens", "reasoning_tokens", "completion_tokens")
    return {name: n if type(n := found.get(name)) is int and 0 <= n < 2**63 else None for name in names}


def _usage(body: bytes) -> tuple[int, int]:
    """Tokens of the question and of the answer, as far as the server says."""
    try:
        tokens = _tokens(_parse(body).get("usage"))
    except ValueError:
        return 0, 0
    return tokens["prompt_tokens"] or 0, tokens["completion_tokens"] or 0


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _message(body: bytes) -> str:
    """The words of an error, wherever this server puts them."""
    try:
        data = _parse(body)
    except ValueError:
        return _excerpt(body)
    error = data.get("error", data)
    if isinstance(error, dict):
        words = [str(error[key]) for key in ("code", "message", "detail") if error.get(key)]
        return ": ".join(words)[:EXCERPT] or _excerpt(body)
    return str(error)[:EXCERPT]


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * EXCERPT].decode("utf-8", "replace").split())
    return f"{text[:EXCERPT]!r}" if text else "nothing"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait: the header holds them, or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value)) if math.isfinite(float(value)) else None
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
