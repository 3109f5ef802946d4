"""The client against a server that misbehaves: every request ends in one state, none is asked without need."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import format_datetime

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.schema import TRACE
from r1distill.teacher.ledger import Ledger, merge
from r1distill.teacher.order import Share
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.settings import Client, Price, Sampling


def states(order, ledger):
    return [row["state"] for row in rows(order, ledger)]


def test_rows_come_in_order_and_have_all_that_a_trace_has(fake, ledger, order, client):
    wanted = order(["a", "b"], samples=2)
    ask(wanted, fake.endpoint(), ledger, client)
    found = list(rows(wanted, ledger))
    assert [(row["prompt_id"], row["sample"]) for row in found] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    row = found[0]
    assert row.keys() == set(TRACE.names)
    assert json.loads(row["request_text"]) == [{"role": "user", "content": "a"}]
    assert (row["teacher"], row["teacher_revision"], row["state"]) == ("fake-1", "abc", "done")
    assert (row["reasoning"], row["response"], row["completion_tokens"]) == ("2 + 2 = 4", "It is 4.", 20)
    assert json.loads(row["sampling"]) == {"temperature": 0.6, "top_p": 0.95, "max_tokens": 100, "seed": None}
    assert {body["model"] for body in fake.bodies} == {"fake"}
    assert "seed" not in fake.bodies[0]


def test_what_the_ledger_has_is_never_asked_again(fake, ledger, order, client):
    ask(order(["a", "b"]), fake.endpoint(), ledger, client)
    assert not pending(order(["a", "b"]), ledger)
    more = order(["a", "b", "c"], samples=2)
    assert ask(more, fake.endpoint(), ledger, client)["asked"] == 4
    assert fake.asked == {"a": 2, "b": 2, "c": 2}
    ask(more, fake.endpoint(), ledger, client)
    assert sum(fake.asked.values()) == 6


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"max_tokens": 99}, {"seed": 3}, {"top_p": 1.0}])
def test_other_settings_ask_again(fake, ledger, order, client, change):
    ask(order(["a"]), fake.endpoint(), ledger, client)
    ask(order(["a"], **change), fake.endpoint(), ledger, client)
    assert fake.asked == {"a": 2}


def test_seeds_differ_between_samples_and_repeat_between_runs(fake, ledger, order, client, tmp_path):
    wanted = order(["a", "b"], samples=2, seed=5)
    ask(wanted, fake.endpoint(), ledger, client)
    first = sorted(body["seed"] for body in fake.bodies)
    assert len(set(first)) == 4
    with Ledger(tmp_path / "another") as other:
        ask(wanted, fake.endpoint(), other, client)
    assert sorted(body["seed"] for body in fake.bodies[4:]) == first


def test_a_question_that_stands_twice_is_asked_once(fake, ledger, order, client):
    twice = order(["a", "a", "b"])
    ask(twice, fake.endpoint(), ledger, client)
    assert fake.asked == {"a": 1, "b": 1}
    assert states(twice, ledger) == ["done"] * 3


def test_a_question_that_stands_twice_is_asked_once_though_the_budget_makes_it_wait(
    fake, ledger, order, client, monkeypatch
):
    monkeypatch.setattr("r1distill.teacher.order.REQUESTS_A_LOOKUP", 16)
    price = Price(input=Decimal(0), output=Decimal(1000))  # an answer costs 0.02 and may cost 0.1
    fake.delay = 0.05
    twice = order([*map(str, range(16)), "15", "14", "13", "12"])
    ask(twice, fake.endpoint(price=price, budget_usd=Decimal("0.42")), ledger, client)
    assert fake.asked == {str(number): 1 for number in range(16)}


@pytest.mark.parametrize(
    "script",
    [
        [500],
        [429],
        [503, 500],
        ["cut"],
        ["half"],
        ["garbage"],
        ["noise"],
        [(429, {"retry-after": "0"})],
        ["cut", "half", "garbage"],
    ],
    ids=str,
)
def test_what_passes_is_asked_again_until_it_is_answered(fake, ledger, order, client, script):
    fake.scripts["a"] = list(script)
    ask(order(["a", "b"]), fake.endpoint(), ledger, client)
    assert states(order(["a", "b"]), ledger) == ["done", "done"]
    assert fake.asked == {"a": len(script) + 1, "b": 1}


def test_everything_that_goes_wrong_at_once_leaves_every_question_in_exactly_one_state(fake, ledger, order, chat):
    draw = random.Random(7)
    now = format_datetime(datetime.now(UTC), usegmt=True)
    nothing = {"prompt_tokens": 1, "completion_tokens": 0}
    passing = [
        429,
        (429, {"retry-after": "0"}),
        (429, {"retry-after": now}),
        500,
        503,
        "cut",
        "half",
        "garbage",
        "noise",
    ]
    passing += [chat("", usage=nothing), chat(None, usage=nothing), {"choices": []}, (200, {}, ["a list"])]
    ends = {
        "done": chat(),
        "done, the same over and over": chat("<think>" + "so " * 9000 + "</think>4"),
        "done, without an end of the thinking": chat("<think>so it is 4"),
        "done, without any tag": chat("so it is 4"),
        "truncated": chat("<think>so", finish_reason="length"),
        "refused": chat("", finish_reason="content_filter"),
        "failed": (400, {}, {"message": "too long"}),
    }
    names = [f"{draw.choice([*ends])} #{number}" for number in range(150)]
    scripts = {name: [*draw.choices(passing, k=draw.randrange(4)), ends[name.partition(" #")[0]]] for name in names}
    fake.scripts = {name: list(script) for name, script in scripts.items()}
    fake.draw = lambda: min(0.5, random.lognormvariate(-5, 1.5))  # a long tail
    wanted = order(names)
    client = Client(in_flight=32, attempts=9, backoff_seconds=0.01, timeout_seconds=20)
    counts = ask(wanted, fake.endpoint(), ledger, client)
    found = {row["prompt_id"]: row for row in rows(wanted, ledger)}
    assert {name: row["state"] for name, row in found.items()} == {name: name.partition(" #")[0].partition(",")[0] for name in names}  # fmt: skip
    assert fake.asked == {name: len(script) for name, script in scripts.items()}
    assert counts["asked"] == 150
    for name, row in found.items():
        end = ends[name.partition(" #")[0]]
        text = end["choices"][0]["message"]["content"] if isinstance(end, dict) else None
        assert (row["completion"] or None) == (text or None)
        assert (row["error"] is None) == (row["state"] != "failed")


def test_what_does_not_pass_ends_as_failed_with_its_reason(fake, ledger, order, client, chat):
    fake.scripts = {
        "down": [500] * 99,
        "cut": ["cut"] * 99,
        "too long": [(400, {}, {"message": "maximum context length is 512"})],
        "empty": [chat("", usage={"prompt_tokens": 1, "completion_tokens": 0})] * 99,
        "risky": [(400, {}, {"error": {"message": "Content Exists Risk"}})],
        "long": [chat("<think>on and on", finish_reason="length")],
    }
    wanted = order([*fake.scripts, "fine"])
    ask(wanted, fake.endpoint(), ledger, client)
    found = {row["prompt_id"]: row for row in rows(wanted, ledger)}
    assert {name: row["state"] for name, row in found.items()} == {
        **dict.fromkeys(["down", "cut", "too long", "empty"], "failed"),
        "risky": "refused",
        "long": "truncated",
        "fine": "done",
    }
    assert found["down"]["error"] == "HTTP 500: as scripted"
    assert "maximum context length" in found["too long"]["error"]
    assert found["empty"]["error"].endswith("an empty answer")
    assert found["cut"]["error"].startswith("no answer: ServerDisconnectedError")
    assert found["long"]["reasoning"] == "on and on"
    expected = {"down": 4, "cut": 4, "empty": 4, "too long": 1, "risky": 1, "long": 1, "fine": 1}
    assert fake.asked == expected

    fake.scripts = {}
    ask(wanted, fake.endpoint(), ledger, client)
    assert fake.asked == expected | {"down": 5, "cut": 5, "empty": 5, "too long": 2}
    assert Counter(states(wanted, ledger)) == {"done": 5, "refused": 1, "truncated": 1}


def test_a_fixed_number_is_in_flight_and_a_slow_answer_holds_nobody_up(fake, ledger, order):
    fake.scripts["slow"] = ["until 61"]  # the first to be asked, and answered when all have been asked
    fake.delay = 0.02
    ask(order(["slow", *map(str, range(60))]), fake.endpoint(), ledger, Client(in_flight=4, timeout_seconds=60))
    assert fake.most_in_flight == 4
    assert fake.asked.total() == 61


def test_a_rate_limit_holds_everybody_and_is_no_failed_attempt(fake, ledger, order):
    fake.scripts["a"] = [(429, {"retry-after": "0.4"})] * 3
    wanted = order(["a", *map(str, range(20))])
    fake.delay = 0.02
    ask(wanted, fake.endpoint(), ledger, Client(in_flight=2, attempts=1, timeout_seconds=20))
    assert set(states(wanted, ledger)) == {"done"}
    first, second = fake.times["a"][:2]
    assert second - first >= 0.4
    quiet = [at for times in fake.times.values() for at in times if first + 0.05 < at < first + 0.4]
    assert len(quiet) <= 1  # one was under way


def test_a_rate_limit_that_never_ends_is_not_waited_out_for_ever(fake, ledger, order):
    fake.scripts["a"] = [429] * 999
    ask(order(["a"]), fake.endpoint(), ledger, Client(in_flight=1, backoff_seconds=0.01, timeout_seconds=0.5))
    assert states(order(["a"]), ledger) == ["failed"]


def test_an_answer_that_takes_too_long_is_given_up(fake, ledger, order):
    fake.scripts["a"] = ["sleep 3"] * 2
    ask(order(["a"]), fake.endpoint(), ledger, Client(attempts=2, backoff_seconds=0, timeout_seconds=0.2))
    (row,) = rows(order(["a"]), ledger)
    assert (row["state"], row["error"]) == ("failed", "no answer in 0.2 s (timeout_seconds)")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_no_other_request_would_survive_stops_the_run_and_keeps_what_is_under_way(
    fake, ledger, order, client, monkeypatch, status
):
    monkeypatch.setenv("FAKE_KEY", "sk-very-secret")
    fake.scripts = {"b": [(status, {}, {"error": {"message": "key sk-very-secret is no good"}})], "a": ["sleep 0.3"]}
    wanted = order(["a", "b", *map(str, range(50))])
    with pytest.raises(R1DistillError, match=f"HTTP {status}: key \\*\\*\\* is no good.*FAKE_KEY") as raised:
        ask(wanted, fake.endpoint(key_variable="FAKE_KEY"), ledger, client)
    assert "secret" not in str(raised.value)
    assert fake.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert ledger.settled(wanted.key(wanted.requests[0]))
    assert fake.asked.total() < 52


def test_the_key_gets_into_no_row(fake, ledger, order, client, monkeypatch):
    monkeypatch.setenv("FAKE_KEY", "sk-very-secret")
    fake.scripts["a"] = [(418, {}, {"error": {"message": "sk-very-secret? teapot"}})]
    ask(order(["a"]), fake.endpoint(key_variable="FAKE_KEY"), ledger, client)
    assert [row["error"] for row in rows(order(["a"]), ledger)] == ["HTTP 418: ***? teapot"]
    assert b"sk-very-secret" not in b"".join(file.read_bytes() for file in ledger.file.parent.iterdir())


def test_a_missing_key_is_told_before_anything_is_asked(fake, ledger, order, client, monkeypatch):
    monkeypatch.delenv("FAKE_KEY", raising=False)
    with pytest.raises(RequestError, match="FAKE_KEY is not set"):
        ask(order(["a"]), fake.endpoint(key_variable="FAKE_KEY"), ledger, client)
    assert not fake.asked


def test_a_server_that_answers_nothing_is_not_asked_for_everything(fake, ledger, order, client):
    wanted = order([str(number) for number in range(200)])
    fake.scripts = {str(number): [500] * 99 for number in range(200)}
    with pytest.raises(R1DistillError, match="20 requests in a row failed .* HTTP 500"):
        ask(wanted, fake.endpoint(), ledger, client)
    assert len(fake.asked) < 40


def test_what_failed_before_does_not_stop_the_next_run(fake, ledger, order, client):
    fake.scripts = {str(number): [400] * 2 for number in range(0, 60, 2)}
    wanted = order([str(number) for number in range(60)])
    for _ in range(2):
        ask(wanted, fake.endpoint(), ledger, client)
        assert Counter(states(wanted, ledger)) == {"done": 30, "failed": 30}


def test_a_budget_is_never_overdrawn_and_its_end_is_told(fake, ledger, order, client):
    price = Price(
        input=Decimal(0), output=Decimal(1000)
    )  # 20 tokens of the 100 that an answer may have: 0.02 of 0.1 USD
    rich = fake.endpoint(price=price, budget_usd=Decimal("0.5"))
    wanted = order([str(number) for number in range(50)])
    with pytest.raises(R1DistillError, match=r"the budget of 0\.5 USD is used up: 0\.42\d* USD spent"):
        ask(wanted, rich, ledger, client)
    assert fake.asked.total() == 21
    assert ledger.spent_usd(wanted.scope) == Decimal("0.42")
    assert fake.most_in_flight <= 5
    with pytest.raises(R1DistillError, match="used up"):
        ask(wanted, rich, ledger, client)
    ask(wanted, fake.endpoint(price=price), ledger, client)
    assert fake.asked.total() == 50
    assert {row["cost_usd"] for row in rows(wanted, ledger)} == {Decimal("0.02")}


def test_answers_that_cant_be_used_are_paid_for_too_and_count_for_the_budget(fake, ledger, order, client, chat):
    price = Price(input=Decimal(0), output=Decimal(1000))  # 20 tokens: 0.02 USD; 100, which an answer may have: 0.1
    cut_short = chat(finish_reason="insufficient_system_resource")
    fake.scripts = {"a": [cut_short] * 3, "b": [cut_short] * 99}
    wanted = order(["a", "b"])
    ask(wanted, fake.endpoint(price=price, budget_usd=Decimal(1)), ledger, client)
    assert states(wanted, ledger) == ["done", "failed"]
    assert fake.asked == {"a": 4, "b": 4}
    assert ledger.spent_usd(wanted.scope) == Decimal("0.16")
    fake.scripts["b"] = []
    ask(wanted, fake.endpoint(price=price, budget_usd=Decimal(1)), ledger, client)
    assert ledger.spent_usd(wanted.scope) == Decimal("0.18")
    fake.scripts = {"c": [cut_short] * 99}
    with pytest.raises(R1DistillError, match="is used up"):
        ask(order(["c", "d"]), fake.endpoint(price=price, budget_usd=Decimal("0.3")), ledger, client)
    assert ledger.spent_usd(wanted.scope) <= Decimal("0.3")
    assert not ledger.settled(order(["c"]).key(order(["c"]).requests[0]))


def test_costs_are_rounded_to_what_the_table_holds(fake, ledger, order, client):
    price = Price(input=Decimal("0.0351"), output=Decimal("0.0777"))
    ask(order(["a"]), fake.endpoint(price=price), ledger, client)
    assert [row["cost_usd"] for row in rows(order(["a"]), ledger)] == [Decimal("0.000001905")]


def test_a_ledger_that_cant_be_written_stops_everything(fake, ledger, order, client, monkeypatch):
    def full(*exchanges):
        raise R1DistillError("the disk is full")

    monkeypatch.setattr(ledger, "put", full)
    with pytest.raises(R1DistillError, match="the disk is full"):
        ask(order([str(number) for number in range(99)]), fake.endpoint(), ledger, client)
    assert fake.asked.total() <= client.in_flight * 2


def test_a_server_of_ours_is_brought_back_and_asked_again(fake, ledger, order, client):
    recovered = []
    fake.scripts["a"] = ["cut"]
    ask(order(["a", "b"]), fake.endpoint(recover=lambda: recovered.append(1)), ledger, client)
    assert recovered == [1]
    assert states(order(["a", "b"]), ledger) == ["done", "done"]

    def gone():
        raise R1DistillError("died 4 times")

    fake.scripts["c"] = ["cut"]
    with pytest.raises(R1DistillError, match="died 4 times"):
        ask(order(["c"]), fake.endpoint(recover=gone), ledger, client)


def test_a_question_in_halves_of_characters_is_failed_or_answered_but_no_traceback(fake, ledger, client):
    requests = [Request("x", 0, [{"role": "user", "content": "a \ud83d b \u0000 𝟚"}])]
    order = Order(requests, Sampling(max_tokens=5), {"revision": "r"}, False)
    ask(order, fake.endpoint(), ledger, client)
    (row,) = rows(order, ledger)
    assert row["state"] == "done"


def test_parts_are_asked_apart_and_become_what_one_run_gives(fake, ledger, order, client, tmp_path):
    whole = order([str(number) for number in range(30)])
    ask(order(["0", "1"]), fake.endpoint(), ledger, client)
    parts = []
    for number in range(3):
        share = Share(whole.requests, number, 3)
        with Ledger(tmp_path / "ledger", str(number)) as part:
            ask(replace(whole, requests=share), fake.endpoint(), part, client)
            parts.append(part.file)
    assert [len(Share(whole.requests, number, 4)) for number in range(4)] == [8, 8, 7, 7]
    assert merge(ledger, parts) == 28
    assert set(fake.asked.values()) == {1}
    assert states(whole, ledger) == ["done"] * 30
