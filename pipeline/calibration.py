"""Predicted beside measured: a line in ``$R1DISTILL_HOME/calibration.jsonl`` for every stage that the planner predicts.

The planner takes from it what was last measured for the same work on the same kind of hardware. A damaged line is
skipped with a warning; a line that a crash cut off spoils no other.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from r1distill.data.config import Settings
from r1distill.pipeline.hardware import GIB, gpu_memory_used_gib

FILE = "calibration.jsonl"
POLL_SECONDS = 1.0

log = logging.getLogger(__name__)


class Measurement(Settings):
    """One stage that was built: what the planner said, and what it was. What is not known is None."""

    stage: str
    subject: str  # whose work it was: the student's name, or the teacher's
    work: str  # what was done, in the planner's words
    hardware: str  # Hardware.kind
    layout: str
    tokens: int | None = None
    predicted_seconds: float | None = None
    seconds: float
    predicted_tokens_per_second: float | None = None
    tokens_per_second: float | None = None
    predicted_gib: float | None = None
    gib: float | None = None  # the peak: of the stage's processes together, or of the fullest GPU
    created_at: str = ""

    def __str__(self) -> str:
        """Measured beside predicted, in words."""
        pairs = [
            ("tokens/s", self.predicted_tokens_per_second, self.tokens_per_second),
            ("seconds", self.predicted_seconds, self.seconds),
            ("GiB", self.predicted_gib, self.gib),
        ]
        told = [
            f"{measured:,.1f} {unit}" + (f" ({predicted:,.1f} predicted)" if predicted is not None else "")
            for unit, predicted, measured in pairs
            if measured is not None
        ]
        return f"measured here, {self.created_at[:10]}: {', '.join(told)}"


def append(home: Path, measurement: Measurement) -> None:
    """Add a line and have it on disk. One write: several runs may append at once."""
    stamped = measurement.model_copy(update={"created_at": datetime.now(UTC).isoformat(timespec="seconds")})
    home.mkdir(parents=True, exist_ok=True)
    with (home / FILE).open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size > 0 and file.read(1) != b"\n"  # a crash cut the last line off
        file.write((b"\n" if torn else b"") + stamped.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(home: Path) -> list[Measurement]:
    """Every measurement, the oldest first."""
    file, found = home / FILE, []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], 1):
        try:
            found.append(Measurement.model_validate_json(line))
        except ValidationError:
            if line.strip():
                log.warning("%s:%d is damaged and was skipped.", file, number)
    return found


def last(measured: Sequence[Measurement], stage: str, subject: str, work: str, hardware: str) -> Measurement | None:
    """The newest measurement of this work on this kind of hardware."""
    wanted = (stage, subject, work, hardware)
    return next((m for m in reversed(measured) if (m.stage, m.subject, m.work, m.hardware) == wanted), None)


class Peak:
    """The most memory, in GiB, that was in use at once while a block ran."""

    gib = 0.0


@contextmanager
def watching(on_gpu: bool) -> Iterator[Peak]:
    """Measure the peak of the block: of the fullest GPU, or of this process's children together."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            peak.gib = max(peak.gib, gpu_memory_used_gib() if on_gpu else children_gib(os.getpid()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def children_gib(parent: int) -> float:
    """Resident memory of a process's descendants; pages that several share count in each. 0 where there is no /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # "pid (command) state parent ...": the command may hold blanks and brackets
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(folder.name))
    waiting, pages = list(children.get(parent, [])), 0
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        try:
            pages += int(Path(f"/proc/{one}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB
