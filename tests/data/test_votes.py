"""Which answers say the same: by the verifier's rules, and with processes only where formulas have to be compared."""

from __future__ import annotations

import json

from r1distill.data.verify import votes
from r1distill.data.verify.verifiers import Item


def item(response: str, verifier: str = "math", **changes) -> Item:
    return Item("q", 0, "What is it?", response, "thinking", response, verifier=verifier, **changes)


def test_an_integer_with_leading_zeros_is_the_same_vote():
    texts = tuple(votes.answer(item(f"It is $\\boxed{{{text}}}$.")) for text in ("016", "16", "17", "16"))
    assert list(votes.groups([("math", texts)])) == [[0, 0, 2, 0]]


def test_formulas_vote_by_what_they_mean():
    ballot = ("math", ("\\frac{1}{2}", "0.5", "x+1", "1+x", "2"))
    plain = ("math", ("3", "4"))
    assert list(votes.groups([plain, ballot, plain])) == [[0, 1], [0, 0, 2, 2, 4], [0, 1]]


def test_choices_vote_by_their_letter_and_programs_not_at_all():
    choices = json.dumps({"choices": ["red", "green", "blue"]})
    assert votes.answer(item("ANSWER: B", "choice", verifier_args=choices)) == "B"
    assert votes.answer(item("So the answer is (B).", "choice", verifier_args=choices)) == "B"
    assert votes.answer(item("ANSWER: B\n\nANSWER: C", "choice", verifier_args=choices)) is None
    assert votes.answer(item("```python\nprint(1)\n```", "code")) is None


def test_what_did_not_end_by_itself_does_not_vote():
    assert votes.answer(item("\\boxed{4}", state="truncated")) is None
    assert votes.answer(item("\\boxed{4}", state="failed")) is None
    assert votes.answer(item("I can't say.")) is None
