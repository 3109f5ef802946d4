"""Answers that were cut off: dropped, gone on with or asked for anew, as the settings say, and never given an end."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from pydantic import ValidationError

from r1distill.teacher.reply import Reply
from r1distill.teacher.sample import ask, pending, rows
from r1distill.teacher.settings import Price, Sampling

GO_ON = {"kind": "continue", "max_tokens": 300}
ANEW = {"kind": "raise", "max_tokens": 300}


def cut(chat, content, **changes):
    return chat(content, finish_reason="length", usage={"prompt_tokens": 10, "completion_tokens": 100}, **changes)


def one(order, ledger):
    (row,) = rows(order, ledger)
    return row


def test_by_default_nothing_is_asked_again(fake, ledger, order, client, chat, capfd):
    fake.scripts["a"] = [cut(chat, "<think>on and")]
    ask(order(["a"]), fake.endpoint(), ledger, client)
    assert not pending(order(["a"]), ledger)
    assert (one(order(["a"]), ledger)["state"], fake.asked) == ("truncated", {"a": 1})
    assert "tokens up to" not in capfd.readouterr().err


def test_an_answer_goes_on_from_where_it_was_cut_off(fake, ledger, order, client, chat, capfd):
    price = Price(input=Decimal(1), output=Decimal(2))
    fake.scripts["a"] = [cut(chat, "<think>on and")]
    fake.scripts["<think>on and"] = [chat(" on</think>4", usage={"prompt_tokens": 112, "completion_tokens": 7})]
    ask(order(["a", "b"]), fake.endpoint(price=price), ledger, client)
    wanted = order(["a", "b"], truncated=GO_ON)
    assert pending(wanted, ledger)
    assert ask(wanted, fake.endpoint(price=price), ledger, client)["asked"] == 1
    assert not pending(wanted, ledger)
    shown = capfd.readouterr().err
    assert "what was cut off is asked again (continue)" in shown
    assert [line.split()[:3] for line in shown.splitlines()[2:]] == [["32", "1", "0"], ["128", "0", "1"]]
    sent = fake.bodies[-1]
    assert sent["messages"][-1] == {"role": "assistant", "content": "<think>on and"}
    assert (sent["max_tokens"], sent["continue_final_message"], sent["add_generation_prompt"]) == (200, True, False)
    row, other = rows(wanted, ledger)
    assert (row["completion"], row["reasoning"], row["response"]) == ("<think>on and on</think>4", "on and on", "4")
    assert (row["state"], row["finish_reason"]) == ("done", "stop")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (10, 107)
    assert row["cost_usd"] == Decimal("0.000122") + Decimal("0.000214")
    assert json.loads(row["request_text"]) == [{"role": "user", "content": "a"}]
    assert json.loads(row["sampling"])["truncated"] == {"kind": "continue", "max_tokens": 300, "protocol": "vllm"}
    assert (other["state"], "truncated" in json.loads(other["sampling"])) == ("done", False)
    ask(wanted, fake.endpoint(price=price), ledger, client)
    assert fake.asked.total() == 3
    assert one(order(["a"]), ledger)["completion"] == "<think>on and"  # the other policy's row is there as before


def test_a_tag_that_was_in_the_prompt_is_sent_and_not_stored(fake, ledger, order, client, chat):
    fake.scripts["a"] = [cut(chat, "on and")]
    fake.scripts["<think>\non and"] = [chat(" on</think>4")]
    wanted = order(["a"], truncated=GO_ON, opens_thinking=True)
    ask(wanted, fake.endpoint(), ledger, client)
    row = one(wanted, ledger)
    assert (row["completion"], row["reasoning"], row["response"]) == ("on and on</think>4", "on and on", "4")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_that_the_server_takes_apart_is_put_together(fake, ledger, order, client, chat, name):
    fake.scripts["a"] = [cut(chat, None, **{name: "on and"})]
    fake.scripts["<think>\non and"] = [chat("4", **{name: " on"})]
    wanted = order(["a"], truncated=GO_ON)
    ask(wanted, fake.endpoint(), ledger, client)
    row = one(wanted, ledger)
    assert (row["completion"], row["reasoning"], row["response"]) == ("<think>on and on</think>4", "on and on", "4")


@pytest.mark.parametrize(
    ("first", "then", "whole"),
    [
        ({"content": "It", "reasoning": "so"}, {"content": None, "reasoning": " is 4."}, "<think>so</think>It is 4."),
        ({"content": "It", "reasoning": "so"}, {"content": " is 4."}, "<think>so</think>It is 4."),
        ({"content": None, "reasoning": "so"}, {"content": "It is 4."}, "<think>so</think>It is 4."),
        ({"content": "<think>so</think>It"}, {"content": " is 4."}, "<think>so</think>It is 4."),
        ({"content": "<think>so</think>It"}, {"content": "<think>so</think>It is 4."}, "<think>so</think>It is 4."),
    ],
    ids=["a parser calls all of it thinking", "after the thinking", "between the two", "raw", "an echo"],
)
def test_what_was_cut_off_in_or_before_its_response_is_put_together(chat, first, then, whole):
    head, tail = (Reply.read(json.dumps(chat(**one, finish_reason=end)).encode()) for one, end in ((first, "length"), (then, "stop")))  # fmt: skip
    both = head.continued(tail)
    assert (both.completion, both.reasoning, both.response) == (whole, "so", "It is 4.")
    assert (both.completion_tokens, both.prompt_tokens, both.state) == (40, 10, "done")


def test_deepseek_is_told_in_its_own_way(fake, ledger, order, client, chat):
    fake.scripts["a"] = [cut(chat, "It", reasoning_content="so")]
    wanted = order(["a"], truncated={**GO_ON, "protocol": "deepseek"})
    ask(wanted, fake.endpoint(), ledger, client)
    last = {"role": "assistant", "content": "It", "reasoning_content": "so", "prefix": True}
    assert fake.bodies[-1]["messages"][-1] == last
    assert "continue_final_message" not in fake.bodies[-1]


def test_an_answer_is_asked_for_anew_with_more_room(fake, ledger, order, client, chat):
    fake.scripts["a"] = [cut(chat, "<think>on and"), chat("<think>short</think>4")]
    fake.scripts["b"] = [cut(chat, "<think>on and"), cut(chat, "<think>on and on and")]
    wanted = order(["a", "b"], truncated=ANEW, seed=1)
    ask(wanted, fake.endpoint(), ledger, client)
    first, second = rows(wanted, ledger)
    assert (first["completion"], first["state"], first["completion_tokens"]) == ("<think>short</think>4", "done", 20)
    assert (second["completion"], second["state"]) == ("<think>on and on and", "truncated")
    assert sorted(body["max_tokens"] for body in fake.bodies) == [100, 100, 300, 300]
    assert len({body["seed"] for body in fake.bodies}) == 4
    ask(wanted, fake.endpoint(), ledger, client)
    assert fake.asked == {"a": 2, "b": 2}


def test_what_is_not_brought_to_an_end_stays_as_it_was(fake, ledger, order, client, chat):
    fake.scripts["a"] = [cut(chat, "<think>on and")]
    fake.scripts["<think>on and"] = [(400, {}, {"message": "add_generation_prompt?"})]
    wanted = order(["a"], truncated=GO_ON)
    ask(wanted, fake.endpoint(), ledger, client)
    row = one(wanted, ledger)
    assert (row["state"], row["completion"], row["finish_reason"]) == ("truncated", "<think>on and", "length")
    assert row["error"] == "asked again, and failed: HTTP 400: add_generation_prompt?"
    assert pending(wanted, ledger)


def test_the_second_attempt_needs_more_room_than_the_first():
    with pytest.raises(ValidationError, match="must be more than max_tokens"):
        Sampling(max_tokens=300, truncated=GO_ON)
    assert Sampling(max_tokens=200, truncated=GO_ON).of_one() == Sampling(max_tokens=200).of_one()
    assert Sampling(max_tokens=200, truncated=GO_ON).identity() != Sampling(max_tokens=200).identity()
