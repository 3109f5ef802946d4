"""Which packs every step takes, and which process takes which of them.

The order is the settings' alone, so one process and sixteen take the same packs in the same steps; a layout only
decides who computes them. Places that are left over in a step hold an empty pack, which costs and counts for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r1distill.students.layout import Layout
from r1distill.students.template import IGNORE

EMPTY = -1


def order(packs: int, per_step: int, epochs: float, seed: int) -> list[list[int]]:
    """The packs of every step: each epoch a new permutation of all, its last step the smaller for what is left."""
    import torch

    steps: list[list[int]] = []
    for epoch in range(math.ceil(epochs)):
        shuffled = torch.randperm(packs, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        steps += [shuffled[start : start + per_step] for start in range(0, packs, per_step)]
    return steps[: math.ceil(epochs * math.ceil(packs / per_step))]


def places(steps: Sequence[Sequence[int]], per_step: int, layout: Layout) -> np.ndarray:
    """(steps, rounds, processes, packs_per_batch) packs, EMPTY where there is none.

    The processes of a group, which cut one sequence under Ulysses, all get the group's packs.
    """
    groups, held = layout.replicas, layout.packs_per_batch
    rounds = layout.rounds(per_step)
    table = np.full((len(steps), rounds, held, groups), EMPTY, np.int64)
    for one, packs in zip(table, steps, strict=True):
        one.reshape(-1)[: len(packs)] = packs
    return np.repeat(table.transpose(0, 1, 3, 2), layout.sequence_parallel, axis=2)


class Packs:
    """A table of packs by number, its arrays without a copy; EMPTY gives one that takes no loss."""

    def __init__(self, table: pa.Table, pad: int):
        self.table = table
        self.domains = domains(table)
        self.tokens = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)  # (P,)
        lengths = pa.chunked_array([chunk.flatten() for chunk in table["seq_lengths"].chunks], pa.int32()).to_numpy()
        counts = pc.list_value_length(table["seq_lengths"]).to_numpy()
        owner = np.repeat(np.arange(len(counts)), counts)
        self.squares = np.bincount(owner, lengths.astype(np.float64) ** 2, len(counts))  # (P,) of members' lengths
        self._empty = {
            "pack": EMPTY,
            "input_ids": np.full(2, pad, np.int32),
            "labels": np.full(2, IGNORE, np.int32),
            "seq_lengths": np.array([2], np.int32),
            "domains": np.zeros(1, np.int64),
        }

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == EMPTY:
            return self._empty
        row = {name: self.table[name][number].values for name in self.table.column_names}
        names = row.pop("members").field("domain").to_pylist()
        arrays = {name: values.to_numpy(zero_copy_only=True) for name, values in row.items()}
        return {"pack": number, **arrays, "domains": np.array([self.domains.index(name) for name in names])}

    def row(self, number: int) -> dict[str, Any]:
        """One pack as it stands in the table."""
        (row,) = self.table.slice(number, 1).to_pylist()
        return dict(row)


class Places:
    """Packs in the order of ``places``, as a data set that torch can sample in order."""

    def __init__(self, packs: Packs, table: np.ndarray):
        self.packs, self.order = packs, table.reshape(-1)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.packs[int(self.order[place])]


def domains(table: pa.Table) -> list[str]:
    """The domains that a table of packs holds, in alphabetical order."""
    found: set[str] = set()
    for chunk in table["members"].chunks:
        found |= set(chunk.flatten().field("domain").unique().to_pylist())
    return sorted(found)
