"""Agreement: a contradiction between the thinking's last answer and the final one fails, and nothing else does."""

from __future__ import annotations

import pytest

from r1distill.data.verify.agreement import examine


@pytest.mark.parametrize(
    ("thinking", "response", "outcome"),
    [
        ("So \\boxed{12}.", "The answer is \\boxed{12}.", "pass"),
        ("So \\boxed{12}.", "The answer is \\boxed{13}.", "fail"),
        ("First \\boxed{11}? No, \\boxed{\\frac12}.", "It is \\boxed{0.5}.", "pass"),
        ("Hence the answer is 24.", "There are **25** of them.", "fail"),
        ("Hence the answer is 1,024 in all.", "\\boxed{1024}", "pass"),
        ("The answer is 7. " + "Let me check that again. " * 40, "\\boxed{8}", "pass"),  # long before the end
        ("The answer is correct, I am confident.", "\\boxed{8}", "pass"),
        ("Hmm.", "\\boxed{8}", "pass"),
        ("So \\boxed{x^2 + 1}.", "No clear words here at all, nothing to be read, sorry about that", "pass"),
    ],
)
def test_only_a_contradiction_fails(thinking, response, outcome):
    assert examine(thinking, response).outcome == outcome


def test_no_thinking_contradicts_nothing():
    assert examine(None, "\\boxed{1}").outcome == "pass"
