"""Benchmarks: their held-out questions."""

from __future__ import annotations

from typing import Any

from r1distill.data.errors import RequestError
from r1distill.data.prompts import read_source
from r1distill.data.settings import Benchmark


def questions(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The benchmark's questions as prompt rows, each once, in the source's order; raises where there is none."""
    rows: dict[str, dict[str, Any]] = {}
    for row, _ in read_source(benchmark.source):
        if row is not None:
            rows.setdefault(row["prompt_id"], row)
    if not rows:
        raise RequestError(f"the benchmark '{benchmark.name}' has no readable question. Check its 'source'.")
    return list(rows.values())[: benchmark.limit]
