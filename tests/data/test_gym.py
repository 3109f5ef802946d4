"""reasoning-gym's own scorers: their own answers pass in any dress, and what comes from a model is not run."""

import importlib.metadata
import json
from fractions import Fraction

import pytest
import reasoning_gym

from r1distill.data import verdicts
from r1distill.data.errors import R1DistillError
from r1distill.data.verdicts import Item, VerdictSettings
from r1distill.data.verify import gym

# Of every kind: plain answers, words, grids, lists, several right answers, tuples and sets in the metadata.
TASKS = ["chain_sum", "basic_arithmetic", "letter_jumble", "spiral_matrix", "n_queens", "mini_sudoku", "countdown", "knights_knaves",
         "shortest_path", "simple_integration", "string_insertion", "bitwise_arithmetic", "family_relationships",
         "palindrome_generation", "polynomial_equations", "syllogism", "zebra_puzzles", "rearc"]  # fmt: skip


def one_of(task, seed=3):
    [item] = reasoning_gym.create_dataset(task, size=1, seed=seed)
    return item


def examine(response, item, task):
    return gym.examine(response, item["answer"], item["question"], json.loads(gym.arguments(task, item)))


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_own_answer_passes_and_another_fails(task):
    item = one_of(task)
    answer = item["answer"]
    for response in (
        f"So it is.\n\n<answer>{answer}</answer>",
        f"So:\n\n```\n{answer}\n```",
        f"**Final answer:** {answer}",
    ):
        assert examine(response, item, task).outcome == "pass", (response, examine(response, item, task))
    if "\n" not in answer:
        assert examine(f"It is $\\boxed{{{answer}}}$.", item, task).outcome == "pass"
    finding = examine("<answer>7777777</answer>", item, task)
    assert finding[:2] == ("fail", "wrong answer"), finding


def test_another_right_answer_passes():
    metadata = {"numbers": [4, 3, 2], "target": 24, "difficulty": {}}
    item = {"question": "Make 24 of 4, 3 and 2.", "answer": "4*3*2", "metadata": metadata}
    assert examine("\\boxed{(2*4)*3}", item, "countdown").outcome == "pass"
    assert examine("\\boxed{2*4*4}", item, "countdown").outcome == "fail"


def test_a_task_without_an_answer_of_its_own():
    item = one_of("rubiks_cube")
    assert item["answer"] is None
    assert examine("<answer>U</answer>", item, "rubiks_cube").outcome == "fail"
    one = Item("p", 0, item["question"], "", "Hm.", "<answer>U</answer>", verifier="reasoning_gym", domain="logic",
               verifier_args=gym.arguments("rubiks_cube", item))  # fmt: skip
    [judged] = verdicts.judge(VerdictSettings(workers=1), [one])
    [row] = [row for row in judged.verdicts if row["check"] == "correctness"]
    assert (row["outcome"], row["version"]) == ("fail", gym.VERSION)


@pytest.mark.parametrize(
    "value",
    [
        {"a": (1, (2, 3)), "b": {4, 5}, "c": {6: "six", (7, 8): None}, "d": [True, 0.5]},
        {"tuple": [1]},
        {"set": {"dict": []}},
        {"dict": 1, "more": 2},
        {},
        {"empty": ((), set(), {}, [])},
    ],
)
def test_metadata_survives_the_way_through_json(value):
    written = gym.arguments("a task", {"metadata": value})
    assert gym._read(json.loads(written)["metadata"]) == value
    assert json.loads(written).keys() == {"task", "metadata"}


def test_metadata_that_cannot_be_written_is_an_error():
    import numpy

    with pytest.raises(R1DistillError, match="'a task'.*Fraction"):
        gym.arguments("a task", {"metadata": {"half": Fraction(1, 2)}})
    assert json.loads(gym.arguments("t", {"metadata": {"n": numpy.arange(2)}}))["metadata"] == {"n": [0, 1]}


@pytest.mark.parametrize(
    "task", ["n_queens", "spiral_matrix", "simple_integration", "countdown", "polynomial_multiplication"]
)
def test_an_answer_is_never_run(task, tmp_path):
    """Their scorers evaluate the answer as Python, or through sympy, which does so too."""
    mark = tmp_path / "ran"
    item = one_of(task)
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for answer in (touch, f"[{touch}]", f"sin({touch!r})", f"3! + {touch}", f"(lambda: {touch})()", f"f'{{{touch}}}'"):
        finding = examine(f"<answer>{answer}</answer>", item, task)
        assert finding.outcome != "pass"
        assert not mark.exists(), answer
    assert examine(f"<answer>{touch}</answer>", item, task)[:2] == ("unverifiable", "the answer could run as code")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "the task can't be read"),
        ({"task": "chain_sum"}, "the task can't be read"),
        ({"task": "astrology", "metadata": {}}, "reasoning-gym has no such task"),
    ],
)
def test_what_is_no_task_is_open(arguments, reason):
    assert gym.examine("4", "4", "", arguments)[:2] == ("unverifiable", reason)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is 4.\n<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no <answer>4</answer>", "4"),
        ("\\boxed{\\text{knight}}", "knight"),
        ("Grid:\n```text\n1 2\n3 4\n```\nDone.", "1 2\n3 4"),
        ("So.\n\n**Answer:** up down\n\nBye.", "up down"),
        ("up down", "up down"),
        ("1 2\n3 4", "1 2\n3 4"),
        ("The result of the sum is 12.", "12"),
    ],
)
def test_what_the_scorer_sees(response, answer):
    assert gym.answer_of(response) == answer


def test_the_version_names_the_installed_scorers():
    assert gym.VERSION.endswith(f"reasoning-gym {importlib.metadata.version('reasoning-gym')}")
