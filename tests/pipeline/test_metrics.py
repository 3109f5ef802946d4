"""The arithmetic of scores, as properties: against brute force, over seeds, with the traps that published scores fell into."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from r1distill.pipeline.metrics import consensus, interval, over_runs, paired, paired_runs, pass_at, summary


def answers(*questions: str, votes: list[list[int | None]] | None = None, tokens: int | None = 10) -> list[dict]:
    """One string a question: c correct, w wrong, t truncated."""
    reasons = {"c": None, "w": "correctness: wrong answer", "t": "truncated"}
    return [
        {
            "prompt_id": f"q{number}",
            "correct": letter == "c",
            "reason": reasons[letter],
            "loops": False,
            "vote": votes[number][sample] if votes else None,
            "completion_tokens": tokens,
        }
        for number, letters in enumerate(questions)
        for sample, letter in enumerate(letters)
    ]


def test_pass_at_k_is_what_drawing_k_of_the_answers_gives():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_1_is_the_accuracy_and_pass_at_k_grows_with_k():
    row = summary(answers("ccww", "cwww", "wwww", "cccc"))
    values = [row["pass_at"][k] for k in ("1", "2", "4")]
    assert values[0] == pytest.approx(row["accuracy"]) == pytest.approx((0.5 + 0.25 + 0 + 1) / 4)
    assert values == sorted(values) and values[-1] == 3 / 4


def test_accuracy_and_pass_at_2_do_not_change_in_expectation_with_k():
    """More samples make an estimate surer and not higher, of pass@k too: the estimator is unbiased."""
    draw, chances = np.random.default_rng(3), (0.1, 0.5, 0.9)
    found = {}
    for k in (2, 4, 16):
        rows = [
            summary(answers(*("".join(draw.choice(["c", "w"], k, p=[p, 1 - p])) for p in chances))) for _ in range(300)
        ]
        found[k] = [np.mean([row["accuracy"] for row in rows]), np.mean([row["pass_at"]["2"] for row in rows])]
    truth = [np.mean(chances), np.mean([1 - (1 - p) ** 2 for p in chances])]
    for k, values in found.items():
        assert values == pytest.approx(truth, abs=0.03), k


def test_a_truncated_answer_is_wrong_and_its_share_is_shown():
    row = summary(answers("ct", "tt", "cc"))
    assert row["accuracy"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert row["truncated"] == pytest.approx(3 / 6)


def test_every_question_counts_alike_however_often_it_was_asked():
    row = summary(answers("cccccccc", "w"))
    assert row["accuracy"] == 0.5
    assert (row["questions"], row["k"]) == (2, 1)


def test_tokens_a_correct_answer_are_all_tokens_over_the_right_ones():
    row = summary(answers("cw", "ww"))
    assert (row["mean_tokens"], row["tokens_per_correct"]) == (10, 40)
    assert summary(answers("ww"))["tokens_per_correct"] is None
    unknown = summary(answers("cw", tokens=None))
    assert unknown["mean_tokens"] is None and unknown["tokens_per_correct"] is None


def test_consensus_is_the_most_frequent_answer_whatever_single_answers_say():
    # Right twice, wrong three times in three ways: the majority is right although most answers are wrong.
    assert consensus([answers("ccwww", votes=[[0, 0, 1, 2, 3]])]) == (1.0, 0)
    assert consensus([answers("cwwcw", votes=[[0, 1, 1, 0, 1]])]) == (0.0, 0)


def test_a_tie_counts_the_share_of_its_answers_that_are_right_and_is_counted():
    assert consensus([answers("ccww", votes=[[0, 0, 1, 1]])]) == (0.5, 1)
    assert consensus([answers("cww", votes=[[0, 1, 2]])]) == (pytest.approx(1 / 3), 1)


def test_what_was_cut_off_does_not_vote():
    assert consensus([answers("cttt", votes=[[0, None, None, None]])]) == (1.0, 0)
    assert consensus([answers("cc", votes=[[0, 0]]), answers("tt", votes=[[None, None]])]) == (0.5, 0)
    assert consensus([answers("cw", votes=[[None, None]])]) == (None, 0)  # programs have no answers to count


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        low, high = interval(list(draw.binomial(1, 0.7, 100).astype(float)))
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_sees_what_two_intervals_hide():
    """Questions of every difficulty, one model a little better on each: the intervals overlap, the difference is plain."""
    draw = np.random.default_rng(1)
    base = {f"q{n}": float(p) for n, p in enumerate(draw.uniform(0, 0.9, 60))}
    better = {key: value + 0.05 + 0.02 * draw.standard_normal() for key, value in base.items()}
    assert interval(list(better.values()))[0] < interval(list(base.values()))[1]
    found = paired(better, base)
    assert found["verdict"] == "better" and found["low"] > 0
    assert paired(base, better)["verdict"] == "worse"


def test_paired_calls_noise_nothing():
    draw = np.random.default_rng(5)
    verdicts = []
    for _ in range(100):
        one, other = ({f"q{n}": float(v) for n, v in enumerate(draw.binomial(4, 0.5, 40) / 4)} for _ in range(2))
        verdicts.append(paired(one, other)["verdict"])
    assert verdicts.count("open") >= 88


def test_paired_looks_only_at_questions_that_both_were_asked():
    found = paired({"a": 1.0, "b": 1.0}, {"b": 1.0, "c": 0.0})
    assert (found["questions"], found["difference"], found["verdict"]) == (1, 0.0, "open")
    assert paired({"a": 1.0}, {"b": 0.0})["questions"] == 0


def runs_of(draw: np.random.Generator, runs: int, questions: int, gain: float = 0.0) -> list[dict[str, float]]:
    """Runs and questions of which some are better than others, around 0.5 + ``gain``."""
    of_runs, of_questions = draw.normal(0, 0.05, (runs, 1)), draw.normal(0, 0.2, questions)
    values = 0.5 + gain + of_runs + of_questions + draw.normal(0, 0.1, (runs, questions))
    return [{f"q{n}": float(value) for n, value in enumerate(row)} for row in values]


def test_over_runs_covers_the_truth_though_runs_and_questions_both_vary():
    draw = np.random.default_rng(11)
    found = [over_runs(runs_of(draw, 8, 60)) for _ in range(200)]
    covered = sum(one["low"] <= 0.5 <= one["high"] for one in found) / len(found)
    assert 0.88 <= covered <= 1.0
    alone = [interval([value for run in runs_of(draw, 8, 60) for value in run.values()]) for _ in range(40)]
    assert sum(low <= 0.5 <= high for low, high in alone) / 40 < 0.8  # as if all answers were independent: too narrow


def test_over_runs_of_one_run_is_the_interval_over_questions():
    (run,) = runs_of(np.random.default_rng(2), 1, 50)
    found = over_runs([run])
    assert (found["low"], found["high"]) == interval([run[key] for key in sorted(run)])
    assert found["questions"] == 50


def test_paired_runs_is_paired_for_one_run_and_draws_seeds_together():
    draw = np.random.default_rng(4)
    theirs = runs_of(draw, 3, 40)
    better = [{key: value + 0.02 for key, value in run.items()} for run in theirs]
    found = paired_runs(better, theirs)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((0.02, 0.02, 0.02))
    assert found["verdict"] == "better" and paired_runs(theirs, better)["verdict"] == "worse"
    assert paired_runs(better[:1], theirs[:1]) == paired(better[0], theirs[0])
    noise = [paired_runs(runs_of(draw, 3, 40), runs_of(draw, 3, 40))["verdict"] for _ in range(100)]
    assert noise.count("open") >= 80  # three seeds say little of how seeds vary
