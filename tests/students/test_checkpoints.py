"""Checkpoints: what is not whole is not there, the last good one stays, and room is looked for before it is needed."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.students import checkpoints

Usage = namedtuple("Usage", "total used free")


def saved(folder: Path, step: int, good: bool = True, size: int = 1000) -> Path:
    one = folder / f"checkpoint-{step}"
    (one / "global_step" / "shards").mkdir(parents=True)
    (one / "global_step" / "shards" / "states.pt").write_bytes(b"x" * size)
    if good:
        checkpoints.mark(one)
    return one


def test_the_newest_whole_checkpoint_is_found_and_torn_ones_go(tmp_path: Path) -> None:
    assert checkpoints.last_good(tmp_path) is None
    saved(tmp_path, 9)
    saved(tmp_path, 10)
    saved(tmp_path, 11, good=False)
    assert checkpoints.last_good(tmp_path) == str(tmp_path / "checkpoint-10")
    assert [checkpoints.number(one) for one in checkpoints.whole(tmp_path)] == [9, 10]
    assert not (tmp_path / "checkpoint-11").exists()


def test_room_is_made_of_older_ones_but_the_last_good_one_stays(tmp_path: Path, monkeypatch) -> None:
    """The disk gets as full as the test says; what is deleted is counted as free."""
    for step in (1, 2, 3):
        saved(tmp_path, step)
    total = 3500

    def usage(_: Path) -> Usage:
        used = checkpoints.size(tmp_path)
        return Usage(total, used, total - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    checkpoints.make_room(tmp_path, 10)
    assert [checkpoints.number(one) for one in checkpoints.whole(tmp_path)] == [2, 3]
    total = 1500
    with pytest.raises(R1DistillError, match=r"checkpoint needs .* GiB in .*The last one, of step 3, is kept"):
        checkpoints.make_room(tmp_path, 10)
    assert [checkpoints.number(one) for one in checkpoints.whole(tmp_path)] == [3]


def test_the_first_checkpoint_is_estimated(tmp_path: Path) -> None:
    checkpoints.make_room(tmp_path, 1000)
    with pytest.raises(R1DistillError, match="Nothing was saved so far"):
        checkpoints.make_room(tmp_path, 1 << 60)
