"""The filters of form."""

import pytest

from r1distill.data.thinking import split_thinking
from r1distill.data.verify import filters
from r1distill.data.verify.filters import FilterSettings

LIMITS = FilterSettings()
GOOD = "Okay, two and two make four.\n</think>\n\nThe answer is \\boxed{4}."


def judged(check, completion, *, finish_reason=None, state="done", domain="math"):
    reasoning, response = split_thinking(completion, opened=True)
    if check == "format":
        return filters.form(completion, reasoning, response, domain, LIMITS)
    return filters.truncation(completion, reasoning, response, finish_reason, state)


@pytest.mark.parametrize("completion", [GOOD, "<think>\n" + GOOD])
def test_the_opening_tag_may_be_missing(completion):
    assert judged("format", completion).outcome == "pass"
    assert judged("truncation", completion).outcome == "pass"


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("Okay, two and two", "no </think>"),
        ("<think>Okay, two and two", "no </think>"),
        ("", "no </think>"),
        ("<think>" + "<think>" + GOOD, "a <think> or </think> too many"),
        ("Okay.</think>One</think>Two", "a <think> or </think> too many"),
        ("Okay.</think>One<think>Two", "a <think> or </think> too many"),
        ("Okay.</think>  \n", "the response is empty"),
        ("<think>\n\n</think>\n\nFour.", "the thinking is empty"),
        (
            "Error after 6 attempts: Error code: 500 - {'error': {'message': 'Internal'}}",
            "an API error instead of an answer",
        ),
        ("Error after 6 attempts: Expecting value: line 10 column 1 (char 9)", "an API error instead of an answer"),
        ('{"error": {"message": "rate limit", "code": 429}}', "an API error instead of an answer"),
        ("<html><body>502 Bad Gateway</body></html>", "an API error instead of an answer"),
        ("Hm.</think>I'm sorry, but I can't help with that.", "a refusal"),
        ("Hm.</think>Sorry, that's beyond my current scope. Let’s talk about something else.", "a refusal"),
        ("So:\n```python\nprint(4)\n```\n</think>Four.", "a code block in the thinking"),
        ("word " * 2000 + "</think>Four.", "a paragraph of the thinking is too long"),
    ],
)
def test_format_fails(completion, reason):
    assert judged("format", completion)[:2] == ("fail", reason)


def test_a_servers_parts_need_no_tags():
    assert filters.form("Four.", "Two and two.", "Four.", "math", LIMITS).outcome == "pass"
    assert filters.form("Two and two", "Two and two", "", "math", LIMITS).outcome == "fail"


def test_the_mathematics_of_errors_is_no_api_error():
    assert judged("format", "The error after 3 steps is small.</think>The error is \\boxed{3}.").outcome == "pass"


def test_code_may_think_in_code():
    assert judged("format", "So:\n```python\nprint(4)\n```\n</think>Done.", domain="code").outcome == "pass"


@pytest.mark.parametrize(
    ("completion", "arguments"),
    [
        (GOOD, {"finish_reason": "length"}),
        (GOOD, {"state": "truncated"}),
        (GOOD, {"finish_reason": "content_filter"}),
        ("Okay, two and", {}),
        ("Okay.</think>", {}),
        ("Okay.</think>So it is\n\\[\n2 + 2", {}),
        ("Okay.</think>So it is $\\boxed{4", {}),
        ("Okay.</think>```python\nprint(", {}),
    ],
)
def test_truncation_fails(completion, arguments):
    assert judged("truncation", completion, **arguments).outcome == "fail"


def test_the_servers_word_counts_for_truncation():
    assert judged("truncation", GOOD, finish_reason="stop").outcome == "pass"


PROSE = " ".join(f"Step {n} adds {n * 7} to {n * n}, which leaves {n % 13} of the {n + 5} parts." for n in range(60))


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (PROSE, "pass"),
        ("", "pass"),
        ("Short and sweet.", "pass"),
        (PROSE + " Wait, let me check that once more from the start." * 40, "fail"),
        (PROSE + " wait" * 500, "fail"),
        ("好的，我们再检查一遍这个结果是否正确。" * 60, "fail"),
        (PROSE + "\n" + PROSE[:300], "pass"),
    ],
)
def test_repetition(text, outcome):
    assert filters.repetition(text, LIMITS).outcome == outcome


def test_repetition_of_a_long_loop_is_found_in_linear_time():
    loop = "The next value of the sequence follows from the last two of them by addition, so we go on with it. "
    assert filters.repetition(PROSE + loop * 20_000, LIMITS).outcome == "fail"


ENGLISH = "How many buses are needed for the trip?"


@pytest.mark.parametrize(
    ("question", "text", "outcome"),
    [
        (ENGLISH, "Let α be the angle and π the ratio, so x² ≤ 4 — naïve, but fine.", "pass"),
        (ENGLISH, "The word for cookies (饼干) is a clue.", "fail"),
        (ENGLISH, "In Russian this is два раза больше, so twice.", "fail"),
        (ENGLISH, "首先，我们需要计算公共汽车的数量。", "fail"),
        ("What does 饼干 mean?", "The word 饼干 means cookies.", "pass"),
        ("一共需要多少辆公共汽车？", "首先，我们设公共汽车的数量为 x，然后计算 x = 4。", "pass"),
        ("一共需要多少辆公共汽车？", "First we count the buses that are needed for the trip.", "fail"),
        ("2 + 2 =", "Two and two make four.", "pass"),
        (ENGLISH, "\\[ 2 + 2 = 4 \\]", "pass"),
    ],
)
def test_language(question, text, outcome):
    assert filters.language(question, text, LIMITS).outcome == outcome
