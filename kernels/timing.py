"""Seconds and peak memory of a call, on a GPU by its own clock; on the CPU only to try a benchmark's code."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def measure(
    call: Callable[[], Any], device: str, *, seconds: float = 3.0, least: int = 5, most: int = 30
) -> dict[str, Any]:
    """{median, runs: [seconds], peak_bytes} after two runs of warm-up; ``least`` to ``most`` runs in about ``seconds``.

    peak_bytes is what PyTorch's allocator held at most during a call beyond what it held after the one before: inputs,
    and the gradients that such a call leaves behind, are not in it. None on the CPU.
    """
    call()
    peak = None
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        call()
    runs: list[float] = []
    began = time.monotonic()
    while len(runs) < least or (len(runs) < most and time.monotonic() - began < seconds):
        runs.append(_timed(call, device))
    return {"median": statistics.median(runs), "runs": runs, "peak_bytes": peak}


def _timed(call: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        began = time.monotonic()
        call()
        return time.monotonic() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def gemm_flops(device: str) -> dict[str, Any]:
    """The measured rate of bfloat16 products, FLOP/s: large and square, about two seconds of them."""
    size = 8192 if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    done = measure(lambda: torch.mm(left, right, out=out), device, seconds=2.0, least=20, most=2000)
    return {"size": size, "median": done["median"], "flops": 2 * size**3 / done["median"]}
