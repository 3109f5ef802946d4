"""What a training tells of itself: speed, use of the hardware, padding; and the stop where a loss is no number."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students.catalogue import Architecture
from r1distill.students.layout import Layout
from r1distill.students.schedule import EMPTY, Packs

# What each tracker is called by pip; any of them will do.
PACKAGES = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}


def check_tracker(name: str | None) -> None:
    """Raise RequestError where the tracker that the student's file names isn't installed."""
    packages = PACKAGES[name] if name else ()
    if name and not any(importlib.util.find_spec(package) for package in packages):
        raise RequestError(
            f"student.sft.tracking is '{name}', and {' or '.join(packages)} is not installed. "
            f"Install it (pip install {packages[0]}), or leave tracking away."
        )


def environment(folder: Path) -> dict[str, str]:
    """Where the trackers keep what they are told: with this run's home, and not in a folder that is deleted."""
    return {
        "TENSORBOARD_LOGGING_DIR": str(folder),
        "TRACKIO_DIR": str(folder),
        "WANDB_DIR": str(folder),
        "WANDB_PROJECT": "r1distill",
    }


class Meter:
    """Figures of each step, from the schedule and a clock: nothing is asked of other processes."""

    def __init__(
        self,
        architecture: Architecture,
        packs: Packs,
        places: np.ndarray,
        *,
        layout: Layout,
        adapter: bool,
    ):
        self.architecture, self.adapter = architecture, adapter
        self.peak_flops = layout.device_tflops * 1e12 * layout.processes
        step = places[:, :, :: layout.sequence_parallel].reshape(len(places), -1)  # (steps, places)
        held = np.where(step == EMPTY, 0, packs.tokens[step])
        batches = held.reshape(len(places), -1, layout.packs_per_batch)
        computed = held.sum(axis=1) if layout.flat else (batches.max(axis=2) * layout.packs_per_batch).sum(axis=1)
        self.tokens = held.sum(axis=1)  # (steps,)
        self.padding = 1 - self.tokens / np.maximum(computed, 1)
        self.squares = np.where(step == EMPTY, 0.0, packs.squares[step]).sum(axis=1)

    def start(self, step: int) -> None:
        """Training begins after ``step`` steps."""
        self.first, self._began, self._last = step, time.monotonic(), time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """The figures of the step that has just ended, counted from 1."""
        now = time.monotonic()
        seconds, tokens, self._last = max(now - self._last, 1e-9), int(self.tokens[step - 1]), now
        told = {"tokens_per_second": tokens / seconds, "padding_share": float(self.padding[step - 1])}
        if self.peak_flops:
            done = self.architecture.training_flops(tokens, float(self.squares[step - 1]), frozen=self.adapter)
            told["mfu"] = done / seconds / self.peak_flops
        return told

    def mean_tokens_per_second(self, step: int) -> float:
        """Over all steps since the start."""
        return float(self.tokens[self.first : step].sum() / max(time.monotonic() - self._began, 1e-9))


def stop(
    step: int,
    logs: dict[str, float],
    losses: Sequence[tuple[int, float]],
    packs: Packs,
    folder: Path,
    *,
    write: bool,
) -> NoReturn:
    """Raise R1DistillError for a step whose loss or gradient is no number, its packs saved in ``folder``.

    ``losses`` are (pack, its summed loss) of the whole step, from all processes, of which one is to ``write``.
    """
    numbers = sorted({pack for pack, _ in losses if pack != EMPTY})
    bad = sorted({pack for pack, loss in losses if pack != EMPTY and not math.isfinite(loss)})
    where = folder / f"step-{step}"
    if write:
        schema.write(where / "packs", schema.PACK, (packs.row(number) for number in numbers))
        record = {"step": step, **logs, "packs": numbers, "not_finite": bad, "losses": [[p, str(v)] for p, v in losses]}
        (where / "losses.json").write_text(json.dumps(record, indent=1))
    culprit = f"pack {bad[0]} gave it" if bad else "every pack's loss is finite, the gradient is not"
    raise R1DistillError(
        f"step {step} has loss {logs.get('loss')} and gradient norm {logs.get('grad_norm')}: {culprit}. Its "
        f"{len(numbers)} packs are in {where}, to look at or to repeat. Nothing of this step was saved: the same "
        "command goes on from the last whole checkpoint. A lower student.sft.learning_rate, or leaving that trace "
        "out, may mend it."
    )


def summary(history: Sequence[dict[str, Any]], meter: Meter) -> dict[str, Any]:
    """Means over the run of what ``Meter.read`` told, weighted by tokens."""
    rows = [row for row in history if "padding_share" in row]
    weights = np.array([meter.tokens[int(row["step"]) - 1] for row in rows], float)
    told = {"padding_share": float(np.average([row["padding_share"] for row in rows], weights=weights))}
    if all("mfu" in row for row in rows):
        told["mfu"] = float(np.average([row["mfu"] for row in rows], weights=weights))
    return {name: round(value, 6) for name, value in told.items()}
