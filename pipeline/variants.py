"""What is told of each variant beside its accuracy: size, memory, speed here, recovery, divergence, its runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from r1distill.pipeline import footprint
from r1distill.students.catalogue import Student

if TYPE_CHECKING:
    from r1distill.pipeline.evaluation import Contender

LONG_TOKENS = 32_768
NOT_SERVED = "FP8 needs a GPU to be served: checked by loading and dequantising, its serving is unproven"
UNSOUND = "its files are not sound"


def of_variants(
    student: Student,
    made: Mapping[str, Mapping[str, Any]],
    gates: Iterable[Mapping[str, Any]],
    served: Iterable[Contender],
    speeds: Mapping[str, float | None],
) -> dict[str, dict[str, Any]]:
    """One entry a variant. ``memory_bytes`` is computed: its files, and the KV cache in 16 bits of one sequence of
    ``memory_tokens``, which are 32,768 or as many as the model can take. Speed is of all answers together, as many at
    a time as were asked for; None where it was not served."""
    cache = footprint.of_architecture(student.name, student.architecture).kv_bytes_per_token
    tokens = min(LONG_TOKENS, student.architecture.max_position)
    recovered = {gate["model"]: gate.get("value") for gate in gates if gate["name"] == "recovered accuracy"}
    runtimes = {one.name: one.runtime for one in served}
    return {
        name: {
            "kind": made[name]["kind"],
            "bytes": made[name]["bytes"],
            "memory_tokens": tokens,
            "memory_bytes": round(made[name]["bytes"] + cache * tokens),
            "tokens_per_second": speeds.get(name),
            "recovered": recovered.get(name),
            "kl": made[name]["kl"],
            "kl_tokens": made[name]["kl_tokens"],
            "runtime": runtimes.get(name),
            "note": "" if name in runtimes else UNSOUND if made[name]["problems"] else NOT_SERVED,
        }
        for name in student.variants
    }


def tokens_per_second(traces: Iterable[Mapping[str, Any]]) -> float | None:
    """Tokens of all answers over the time in which at least one was under way; None without any.

    ``traces`` are rows of TRACE: answers overlap, and a run that was cut off asks at several times.
    """
    spans: list[tuple[float, float]] = []
    tokens = 0
    for row in traces:
        if row["seconds"] and row["created_at"]:
            end = datetime.fromisoformat(row["created_at"]).timestamp()
            spans.append((end - row["seconds"], end))
            tokens += row["completion_tokens"] or 0
    busy, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return tokens / busy if busy else None
