"""The dataset's card says of its traces what is true of them."""

from __future__ import annotations

from r1distill.data.cards import Facts

TRACE = {"teacher": "r1", "teacher_revision": "abc", "sampling": "{}"}


def card(domain: str, **facts: object) -> str:
    made = Facts("sums", {}, **facts)
    row = {"domain": domain, "source": "s", "license": "mit", "completion_tokens": 5, "pass_rate": None}
    made.add(row, TRACE)
    return made.card().replace("\n", " ")


def test_what_passed_and_what_was_kept_without_a_rule():
    assert "Every trace passed every required check; the rejected" in card("math")
    assert "Every trace passed every required check; the rejected" in card("math", keep_unverified=("general",))
    lenient = card("general", keep_unverified=("general", "poetry"))
    assert "check, or, in the domain general, failed none and could not be decided by all; the rejected" in lenient
