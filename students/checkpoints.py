"""Checkpoints of a training under way: whole or not there, the last good one always kept, room looked for first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError

GOOD = "GOOD"  # written into a checkpoint once all of it is on disk
GIB = 1 << 30


def number(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.rpartition("-")[2])


def whole(folder: Path) -> list[Path]:
    """The checkpoints that were written whole, oldest first."""
    return sorted((good.parent for good in folder.glob(f"checkpoint-*/{GOOD}")), key=number)


def last_good(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, or None; what was cut off while being written is deleted."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / GOOD).is_file():
            shutil.rmtree(checkpoint)
    good = whole(folder)
    return str(good[-1]) if good else None


def mark(checkpoint: Path) -> None:
    """Sync everything in ``checkpoint`` to disk, then mark it as whole."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    (checkpoint / GOOD).touch()
    folder = os.open(checkpoint, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def size(checkpoint: Path) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def make_room(folder: Path, estimated_bytes: int) -> None:
    """See that another checkpoint has room on the disk: it takes what the last one took, or ``estimated_bytes``.

    Older ones than the last good one are deleted for it where they must. Raises R1DistillError where it isn't enough.
    """
    good = whole(folder)
    need = size(good[-1]) if good else estimated_bytes
    for old in good[:-1]:
        if shutil.disk_usage(folder).free > need:
            return
        shutil.rmtree(old)
    free = shutil.disk_usage(folder).free
    if free <= need:
        kept = f"The last one, of step {number(good[-1])}, is kept" if good else "Nothing was saved so far"
        raise R1DistillError(
            f"a checkpoint needs {need / GIB:,.2f} GiB in {folder}, {free / GIB:,.2f} are free. {kept}. "
            "Free some disk and run the same command again: it goes on from there."
        )


class Kept:
    """Stands before transformers' Trainer: room is looked for before a checkpoint is written, a whole one is marked."""

    args: Any
    accelerator: Any
    model: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        from accelerate.utils import broadcast_object_list

        folder, refusal = Path(self.args.output_dir), [""]
        if self.args.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                make_room(folder, self._state_bytes())
            except R1DistillError as error:
                refusal = [str(error)]
        if broadcast_object_list(refusal)[0]:
            raise R1DistillError(refusal[0])
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            mark(folder / f"checkpoint-{self.state.global_step}")

    def _state_bytes(self) -> int:
        """Float32 weights and two moments; ZeRO-3 adds gathered bf16 weights."""
        trained = (weight for weight in self.model.parameters() if weight.requires_grad)
        return 14 * sum(getattr(weight, "ds_numel", weight.numel()) for weight in trained)
