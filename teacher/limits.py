"""What holds a client back: requests and tokens a minute, and a budget in dollars."""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal

from r1distill.teacher.reply import Reply
from r1distill.teacher.settings import Client, Price

BYTES_A_TOKEN = 4  # of English, about


class Bucket:
    """A token bucket that holds one drop: what was not used is not saved up, so no minute sees more than ``a_minute``.

    (But for the last one to be taken, which may be as large as it likes.)
    """

    def __init__(self, a_minute: float, clock: Callable[[], float] = time.monotonic):
        self._seconds_each, self._clock, self._free_at = 60 / a_minute, clock, 0.0

    def take(self, amount: float) -> float:
        """Take ``amount`` in one's turn; returns the seconds until then."""
        now = self._clock()
        turn = max(now, self._free_at)
        self._free_at = turn + amount * self._seconds_each
        return turn - now

    def correct(self, amount: float) -> None:
        """What was taken turns out to be more by ``amount``, or less."""
        self._free_at += amount * self._seconds_each


class RateLimits:
    """Requests and tokens a minute, over all servers.

    An answer's length is not known before it is there. What is taken for it is the mean of those so far, corrected when
    it has come, so that what is really used keeps to the limit: R1's answers are a sixth of what they may be at most.
    """

    def __init__(self, client: Client, longest_tokens: int):
        self._requests = Bucket(client.requests_per_minute) if client.requests_per_minute else None
        self._tokens = Bucket(client.tokens_per_minute) if client.tokens_per_minute else None
        self._sum, self._answers = longest_tokens, 1  # the first ones are taken for long

    def take(self, prompt_bytes: int) -> tuple[float, float]:
        """Take one request; returns the seconds to wait, and how many tokens were taken."""
        tokens = prompt_bytes / BYTES_A_TOKEN + self._sum / self._answers
        waits = [0.0]
        if self._requests:
            waits.append(self._requests.take(1))
        if self._tokens:
            waits.append(self._tokens.take(tokens))
        return max(waits), tokens

    def answered(self, taken: float, reply: Reply | None) -> None:
        """Book what one request really used: nothing where no answer came."""
        used = ((reply.prompt_tokens or 0) + (reply.completion_tokens or 0)) if reply else 0
        if reply and reply.completion_tokens is not None:
            self._sum += reply.completion_tokens
            self._answers += 1
        if self._tokens:
            self._tokens.correct(used - taken)


class Budget:
    """Dollars: never overdrawn, even if all that is in flight becomes as long as it may."""

    def __init__(self, price: Price | None, budget_usd: Decimal | None, spent_usd: Decimal):
        self.price, self.budget_usd, self.spent_usd = price, budget_usd, spent_usd
        self.reserved_usd = Decimal(0)

    def most(self, prompt_bytes: int, max_tokens: int) -> Decimal:
        """What one answer may cost at most: a token is a byte of the question at least."""
        if self.price is None or self.budget_usd is None:
            return Decimal(0)
        return (self.price.input * prompt_bytes + self.price.output * max_tokens) / 1_000_000

    def reserve(self, most_usd: Decimal) -> bool:
        """Set aside what one answer may cost; false where that is not left."""
        if self.budget_usd is not None and self.spent_usd + self.reserved_usd + most_usd > self.budget_usd:
            return False
        self.reserved_usd += most_usd
        return True

    def spend(self, most_usd: Decimal, cost_usd: Decimal) -> None:
        """An answer has come: what was set aside for it is free again but for what it cost."""
        self.reserved_usd -= most_usd
        self.spent_usd += cost_usd
