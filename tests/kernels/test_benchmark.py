"""The GPU benchmark's own code, at tiny shapes on the CPU: what it would measure is computed right, its table says so."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from r1distill.kernels import bench
from r1distill.kernels.topk_kl import benchmark


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert bench.main() == 2
    assert "there is none here" in capsys.readouterr().err


def records(capsys, name):
    assert bench.part(name, "cpu") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ["ours", "ours, K = 0", "ours, dW in float32", "dense", "ours again"])
def test_losses_are_those_expected(capsys, name):
    found = records(capsys, name)
    assert [(one["width"], one["vocab"]) for one in found] == list(bench.TINY)
    for one in found:
        assert one["loss"] == pytest.approx(one["expected"], rel=1e-4) and len(one["runs"]) >= 5


def test_scores_and_product(capsys):
    for name in ("token_scores", "product", "product and torch.topk"):
        assert all(one["median"] > 0 for one in records(capsys, name))


def test_what_fails_is_told_with_its_reason(capsys, monkeypatch):
    def missing(one):
        raise ImportError("no such peer")

    monkeypatch.setitem(benchmark.CONTENDERS, "Liger", (missing, "ce"))
    assert [one["error"] for one in records(capsys, "Liger")] == ["ImportError: no such peer"] * 2


def test_the_check_finds_a_wrong_kernel(monkeypatch):
    from r1distill.kernels.topk_kl import reference

    monkeypatch.setattr(benchmark, "CASES", benchmark.CASES[1:2])
    assert not benchmark.check("cpu")
    monkeypatch.setattr(benchmark, "TERMS", benchmark.TERMS[:1])
    right = reference.losses_

    def wrong(logits, *inputs, **options):
        losses = right(logits, *inputs, **options)
        if logits.dtype != torch.float64:
            logits *= 1.05
        return losses

    monkeypatch.setattr(reference, "losses_", wrong)
    assert any("gradient" in fault for fault in benchmark.check("cpu"))


def test_table():
    def timed(part, median, peak=None, **more):
        shape = {"tokens": 32768, "width": 3584, "vocab": 152_064}
        return {"part": part, **shape, "median": median, "runs": [median], "peak_bytes": peak, **more}

    table = bench.table(
        [
            {"part": "machine", "card": "A card", "at": "now", "versions": {"torch": "2", "veomni": None}},
            {"part": "floor", "flops": 7e14, "median": 1.0},
            timed("ours", 0.2, 700_000_000, loss=1.0, expected=1.0, computes="kl + ce"),
            timed("VeOmni", 0.5, 6_000_000_000, loss=1.0, expected=1.0),
            timed("Liger", 0.1, 900_000_000, loss=1.0, expected=1.001),
            timed("token_scores", 0.06, 800_000_000),
            timed("product", 0.052),
            {"part": "QuACK", "error": "ImportError: no module"},
        ]
    )
    assert "A card, now: torch 2, veomni missing" in table
    assert "| forward and backward | 3,584, 152,064 | 200.0 ms | 500.0 ms (VeOmni) | 0.400 | ≤ 0.5 | met |" in table
    assert "| 200.0 ms | 100.0 ms (Liger) | 2.000 | ≤ 1.1 | missed |" in table
    assert (
        "| peak memory beyond inputs and gradients | 3,584, 152,064 | 0.70 GB | 1.3 GB | 0.538 | ≤ 1 | met |" in table
    )
    assert "| share of the GEMM floor | 3,584, 152,064 | 200.0 ms | 153.1 ms | 0.765 | ≥ 0.75 | met |" in table
    assert (
        "| token_scores beside the product | 3,584, 152,064 | 60.0 ms | 52.0 ms (product) | 1.154 | ≤ 1.2 | met |"
        in table
    )
    assert "- QuACK: ImportError: no module" in table
