"""The order of packs is the settings' alone; a layout only shares them out, evenly, and loses none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r1distill.data import schema
from r1distill.students import schedule
from r1distill.students.layout import Layout
from r1distill.students.schedule import EMPTY

LAYOUTS = [
    Layout(),
    Layout(packs_per_batch=3),
    Layout(strategy="ddp", processes_per_node=8, cpu=False),
    Layout(strategy="ddp", processes_per_node=4, cpu=False, packs_per_batch=2),
    Layout(strategy="zero3", processes_per_node=8, cpu=False, sequence_parallel=4),
    Layout(strategy="zero3", processes_per_node=8, cpu=False, sequence_parallel=8),
]


@pytest.mark.parametrize("epochs", [1, 2, 1.5])
def test_every_epoch_takes_every_pack_once_in_an_order_of_its_own(epochs: float) -> None:
    steps = schedule.order(23, 4, epochs, seed=5)
    assert len(steps) == np.ceil(epochs * 6) and steps == schedule.order(23, 4, epochs, seed=5)
    first = [pack for step in steps[:6] for pack in step]
    assert sorted(first) == list(range(23)) and first != sorted(first)
    assert [len(step) for step in steps[:6]] == [4, 4, 4, 4, 4, 3]
    if epochs == 2:
        second = [pack for step in steps[6:] for pack in step]
        assert sorted(second) == list(range(23)) and second != first


def test_the_order_is_what_one_process_always_had() -> None:
    """accelerate's own sampler, which the demonstration was trained with."""
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(23), data_seed=7)
    own = [pack for step in schedule.order(23, 4, 2, seed=7) for pack in step]
    assert own == [*sampler, *sampler]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_shares_a_steps_packs_out_evenly(layout: Layout) -> None:
    steps = schedule.order(33, 10, 1, seed=0)
    table = schedule.places(steps, 10, layout)
    assert table.shape[2:] == (layout.processes, layout.packs_per_batch)
    for row, packs in zip(table, steps, strict=True):
        groups = row.reshape(row.shape[0], layout.replicas, layout.sequence_parallel, -1)  # neighbours cut a sequence
        assert (groups == groups[:, :, :1]).all()
        held = groups[:, :, 0]
        assert sorted(held[held != EMPTY]) == sorted(packs)
        counts = (held != EMPTY).sum(axis=(0, 2))
        assert counts.max() - counts.min() <= layout.packs_per_batch
        assert counts.max() <= layout.rounds(10) * layout.packs_per_batch
    assert table.shape[1] == layout.rounds(10)


def test_packs_come_as_arrays_and_an_empty_one_takes_no_loss(tmp_path: Path) -> None:
    members = [{"prompt_id": "a", "sample": 0, "domain": "math"}, {"prompt_id": "b", "sample": 1, "domain": "code"}]
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "seq_lengths": [2, 3], "members": members}
    schema.write(tmp_path, schema.PACK, [row, {**row, "members": members[::-1]}])
    packs = schedule.Packs(schema.read(tmp_path, schema.PACK), pad=9)
    assert (len(packs), packs.tokens.tolist(), packs.squares.tolist()) == (2, [5, 5], [13.0, 13.0])
    assert packs.domains == ["code", "math"] and packs[0]["domains"].tolist() == [1, 0]
    assert packs[1]["input_ids"].tolist() == [1, 2, 3, 4, 5] and packs.row(0) == row
    empty = packs[EMPTY]
    assert empty["input_ids"].tolist() == [9] * 2 and set(empty["labels"]) == {-100}
