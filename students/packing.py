"""Packs: token ids and loss masks of whole traces, laid end to end up to the context length."""

from __future__ import annotations

import bisect
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from r1distill.data import models, schema
from r1distill.data.result import Result
from r1distill.students.catalogue import Student
from r1distill.students.template import IGNORE, TEMPLATES, TOKENIZER_FILES, Unusable, encode, write_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation")
EXAMPLES = 3

# One tokenised trace, kept until it is packed.
_ENCODED = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("prompt_id", pa.string()),
        ("sample", pa.int64()),
    ]
)


@dataclass
class Tally:
    """What became of the rows of all splits."""

    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)


def build(student: Student, dataset: Path, out: Path, home: Path) -> Result:
    """Write train and validation packs, the tokenizer to ship, and a few members' exact text; rows are traces."""
    base = models.materialise(student.base, home, files=TOKENIZER_FILES)
    tokenizer = write_tokenizer(
        TEMPLATES[student.template], base, out / "tokenizer", max_tokens=student.architecture.max_position
    )
    tally, examples = Tally(), []
    for split in SPLITS:
        if not (dataset / split).is_dir():
            continue
        encoded = out / ".work" / split
        shutil.rmtree(encoded, ignore_errors=True)
        with schema.writing(encoded, _ENCODED) as writer:
            for row in _encoded(student, tokenizer, schema.read(dataset / split, schema.TRAINING_ROW), split, tally):
                writer.append(row)
        packs = _write_packs(schema.read(encoded, _ENCODED), student.packs.context_tokens, out / split)
        tally.splits[split] = _measure(packs, student.packs.context_tokens)
        examples += [show(tokenizer, row, 0) for row in schema.rows(packs.slice(0, EXAMPLES))]
    schema.write_splits(out, list(tally.splits))
    (out / "examples.txt").write_text("\n\n".join(examples) + "\n", encoding="utf-8")
    return Result(tally.read, tally.kept, dict(tally.rejected), tally.splits, unit="traces")


def _encoded(
    student: Student, tokenizer: PreTrainedTokenizerFast, table: pa.Table, split: str, tally: Tally
) -> Iterator[dict[str, Any]]:
    template, limit = TEMPLATES[student.template], student.packs.context_tokens
    columns = ["prompt_id", "sample", "messages"]
    for row in tqdm(schema.rows(table, columns), total=table.num_rows, desc=f"tokens {split}", disable=None, delay=2):
        tally.read += 1
        try:
            ids, labels = encode(template, tokenizer, row["messages"])
        except Unusable as reason:
            tally.rejected[str(reason)] += 1
            continue
        if len(ids) > limit:
            tally.rejected[f"longer than {limit:,} tokens"] += 1
            continue
        tally.kept += 1
        yield {"input_ids": ids, "labels": labels, "prompt_id": row["prompt_id"], "sample": row["sample"]}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins of at most ``capacity``: longest first, each into the fullest bin that takes it.

    O(n log n + n·d) with d the number of distinct free lengths. Every length must be at most ``capacity``.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> bins with that much room
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            room, target = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            target = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[target].append(index)
        left = room - lengths[index]
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(target)
    return bins


def _write_packs(encoded: pa.Table, capacity: int, out: Path) -> pa.Table:
    encoded = encoded.combine_chunks()
    lengths = pc.list_value_length(encoded["input_ids"]).to_pylist()
    schema.write(out, schema.PACK, (_pack(encoded, members) for members in best_fit_decreasing(lengths, capacity)))
    return schema.read(out, schema.PACK)


def _pack(encoded: pa.Table, members: Sequence[int]) -> dict[str, Any]:
    rows = [{name: encoded[name][index].as_py() for name in encoded.schema.names} for index in members]
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "labels": [label for row in rows for label in row["labels"]],
        "seq_lengths": [len(row["input_ids"]) for row in rows],
        "members": [{"prompt_id": row["prompt_id"], "sample": row["sample"]} for row in rows],
    }


def _measure(packs: pa.Table, capacity: int) -> dict[str, Any]:
    traces = tokens = targets = longest = 0
    for row in schema.rows(packs):
        traces += len(row["members"])
        tokens += len(row["input_ids"])
        targets += sum(label != IGNORE for label in row["labels"])
        longest = max(longest, *row["seq_lengths"])
    filled = tokens / (packs.num_rows * capacity) if packs.num_rows else 0.0
    return {
        "packs": packs.num_rows,
        "traces": traces,
        "tokens": tokens,
        "target_tokens": targets,
        "longest_tokens": longest,
        "filled": round(filled, 4),
    }


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
