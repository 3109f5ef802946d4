"""Requests and tokens a minute, and dollars: kept to, and used up."""

from __future__ import annotations

from decimal import Decimal

import pytest

from r1distill.teacher.limits import BYTES_A_TOKEN, Bucket, Budget, RateLimits
from r1distill.teacher.reply import Reply
from r1distill.teacher.sample import ask, rows
from r1distill.teacher.settings import Client, Price


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def reply(prompt, completion):
    return Reply("m", "x", None, "x", "stop", "done", prompt, None, completion)


@pytest.mark.parametrize("limit", [1, 7, 60, 6000])
def test_no_minute_sees_more_than_the_limit(limit):
    clock = Clock()
    bucket = Bucket(limit, clock)
    times = []
    for step in range(4 * limit):
        if step == limit:
            clock.now += 300  # a long pause saves nothing up
        times.append(clock.now + bucket.take(1))
    assert all(later - earlier > 60 - 1e-6 for earlier, later in zip(times, times[limit:], strict=False))


def test_tokens_are_charged_by_the_mean_and_corrected():
    clock = Clock()
    limits = RateLimits(Client(tokens_per_minute=6000), longest_tokens=1000)
    limits._tokens._clock = clock
    assert limits.take(100 * BYTES_A_TOKEN) == (0.0, 1100)
    wait, taken = limits.take(100 * BYTES_A_TOKEN)
    assert wait == pytest.approx(11)  # 1,100 tokens at 100 a second
    limits.answered(1100, reply(100, 200))
    limits.answered(taken, reply(100, 300))
    wait, taken = limits.take(100 * BYTES_A_TOKEN)
    assert (wait, taken) == (pytest.approx(7), 100 + 1500 / 3)  # 700 were used
    limits.answered(taken, None)
    assert limits.take(0)[0] == pytest.approx(7)


def test_a_run_keeps_to_requests_a_minute(fake, ledger, order):
    wanted = order([str(number) for number in range(12)])
    ask(wanted, fake.endpoint(), ledger, Client(requests_per_minute=1200, timeout_seconds=20))
    times = sorted(at for times in fake.times.values() for at in times)
    assert times[-1] - times[0] > 11 * 0.05 - 0.04  # one every 50 ms, but for how long the first took to arrive
    assert {row["state"] for row in rows(wanted, ledger)} == {"done"}


def test_a_run_that_is_held_back_stops_at_once(fake, ledger, order):
    from r1distill.data.errors import R1DistillError

    fake.always = 401
    with pytest.raises(R1DistillError, match="HTTP 401"):
        ask(order(["a", "b", "c"]), fake.endpoint(), ledger, Client(requests_per_minute=1))
    assert fake.asked.total() == 1


def test_a_budget_counts_what_is_in_flight_by_its_own_length():
    budget = Budget(Price(input=Decimal(1), output=Decimal(2)), Decimal("0.001"), Decimal("0.0001"))
    long, short = budget.most(100, 300), budget.most(10, 20)
    assert (long, short) == (Decimal("0.0007"), Decimal("0.00005"))
    assert budget.reserve(long)
    assert not budget.reserve(long)
    assert [budget.reserve(short) for _ in range(5)] == [True] * 4 + [False]
    budget.spend(long, Decimal("0.0001"))
    assert budget.spent_usd == Decimal("0.0002")
    assert budget.reserve(Decimal("0.0006"))
    assert not budget.reserve(Decimal("1e-12"))


def test_without_a_budget_nothing_is_held_back():
    budget = Budget(None, None, Decimal(0))
    assert budget.most(10**9, 10**9) == 0
    assert budget.reserve(Decimal(10**9))
