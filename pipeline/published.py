"""Published scores, and whether this harness reproduces them on the published checkpoints.

The figures are DeepSeek's own: the README of deepseek-ai/DeepSeek-R1, the same as arXiv:2501.12948 v1, table 5. pass@1
and cons@64 are different things: the 86.7 of Llama-70B on AIME 2024 that is often quoted is cons@64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1distill.data.settings import Benchmark
from r1distill.pipeline.metrics import Z

SOURCE = "deepseek-ai/DeepSeek-R1, README.md (arXiv:2501.12948 v1, table 5)"
TEMPERATURE, TOP_P, MAX_TOKENS = 0.6, 0.95, 32768  # of all figures; no system prompt, the answer opens with <think>


@dataclass(frozen=True)
class Column:
    """What is published on one benchmark: how many questions, how many samples of each, and a share a model."""

    questions: int | None  # None: not published; as many as we ask
    k: int
    accuracy: Mapping[str, float]
    cons: Mapping[str, float]  # over 64 samples


@dataclass(frozen=True)
class Figure:
    """One model's published score on one benchmark, in shares."""

    model: str
    accuracy: float
    cons: float | None
    questions: int | None
    k: int

    def half_width(self, questions: int) -> float:
        """Of its binomial 95% interval, which is all that can be said of a figure without its answers."""
        return Z * math.sqrt(self.accuracy * (1 - self.accuracy) / ((self.questions or questions) * self.k))

    def as_dict(self) -> dict[str, Any]:
        settings = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": MAX_TOKENS, "k": self.k}
        return {"model": self.model, "accuracy": self.accuracy, "cons": self.cons, "source": SOURCE, **settings}


_NAMES = ("R1", "Qwen-1.5B", "Qwen-7B", "Qwen-14B", "Qwen-32B", "Llama-8B", "Llama-70B")
MODELS = tuple(f"DeepSeek-R1-Distill-{name}" if name != "R1" else "DeepSeek-R1" for name in _NAMES)


def _column(questions: int | None, k: int, accuracy: str, cons: str = "") -> Column:
    """Percentages in the order of MODELS; a dash is no figure."""
    shares = [
        {
            model: round(float(text) / 100, 4)
            for model, text in zip(MODELS, line.split(), strict=bool(line))
            if text != "-"
        }
        for line in (accuracy, cons)
    ]
    return Column(questions, k, shares[0], shares[1])


# By the names of configs/benchmarks.              R1   1.5B    7B   14B   32B  L-8B L-70B
TABLE = {
    "aime2024": _column(30, 64, "79.8 28.9 55.5 69.7 72.6 50.4 70.0", "   - 52.7 83.3 80.0 83.3 80.0 86.7"),
    "math500": _column(500, 16, "97.3 83.9 92.8 93.9 94.3 89.1 94.5"),
    "gpqa-diamond": _column(198, 64, "71.5 33.8 49.1 59.1 62.1 49.0 65.2"),
    "livecodebench": _column(None, 8, "65.9 16.9 37.6 53.1 57.2 39.6 57.5"),
}


def figure(model: str | None, benchmark: str) -> Figure | None:
    """The published score of a model, by the last part of its repository's name; None where there is none."""
    column = TABLE.get(benchmark)
    name = (model or "").rpartition("/")[2]
    if column is None or name not in column.accuracy:
        return None
    return Figure(name, column.accuracy[name], column.cons.get(name), column.questions, column.k)


def reproduced(benchmark: Benchmark, repo: str, its: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether the twin's own answers (``its``: a summary of them) give the published figure; None where there is none.

    |ours - published| must not exceed sqrt(a² + b²): a is half of our bootstrap 95% interval over questions, b half of
    the figure's binomial 95% interval over its questions x samples. On the 30 questions of AIME that is wide, on the
    500 of MATH narrow.
    """
    published = figure(repo, benchmark.name)
    if published is None:
        return None
    ours = its["accuracy"]
    tolerance = math.hypot((its["high"] - its["low"]) / 2, published.half_width(its["questions"]))
    asked = f"{its['questions']} questions × {its['k']}"
    odd = _other_settings(benchmark)
    passed = not odd and abs(ours - published.accuracy) <= tolerance
    message = (
        f"{published.model} on {benchmark.title}: {ours:.1%} here ({asked}), published {published.accuracy:.1%} "
        f"(k = {published.k}); {abs(ours - published.accuracy):.1%} apart, {tolerance:.1%} allowed"
    )
    if odd:
        message += f"; asked with other settings than the published ones: {odd}"
    return {
        "benchmark": benchmark.name,
        "published": published.as_dict(),
        "accuracy": ours,
        "low": its["low"],
        "high": its["high"],
        "tolerance": tolerance,
        "passed": passed,
        "message": message,
    }


def _other_settings(benchmark: Benchmark) -> str:
    """How a benchmark is asked otherwise than for the published figures; "" where it is not."""
    wanted = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": MAX_TOKENS, "limit": None}
    found = {name: getattr(benchmark, name) for name in wanted}
    return ", ".join(f"{name} {found[name]}, not {value}" for name, value in wanted.items() if found[name] != value)
