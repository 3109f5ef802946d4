"""Gates: what a checkpoint and each of its variants must reach before anybody downloads them.

A gate's verdict is {name, model, passed, message}. A variant whose gate failed is withheld; a failed checkpoint stops
publication. Summaries are those of ``metrics.summary``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from r1distill.students.catalogue import VariantGate

Verdict = dict[str, Any]
Summary = Mapping[str, Any]


def held(model: str, what: str, value: float, limit: float, *, at_least: bool = True, form: str = ".1%") -> Verdict:
    """``value`` against ``limit``, in words; ``form`` is how the two are written."""
    passed = value >= limit if at_least else value <= limit
    sign = "at least" if at_least else "at most"
    message = f"{what}: {value:{form}}, the gate wants {sign} {limit:{form}}"
    return {"name": what, "model": model, "passed": passed, "message": message}


def variant(name: str, gate: VariantGate, its: Summary, checkpoints: Summary) -> Iterator[Verdict]:
    """A variant against its checkpoint, both summarised over the questions that the variant was asked."""
    recovered = its["accuracy"] / checkpoints["accuracy"] if checkpoints["accuracy"] else 1.0
    yield held(name, "recovered accuracy", recovered, gate.min_recovered)
    rise = its["truncated"] - checkpoints["truncated"]
    yield held(name, "rise in truncation", rise, gate.max_truncation_rise, at_least=False)
