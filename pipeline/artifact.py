"""Artifacts: folders that are either whole or not there.

An artifact is built in a hidden folder beside its final place, its manifest is written last, and one rename makes it
appear. The hidden folder survives a crash, so that the stage can resume from what it had; a lock keeps two runs apart
and is released by the operating system when its holder dies.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from r1distill.data.errors import R1DistillError, RequestError

MANIFEST = "manifest.json"
WORK = ".work"  # what a stage keeps for resuming; gone when the artifact is sealed


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 over values that decide an artifact's content; raises on what can't be serialised deterministically."""
    _refuse(identity, "identity")
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise R1DistillError(f"{where} is {value}: a fingerprint needs finite numbers.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise R1DistillError(f"{where} has the key {key!r}: a fingerprint needs string keys.")
            _refuse(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _refuse(item, f"{where}[{index}]")
    else:
        raise R1DistillError(
            f"{where} is a {type(value).__name__}, which has no one way to be written down. "
            "Turn it into strings, numbers, lists or mappings before it decides an artifact."
        )


@dataclass(frozen=True)
class Artifact:
    """A sealed folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])


def place(home: Path, stage: str, label: str, digest: str) -> Path:
    """Where the artifact of a stage lives: readable, and ending in 8 hex digits of its fingerprint."""
    return home / stage / f"{label}-{digest[:8]}"


def partial_of(path: Path) -> Path:
    """The hidden folder in which the artifact at ``path`` is built."""
    return path.parent / f".{path.name}.partial"


def find(path: Path, digest: str) -> Artifact | None:
    """The sealed artifact at ``path``, or None; raises where a sealed one is damaged or another one has its name."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found, files = manifest["fingerprint"], {name: int(size) for name, size in dict(manifest["files"]).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise R1DistillError(f"{file} is damaged ({error!r}). Delete {path} and run again to rebuild it.") from None
    if found != digest:
        raise R1DistillError(f"{path} holds fingerprint {found}, expected {digest}. Move it away and run again.")
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there:,} bytes"
            raise R1DistillError(
                f"{path / name} {state}; its manifest says {size:,}. Delete {path} and run again to rebuild it."
            )
    return Artifact(path, manifest)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``; raises RequestError at once where another run holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(
            f"another run is building {path}. Wait for it to end ('r1distill status' shows the stages), or stop it."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """Hold the lock of the artifact at ``path`` and give the folder to build it in, with what a killed run left there.

    Left without anything in it, the folder goes again. Raises what ``alone`` does.
    """
    with alone(path):
        partial = partial_of(path)
        (partial / WORK).mkdir(parents=True, exist_ok=True)
        (partial / MANIFEST).unlink(missing_ok=True)  # of a run that was killed before the last rename
        try:
            yield partial
        finally:
            for folder in (partial / WORK, partial):
                with suppress(OSError):
                    folder.rmdir()


def seal(partial: Path, path: Path, manifest: dict[str, Any]) -> Artifact:
    """Drop the resume files, sync everything to disk, write the manifest last and rename."""
    shutil.rmtree(partial / WORK, ignore_errors=True)
    files = {}
    for file in sorted(p for p in partial.rglob("*") if p.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[str(file.relative_to(partial))] = file.stat().st_size
    manifest = {**manifest, "files": files}
    with (partial / MANIFEST).open("w", encoding="utf-8") as handle:
        json.dump(manifest, handle, indent=1, ensure_ascii=False, sort_keys=True)
        handle.flush()
        os.fsync(handle.fileno())
    partial.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return Artifact(path, manifest)
