"""Multiple choice: the letter that a response settles on, however it says so."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1distill.data.verdict_file import verify
from r1distill.data.verdicts import VerdictSettings
from r1distill.data.verify import choice

QUESTION = "Which of these is it?\n\nA) 5 N\nB) 10 N\nC) a bird\nD) none of the above"


def examine(response, reference="B", question=QUESTION, choices=None):
    return choice.examine(response, reference, question, choices)


@pytest.mark.parametrize(
    "response",
    [
        "It doubles.\n\nANSWER: B",
        "ANSWER: $B$",
        "**ANSWER: B**",
        "**Answer:** B",
        "### Answer\n\nB",
        "answer: [b]",
        "Answer: 10 N",
        "\\boxed{B}",
        "\\boxed{b}",
        "\\boxed{\\text{B}}",
        "\\boxed{\\text{(B) 10 N}}",
        "Answer: (B), a force",
        "Answer: (B) a force",
        "\\boxed{10\\ \\text{N}}",
        "**Final Answer**\n\nThe final answer is $\\boxed{B}$.",
        "Option A is too small. \\boxed{B}\n\nANSWER: B",
        "The answer is (B).",
        "The answer is (B) 10 N",
        "The correct answer is **B**.",
        "The correct answer is **B) 10 N**.",
        "so the answer is b.",
        "The answer is: B. It doubles.",
        "The answer is B (10 N), since it doubles.",
        "The answer is B because A is too small.",
        "The best choice is 10 N.",
        "Option A is wrong. Option C is wrong. The answer is B, C is out.",
        "Therefore, B is the correct answer.",
        "Option B is correct.",
        "I choose option B because it doubles.",
        "It doubles, so we get\n\n**B) 10 N**",
        "B",
        "(b)",
        "**B**",
        "So the answer should be B.",
        "**Answer**\nB",
        "<answer>B</answer>",
        "\\boxed{\\text{B}: 10 N}",
        "故选：B",
        "因此，正确答案是 **B**。",
        "综上，选 B。",
    ],
)
def test_ways_of_naming_a_choice(response):
    assert examine(response).outcome == "pass", examine(response)
    assert examine(response, "(B)").outcome == "pass"
    assert examine(response, "10 N").outcome == "pass"
    assert examine(response, "C")[:2] == ("fail", "wrong answer")


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("\\boxed{A}\n\nANSWER: B", "the response settles on several choices"),
        ("ANSWER: A or B", "the response settles on several choices"),
        ("\\boxed{B, C}", "the response settles on several choices"),
        ("\\boxed{b and c}", "the response settles on several choices"),
        ("Answer: (B), (C)", "the response settles on several choices"),
        ("The answer is A. No, the answer is B.", "the response settles on several choices"),
        ("The answer is not B", "the answer names no choice"),
        ("I don't know.", "the answer names no choice"),
        ("The answer is a force of 10 N", "the answer names no choice"),
        ("A force of 10 N acts on it", "the answer names no choice"),
        ("B is one option among several that deserve a look", "the answer names no choice"),
    ],
)
def test_what_names_no_choice_or_several_is_open(response, reason):
    assert examine(response, "A")[:2] == ("unverifiable", reason)


def test_several_right_choices_are_a_set():
    assert examine("ANSWER: C, A", "A and C").outcome == "pass"
    assert examine("ANSWER: A", "A, C").outcome == "fail"
    assert examine("ANSWER: A, B", "A, C").outcome == "fail"


def test_texts_come_from_the_arguments_or_the_question():
    assert examine("The answer is yellow.", "B", "", ["red", "Yellow"]).outcome == "pass"
    assert examine("The answer is (A).", "yellow", "", ["red", "Yellow"]).outcome == "fail"
    assert examine("The answer is yellow.", "B", "").outcome == "unverifiable"
    assert examine("The answer is A.", "A", "", ["x"] * 30).outcome == "pass"
    assert examine("The answer is red.", "A", "", ["red", "red"]).outcome == "unverifiable"  # which of them?


@pytest.mark.parametrize("reference", ["", "10", "none of these"])
def test_a_reference_that_is_no_choice(reference):
    assert examine("ANSWER: B", reference)[:2] == ("unverifiable", "the reference names no choice")


def test_no_response_fails():
    assert examine(" \n")[:2] == ("fail", "no response after the thinking")


def test_verify_takes_the_choices_from_a_column(tmp_path):
    rows = [
        {
            "completion": "Hm.</think>The answer is yellow.",
            "reference_answer": "B",
            "verifier_args": {"choices": ["red", "yellow"]},
        },
        {
            "completion": "Hm.</think>The answer is red.",
            "reference_answer": "B",
            "verifier_args": {"choices": ["red", "yellow"]},
        },
        {"completion": "Hm.</think>The answer is yellow.", "reference_answer": "B", "verifier_args": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    verify(tmp_path / "in.parquet", tmp_path / "out", {}, "choice", VerdictSettings(workers=1))
    found = pq.read_table(tmp_path / "out" / "verdicts.parquet")["correctness"].to_pylist()
    assert found == ["pass", "fail", "unverifiable"]


def test_several_letters_are_one_answer_in_every_way_of_writing_them():
    for response in ("\\boxed{AC}", "The correct options are A and C.", "答案：AC"):
        assert examine(response, "A, C").outcome == examine(response, "AC").outcome == "pass"
        assert examine(response, "A").outcome != "pass"
