"""The arithmetic of scores: means over k, intervals over questions, truncation counted, gates on the same questions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from r1distill.pipeline import report
from r1distill.pipeline.metrics import summary
from r1distill.pipeline.scores import gates
from r1distill.pipeline.variants import tokens_per_second
from r1distill.students.catalogue import Gate, GgufVariant, VariantGate


def answers(model: str, *questions: str, benchmark: str = "sums") -> list[dict]:
    """One string a question: c correct, w wrong, t truncated."""
    reasons = {"c": None, "w": "correctness: wrong answer", "t": "truncated"}
    return [
        {
            "model": model,
            "benchmark": benchmark,
            "prompt_id": f"q{number}",
            "sample": sample,
            "correct": letter == "c",
            "reason": reasons[letter],
            "loops": False,
            "vote": None,
            "completion_tokens": 10,
        }
        for number, letters in enumerate(questions)
        for sample, letter in enumerate(letters)
    ]


def test_accuracy_is_the_mean_over_questions_and_a_truncated_answer_is_wrong():
    row = summary(answers("student", "cc", "cw", "ct", "ww"))
    assert row["accuracy"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert row["truncated"] == pytest.approx(1 / 8)
    assert (row["questions"], row["k"], row["mean_tokens"]) == (4, 2, 10)
    assert row["low"] <= row["accuracy"] <= row["high"]


def test_accuracy_does_not_change_in_expectation_with_k():
    draw = np.random.default_rng(3)
    means = {
        k: np.mean([summary(answers("m", *("".join(draw.choice(["c", "w"], k, p=[p, 1 - p])) for p in (0.2, 0.9))))["accuracy"]
                    for _ in range(400)])
        for k in (1, 8)
    }  # fmt: skip
    assert means[1] == pytest.approx(means[8], abs=0.03)


def run(**gate):
    variant = GgufVariant(kind="gguf", gate=VariantGate(min_recovered=0.8, max_truncation_rise=0.1))
    return SimpleNamespace(student=SimpleNamespace(gate=Gate(**gate), variants={"q4": variant}))


MADE = {"q4": {"problems": [], "kl": 0.01}}


def gated(settings, rows: list[dict], made: dict = MADE, readings: dict = {}) -> list[dict]:  # noqa: B006
    return gates(settings, rows, made, readings)


def failed(found: list[dict]) -> set[str]:
    return {gate["model"] for gate in found if not gate["passed"]}


def test_a_variant_is_held_against_the_checkpoint_on_the_questions_that_it_was_asked():
    student = answers("student", "cc", "cc", "ww", "ww")
    base, teacher = answers("base", "ww", "ww", "ww", "ww"), answers("teacher", "cc", "cc", "cw", "ww")
    good = gated(run(), base + teacher + student + answers("q4", "cc", "cc"))
    assert not failed(good)
    # Right on half of what the checkpoint gets right on the same questions: 50%, although the checkpoint has 50% overall.
    assert failed(gated(run(), base + teacher + student + answers("q4", "cc", "ww"))) == {"q4"}
    assert failed(gated(run(), base + teacher + student + answers("q4", "cc", "ct"))) == {"q4"}


def test_beside_a_checkpoint_that_answers_nothing_a_variant_shows_nothing():
    rows = [row for model in ("student", "q4") for row in answers(model, "ww", "ww")]
    (gate,) = [gate for gate in gated(run(), rows) if not gate["passed"]]
    assert gate["model"] == "q4" and "nothing is shown" in gate["message"]


def test_the_checkpoint_fails_below_its_gain_or_its_share_of_the_teacher():
    base, teacher = answers("base", "ww", "cw"), answers("teacher", "cc", "cc")
    student, variant = answers("student", "cc", "ww"), answers("q4", "cc", "ww")
    everything = base + teacher + student + variant
    assert failed(gated(run(min_gain=0.25, min_share_of_teacher=0.5), everything)) == set()
    assert failed(gated(run(min_gain=0.3), everything)) == {"checkpoint"}
    assert failed(gated(run(min_share_of_teacher=0.8), everything)) == {"checkpoint"}


def test_a_variant_fails_by_its_files_its_divergence_its_loops_or_by_what_its_runtime_reads():
    everything = [row for model in ("base", "student", "q4") for row in answers(model, "cc", "cc")]
    assert failed(gated(run(), everything)) == set()
    assert failed(gated(run(), everything, {"q4": {"problems": [], "kl": 0.2}})) == {"q4"}
    wrong = ["conversation 1 differs at token 3: 7, expected 2"]
    assert failed(gated(run(), everything, MADE, {"q4": wrong})) == {"q4"}
    assert failed(gated(run(), everything, MADE, {"student": wrong})) == {"checkpoint"}
    looping = [{**row, "loops": row["model"] == "q4"} for row in everything]
    assert failed(gated(run(), looping)) == {"q4"}
    # Files that are not sound are not served, so there are no answers to look at.
    unasked = [row for row in everything if row["model"] != "q4"]
    (gate,) = [
        gate for gate in gated(run(), unasked, {"q4": {"problems": ["x is missing"], "kl": None}}) if not gate["passed"]
    ]
    assert gate["model"] == "q4" and "x is missing" in gate["message"]


def test_speed_is_told_of_the_time_in_which_something_was_asked():
    def asked(end: str, seconds: float, tokens: int) -> dict:
        return {"created_at": f"2026-01-01T00:00:{end}+00:00", "seconds": seconds, "completion_tokens": tokens}

    # Two at a time for ten seconds, a pause, and one of five seconds.
    rows = [asked("10", 10, 100), asked("10", 8, 80), asked("50", 5, 30)]
    assert tokens_per_second(rows) == pytest.approx(210 / 15)
    assert tokens_per_second([]) is None


def test_a_gates_words_are_shown_as_they_are():
    """A token's name, or a piece of a template, may look like the terminal's markup."""
    out = Console(record=True, width=200)
    gate = {"model": "q4_k_m", "passed": False, "message": "token 5 is '[/INST]', expected '[bold]'"}
    scores = {"benchmarks": {}, "reproduction": {"applies": False, "reason": "no twin"}, "gates": [gate]}
    report._show_scores(scores, out)
    assert "token 5 is '[/INST]', expected '[bold]'" in out.export_text()
