"""Packs: token ids and loss masks of whole traces, laid end to end up to the context length."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from r1distill.data import models, schema
from r1distill.data.errors import RequestError
from r1distill.data.result import Result
from r1distill.students.catalogue import Student
from r1distill.students.template import IGNORE, TEMPLATES, TOKENIZER_FILES, write_tokenizer
from r1distill.students.tokens import Tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation")
EXAMPLES = 3
PACKS_PER_BATCH = 32  # that are written at once: 8 MiB of ids and labels at 32,768 tokens


def build(student: Student, dataset: Path, out: Path, home: Path) -> Result:
    """Write train and validation packs, the tokenizer to ship, and a few members' exact text; rows are traces."""
    base = models.materialise(student.base, home, files=TOKENIZER_FILES)
    template, limit = TEMPLATES[student.template], student.packs.context_tokens
    tokenizer = write_tokenizer(template, base, out / "tokenizer", max_tokens=student.architecture.max_position)
    read, kept, rejected, splits = 0, 0, Counter[str](), {}
    examples: list[str] = []
    for split in SPLITS:
        if not (dataset / split).is_dir():
            continue
        tokens = tokenise(template, tokenizer, dataset / split, out / ".work" / split, limit, split)
        _check_overlong(student, tokens)
        splits[split], first = _write_packs(tokens, limit, out / split)
        read, kept = read + tokens.read, kept + len(tokens.lengths)
        rejected.update(tokens.rejected)
        examples += [show(tokenizer, row, 0) for row in first]
        tokens.close()
    schema.write_splits(out, list(splits))
    (out / "examples.txt").write_text("\n\n".join(examples) + "\n", encoding="utf-8")
    return Result(read, kept, dict(rejected), splits, unit="traces")


def _check_overlong(student: Student, tokens: Tokens) -> None:
    """Raise RequestError where a trace is too long and the student's file wants none lost."""
    if student.packs.overlong == "refuse" and tokens.longest_rejected:
        limit = student.packs.context_tokens
        raise RequestError(
            f"packs.overlong is 'refuse', and {tokens.rejected[f'longer than {limit:,} tokens']:,} of {tokens.read:,} "
            f"traces are longer than {limit:,} tokens (the longest {tokens.longest_rejected:,}). Raise "
            "student.packs.context_tokens, or say student.packs.overlong=drop."
        )


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``: longest first, each into the fullest bin that takes it.

    O(n log n + n·d) with d the number of distinct free lengths. Every length must be at most ``capacity``.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> bins with that much room
    rooms: list[int] = []  # the keys of by_room, sorted
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            room, target = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            target = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[target].append(index)
        left = room - size
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(target)
    return bins


def _write_packs(tokens: Tokens, capacity: int, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the packs and return their measures and the first of them."""
    bins = best_fit_decreasing(tokens.lengths, capacity)
    first: list[dict[str, Any]] = []
    with schema.writing(out, schema.PACK, PACKS_PER_BATCH) as writer:
        for members in tqdm(bins, desc=f"packs {out.name}", unit="pack", disable=None, delay=2):
            pack = tokens.pack(members)
            writer.append(pack)
            if len(first) < EXAMPLES:
                first.append(pack)
    total = int(tokens.lengths.sum(dtype=np.int64))
    return {
        "packs": len(bins),
        "traces": len(tokens.lengths),
        "tokens": total,
        "target_tokens": total - int(tokens.prefixes.sum(dtype=np.int64)),
        "mean_tokens": round(total / len(tokens.lengths), 1) if bins else 0.0,
        "longest_tokens": int(tokens.lengths.max()) if bins else 0,
        "filled": round(total / (len(bins) * capacity), 6) if bins else 0.0,
    }, first


def member(pack: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one member of a pack."""
    start = sum(pack["seq_lengths"][:number])
    end = start + pack["seq_lengths"][number]
    return pack["input_ids"][start:end], pack["labels"][start:end]


def show(tokenizer: PreTrainedTokenizerFast, pack: dict[str, Any], number: int) -> str:
    """The exact text of a pack's member, the part that takes loss after a line that says so."""
    ids, labels = member(pack, number)
    who = pack["members"][number]
    first = next((place for place, label in enumerate(labels) if label != IGNORE), len(ids))
    assert all(label == token for label, token in zip(labels[first:], ids[first:], strict=True))
    return (
        f"=== {who['prompt_id']} sample {who['sample']}: {first} tokens read\n{_decode(tokenizer, ids[:first])}\n"
        f"--- {len(ids) - first} tokens learned\n{_decode(tokenizer, ids[first:])}"
    )


def _decode(tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
