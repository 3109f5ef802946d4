"""Gates: what a checkpoint and each of its variants must reach before anybody downloads them.

A gate's verdict is {name, model, passed, message}, and value where it is a number. A variant whose gate failed is
withheld; a failed checkpoint stops publication. Summaries are those of ``metrics.summary``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r1distill.students.catalogue import VariantGate

Verdict = dict[str, Any]
Summary = Mapping[str, Any]
WORDS = {"truncated": "truncation", "looped": "loops"}


def held(model: str, what: str, value: float, limit: float, *, at_least: bool = True, form: str = ".1%") -> Verdict:
    """``value`` against ``limit``, in words; ``form`` is how the two are written."""
    passed = value >= limit if at_least else value <= limit
    sign = "at least" if at_least else "at most"
    message = f"{what}: {value:{form}}, the gate wants {sign} {limit:{form}}"
    return {"name": what, "model": model, "passed": passed, "message": message, "value": value}


def sound(model: str, problems: Sequence[str]) -> Verdict:
    """Whether nothing is wrong with a model's files, and its runtime reads what the checkpoint's tokenizer reads."""
    words = "; ".join(problems) or "nothing wrong with files, template and tokens"
    return {"name": "soundness", "model": model, "passed": not problems, "message": words}


def variant(
    name: str,
    gate: VariantGate,
    made: Mapping[str, Any],
    readings: Sequence[str],
    its: Summary | None,
    checkpoints: Summary | None,
) -> Iterator[Verdict]:
    """A variant against its checkpoint, both summarised over the questions that the variant was asked.

    ``made`` is what the variants stage found out: problems of its files, and the divergence on held-out traces.
    ``readings`` are what its runtime reads otherwise. Without summaries nothing was asked of it.
    """
    yield sound(name, [*made.get("problems", ()), *readings])
    if made.get("kl") is not None and gate.max_kl is not None:
        yield held(name, "divergence in nats", made["kl"], gate.max_kl, at_least=False, form=".4f")
    if its is None or checkpoints is None:
        return
    if checkpoints["accuracy"]:
        yield held(name, "recovered accuracy", its["accuracy"] / checkpoints["accuracy"], gate.min_recovered)
    else:
        message = "recovered accuracy: the checkpoint answered nothing right, so nothing is shown"
        passed = gate.min_recovered == 0
        yield {"name": "recovered accuracy", "model": name, "passed": passed, "message": message}
    for rate, limit in (("truncated", gate.max_truncation_rise), ("looped", gate.max_loop_rise)):
        if rate in its and rate in checkpoints:
            yield held(name, f"rise in {WORDS[rate]}", its[rate] - checkpoints[rate], limit, at_least=False)
