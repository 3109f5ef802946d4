"""Counts, means, variances and a histogram, as plain arithmetic has them."""

from __future__ import annotations

import random
import statistics

import pytest

from r1distill.teacher.lengths import Lengths, Moments


def test_moments_are_those_of_the_statistics_module():
    draw = random.Random(0)
    values = [1e9 + draw.lognormvariate(8, 1) for _ in range(1000)]
    moments = Moments()
    for value in values:
        moments.add(value)
    found = moments.summary()
    assert found["count"] == 1000
    assert found["mean"] == pytest.approx(statistics.mean(values))
    assert found["variance"] == pytest.approx(statistics.variance(values), rel=1e-6)
    assert Moments().summary() == {"count": 0, "mean": None, "variance": None}


def test_answers_fall_between_powers_of_two():
    found = Lengths()
    for tokens in (0, 1, 2, 3, 4, 5, 1024, 1025):
        found.add("done", tokens, 1.0, None)
    found.add("truncated", 1500, 2.0, 0.5)
    found.add("failed", None, 9.0, None)
    found.add("refused", 3, None, None)
    summary = found.summary()
    rows = [(row["up_to"], row["done"], row["truncated"]) for row in summary["histogram"]]
    assert rows == [(1, 2, 0), (2, 1, 0), (4, 2, 0), (8, 1, 0), (1024, 1, 0), (2048, 1, 1)]
    assert summary["states"] == {"done": 8, "truncated": 1, "failed": 1, "refused": 1}
    assert summary["truncated_share"] == pytest.approx(1 / 11)
    assert (summary["completion_tokens"]["count"], summary["seconds"]["count"], summary["cost_usd"]["mean"]) == (
        9,
        10,
        0.5,
    )
    assert str(found).splitlines()[-1].split() == ["2,048", "1", "1", "####################!!!!!!!!!!!!!!!!!!!!"]
