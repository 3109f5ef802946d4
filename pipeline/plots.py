"""The report's plots: PNG bytes from rows, the same bytes for the same rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INCHES = (5.2, 3.6)  # of one panel
DPI = 110
BINS = 24

Benchmarks = Mapping[str, Mapping[str, Any]]  # name: its part of scores.json


def accuracy_against_tokens(benchmarks: Benchmarks) -> bytes | None:
    """Mean tokens and pass@1 with its interval, a panel a benchmark; the published figure is a line. None where no
    server counted tokens."""
    shown = {
        name: {model: row for model, row in bench["models"].items() if row["mean_tokens"] is not None}
        for name, bench in benchmarks.items()
    }
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return None
    figure, panels = _figure(len(shown))
    for panel, (name, rows) in zip(panels, shown.items(), strict=True):
        for model, row in rows.items():
            x, y = row["mean_tokens"], 100 * row["accuracy"]
            spread = [[max(0.0, y - 100 * row["low"])], [max(0.0, 100 * row["high"] - y)]]
            panel.errorbar([x], [y], yerr=spread, fmt="o", capsize=3, label=model)
        if published := benchmarks[name].get("published"):
            panel.axhline(100 * published["accuracy"], linestyle="--", color="grey", label="published")
        _named(panel, benchmarks[name]["title"], "mean tokens an answer", "pass@1, %")
        panel.set_ylim(-2, 102)
    return _png(figure)


def lengths(benchmarks: Benchmarks, answers: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Which share of the answers has how many tokens, a line a model, a panel a benchmark; None where none is known."""
    found: dict[str, dict[str, list[int]]] = {}
    for row in answers:
        if row["completion_tokens"] is not None:
            found.setdefault(row["benchmark"], {}).setdefault(row["model"], []).append(row["completion_tokens"])
    if not found:
        return None
    figure, panels = _figure(len(found))
    for panel, (name, models) in zip(panels, found.items(), strict=True):
        longest = max(max(counts) for counts in models.values())
        edges = [longest * place / BINS for place in range(BINS + 1)]
        for model, counts in models.items():
            shares = [100 / len(counts)] * len(counts)
            panel.hist(counts, bins=edges, weights=shares, histtype="step", label=model)
        _named(panel, benchmarks[name]["title"], "tokens", "answers, %")
    return _png(figure)


def accuracy_by_difficulty(benchmarks: Benchmarks, answers: Sequence[Mapping[str, Any]]) -> bytes | None:
    """pass@1 of each model on the questions that their source calls equally hard; None where no source does."""
    found: dict[str, dict[str, dict[str, list[bool]]]] = {}
    for row in answers:
        if row["difficulty"] is not None:
            models = found.setdefault(row["benchmark"], {})
            models.setdefault(row["model"], {}).setdefault(row["difficulty"], []).append(row["correct"])
    if not found:
        return None
    figure, panels = _figure(len(found))
    for panel, (name, models) in zip(panels, found.items(), strict=True):
        levels = sorted({level for counts in models.values() for level in counts}, key=_rank)
        width = 0.8 / len(models)
        for place, (model, counts) in enumerate(models.items()):
            shares = [100 * sum(counts[level]) / len(counts[level]) if level in counts else 0.0 for level in levels]
            panel.bar(
                [n + width * (place - (len(models) - 1) / 2) for n in range(len(levels))], shares, width, label=model
            )
        panel.set_xticks(range(len(levels)), levels, fontsize=7)
        _named(panel, benchmarks[name]["title"], "difficulty, or kind, as its source says", "pass@1, %")
        panel.set_ylim(0, 102)
    return _png(figure)


def pass_rates(shares: Sequence[float]) -> bytes | None:
    """How many prompts the teacher answered rightly how often."""
    if not shares:
        return None
    figure, (panel,) = _figure(1)
    panel.hist([100 * share for share in shares], bins=[-5 + 10 * n for n in range(12)])
    _named(panel, "Training prompts", "right traces of a prompt, %", "prompts", legend=False)
    return _png(figure)


def arms(bench: Mapping[str, Any]) -> bytes:
    """pass@1 of a study's arms with its interval, and each seed's as a dot."""
    figure, (panel,) = _figure(1)
    for place, row in enumerate(bench["arms"]):
        y = 100 * row["accuracy"]
        spread = [[max(0.0, y - 100 * row["low"])], [max(0.0, 100 * row["high"] - y)]]
        panel.errorbar([place], [y], yerr=spread, fmt="_", capsize=4, color="black")
        panel.plot([place] * len(row["by_seed"]), [100 * each for each in row["by_seed"]], "o", alpha=0.5)
    panel.set_xticks(range(len(bench["arms"])), [row["arm"] for row in bench["arms"]])
    _named(panel, bench["title"], "", "pass@1, %", legend=False)
    panel.set_ylim(-2, 102)
    return _png(figure)


def _rank(level: str) -> tuple[int, str]:
    """Numbers by size, LiveCodeBench's words by what they mean, others by name."""
    words = ("easy", "medium", "hard")
    if level.isdigit():
        return int(level), ""
    return (words.index(level), "") if level in words else (len(words), level)


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(INCHES[0] * columns, INCHES[1] * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for spare in axes[panels:]:
        spare.set_visible(False)
    return figure, list(axes[:panels])


def _named(panel: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    if legend:
        panel.legend(fontsize=7)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
