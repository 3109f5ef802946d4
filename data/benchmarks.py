"""Benchmarks: held-out questions, how often each is asked, with which settings, and what judges the answers."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from r1distill.data.config import Settings, execution
from r1distill.data.errors import RequestError
from r1distill.data.prompts import read_source
from r1distill.data.sources import Source


class Benchmark(Settings):
    """One benchmark; ``configs/benchmarks/<name>.yaml``. Sampling settings are DeepSeek's unless its file says why not."""

    name: str = execution()
    title: str
    source: Source
    instruction: str | dict[str, str] = ""
    k: int = Field(gt=0)  # samples a question
    limit: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int | None = None


def questions(benchmark: Benchmark) -> list[dict[str, Any]]:
    """The benchmark's questions as prompt rows, each once, in the source's order; raises where there is none."""
    rows: dict[str, dict[str, Any]] = {}
    for row, _ in read_source(benchmark.source):
        if row is not None:
            rows.setdefault(row["prompt_id"], row)
    if not rows:
        raise RequestError(f"the benchmark '{benchmark.name}' has no readable question. Check its 'source'.")
    return list(rows.values())[: benchmark.limit]
