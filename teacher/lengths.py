"""How long answers are, and what became of them: counts, means and variances, and a histogram by powers of two."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Moments:
    """Count, mean and variance of numbers that are seen once (Welford's way: no large sums are subtracted)."""

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        """Take one more number in."""
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self._squares += step * (value - self.mean)

    def summary(self) -> dict[str, Any]:
        """``variance`` is the sample's (n - 1), and None of fewer than two."""
        variance = self._squares / (self.count - 1) if self.count > 1 else None
        return {"count": self.count, "mean": self.mean if self.count else None, "variance": variance}


@dataclass
class Lengths:
    """The answers to an order, as they are gone through."""

    states: Counter[str] = field(default_factory=Counter)
    tokens: Moments = field(default_factory=Moments)  # completion tokens of done and truncated answers
    seconds: Moments = field(default_factory=Moments)
    cost_usd: Moments = field(default_factory=Moments)
    _histogram: dict[int, Counter[str]] = field(default_factory=dict)  # by exponent of two

    def add(self, state: str, tokens: int | None, seconds: float | None, cost_usd: Any) -> None:
        """Take one answer in; what the server did not tell is left out."""
        self.states[state] += 1
        if seconds is not None:
            self.seconds.add(seconds)
        if cost_usd is not None:
            self.cost_usd.add(float(cost_usd))
        if tokens is not None and state in ("done", "truncated"):
            self.tokens.add(tokens)
            self._histogram.setdefault((max(tokens, 1) - 1).bit_length(), Counter())[state] += 1

    def summary(self) -> dict[str, Any]:
        """What is needed to tell from some answers what many more will take, in JSON values.

        ``histogram`` has a row for each power of two: answers of more than half ``up_to`` tokens and at most that.
        """
        total = self.states.total()
        return {
            "states": dict(self.states),
            "truncated_share": self.states["truncated"] / total if total else None,
            "completion_tokens": self.tokens.summary(),
            "seconds": self.seconds.summary(),
            "cost_usd": self.cost_usd.summary(),
            "histogram": [
                {"up_to": 2**power, "done": counts["done"], "truncated": counts["truncated"]}
                for power, counts in sorted(self._histogram.items())
            ],
        }

    def __str__(self) -> str:
        found = self.summary()["histogram"]
        widest = max((row["done"] + row["truncated"] for row in found), default=1)
        lines = [f"{'tokens up to':>12} {'done':>9} {'truncated':>9}"]
        for row in found:
            bar = "#" * round(40 * row["done"] / widest) + "!" * round(40 * row["truncated"] / widest)
            lines.append(f"{row['up_to']:12,} {row['done']:9,} {row['truncated']:9,} {bar}")
        return "\n".join(lines)
