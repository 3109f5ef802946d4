"""A body becomes the parts of a trace, whatever form the server gives it."""

from __future__ import annotations

import json
import random

import pytest

from r1distill.teacher.reply import Reply, outcome


def read(body, **options):
    return Reply.read(json.dumps(body).encode(), **options)


def parts(reply):
    return reply.reasoning, reply.response, reply.state


def test_thinking_inside_the_content(chat):
    reply = read(chat("<think>\nso\n</think>\n\nIt is 4."))
    assert parts(reply) == ("so", "It is 4.", "done")
    assert reply.completion == "<think>\nso\n</think>\n\nIt is 4."
    assert (reply.model, reply.prompt_tokens, reply.completion_tokens, reply.reasoning_tokens) == (
        "fake-1",
        10,
        20,
        None,
    )


def test_thinking_whose_opening_tag_was_in_the_prompt(chat):
    assert parts(read(chat("so\n</think>\n\n4"), opens_thinking=True)) == ("so", "4", "done")
    cut = read(chat("so and", finish_reason="length"), opens_thinking=True)
    assert parts(cut) == ("so and", "", "truncated")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_apart_from_the_content(chat, name):
    reply = read(chat("\n\nIt is 4.", **{name: "so\n"}))
    assert parts(reply) == ("so", "It is 4.", "done")
    assert reply.completion == "<think>so\n</think>\n\nIt is 4."
    cut = read(chat(None, finish_reason="length", **{name: "so and"}))
    assert (cut.completion, *parts(cut)) == ("<think>so and", "so and", "", "truncated")


def test_reasoning_tokens_are_read_where_they_are_given(chat):
    usage = {"prompt_tokens": 1, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}
    assert read(chat(usage=usage)).reasoning_tokens == 7
    assert read(chat(usage=None)).completion_tokens is None
    assert read(chat(usage={"completion_tokens": "many"})).completion_tokens is None


def test_refusals(chat):
    assert read(chat(None, refusal="I can't.")).state == "refused"
    assert read(chat("", finish_reason="content_filter")).state == "refused"


def test_an_empty_answer_counts_only_where_the_model_wrote_a_token(chat):
    ended_at_once = read(chat("", usage={"prompt_tokens": 5, "completion_tokens": 1}))
    assert parts(ended_at_once) == (None, "", "done")
    with pytest.raises(ValueError, match="an empty answer"):
        read(chat("", usage={"prompt_tokens": 5, "completion_tokens": 0}))


def test_half_a_character_does_not_spoil_the_table(chat):
    reply = Reply.read(b'{"choices": [{"message": {"content": "ok \\ud83d"}, "finish_reason": "stop"}]}')
    assert reply.response.encode() == "ok \ufffd".encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": ["parts"]}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "insufficient_system_resource"}]}',
        b'{"choices": [{"message": {"content": "x"}}]}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_answer_says_why(body):
    with pytest.raises(ValueError, match="."):
        Reply.read(body)


def test_any_damage_is_an_outcome_and_never_an_exception(chat):
    draw = random.Random(0)
    whole = json.dumps(chat()).encode()
    for _ in range(2000):
        body = bytearray(whole[: draw.randrange(len(whole) + 1)])
        for _ in range(draw.randrange(4)):
            if body:
                body[draw.randrange(len(body))] = draw.randrange(256)
        status = draw.choice([200, 200, 400, 429, 500, 302, 418])
        assert outcome(status, {}, bytes(body)).kind


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "wait"),
    [
        (429, {"retry-after": "7"}, {}, "limited", 7.0),
        (429, {}, {}, "limited", None),
        (429, {"retry-after": "soon"}, {}, "limited", None),
        (429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, "limited", 0.0),
        (503, {"retry-after": "3"}, {}, "limited", 3.0),
        (503, {}, {}, "retry", None),
        (500, {}, {}, "retry", None),
        (408, {}, {}, "retry", None),
        (400, {}, {"message": "too long"}, "hopeless", None),
        (422, {}, {"detail": "no"}, "hopeless", None),
        (400, {}, {"error": {"message": "Content Exists Risk"}}, "settled", None),
        (401, {}, {"error": "bad key"}, "stop", None),
        (402, {}, {}, "stop", None),
        (404, {}, {}, "stop", None),
    ],
)
def test_what_a_status_means(status, headers, body, kind, wait):
    found = outcome(status, headers, json.dumps(body).encode())
    assert (found.kind, found.wait_seconds) == (kind, wait)
    assert found.error.startswith(f"HTTP {status}: ")
