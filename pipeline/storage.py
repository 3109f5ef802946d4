"""What a run takes of a node's disk, by part."""

from __future__ import annotations

from r1distill.pipeline import footprint
from r1distill.pipeline.estimate import Memory
from r1distill.pipeline.hardware import GIB
from r1distill.pipeline.workload import Workload
from r1distill.students.catalogue import Distill, Student
from r1distill.teacher.settings import Teacher, VllmTeacher

TEXT_BYTES = 4 * 4  # a token's text is about 4 bytes: in the ledger, the traces, the dataset and what gets published
PACK_BYTES = 2 * 4  # its id and label, in 32 bits each
TEXT_SHARE = TEXT_BYTES / (TEXT_BYTES + PACK_BYTES)


def _logits_on_disk(distill: Distill | None, work: Workload) -> Memory:
    """Their teacher's weights, where they are fetched for it, and a row for every token that is learned."""
    if distill is None:
        return {}
    model = None if distill.teacher.kind in ("checkpoint", "folder") else footprint.of_reference(distill.teacher)
    rows = (work.tokens or 0) * distill.bytes_per_token / GIB
    return {**({"teacher of the logits": model.weights_bytes / GIB} if model else {}), "logits": rows}


def needed(student: Student, teacher: Teacher, work: Workload) -> Memory:
    """GiB on one node: what is downloaded and written. A checkpoint of a run under way holds float32 weights and two
    moments, and the last good one is kept while the next is written; variants are counted at a byte a parameter."""
    parameters = student.architecture.parameters
    states = 0.02 * parameters if student.sft.method.kind != "full" else 12 * parameters
    model = footprint.of_reference(teacher.model) if isinstance(teacher, VllmTeacher) else None
    return {
        **({"teacher": model.weights_bytes / GIB} if model else {}),
        "traces and packs": (work.tokens or 0) * (TEXT_BYTES + PACK_BYTES) / GIB,
        **_logits_on_disk(student.distill, work),
        "base and student": (3 if student.beyond else 2) * footprint.BF16 * parameters / GIB,
        "training checkpoints": 2 * states / GIB,
        "variants": len(student.variants) * parameters / GIB,
    }
