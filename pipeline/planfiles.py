"""The files that a plan comes to: accelerate's, DeepSpeed's and Slurm's for the training, vLLM's command lines.

They are made by what the stages themselves call (``students.layout``, ``teacher.serve.VllmSpec``), for reading, or for
starting by hand what a stage would start.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1distill.data.errors import RequestError
from r1distill.data.models import FolderModel, HubModel
from r1distill.pipeline import stageplan
from r1distill.pipeline.evaluation import context_tokens
from r1distill.pipeline.plan import Plan, training_layout
from r1distill.pipeline.run import Run
from r1distill.students import layout
from r1distill.teacher.serve import VllmSpec
from r1distill.teacher.settings import VllmTeacher

PORT = 8000
CHECKPOINT = "CHECKPOINT"  # stands for the folder that a script is given


def write(run: Run, answer: Plan, request: Sequence[str], folder: Path) -> list[Path]:
    """Write what fits into ``folder`` and return the files. ``request`` is what `r1distill distill` is asked.

    Raises RequestError where the folder can't be written.
    """
    try:
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return [*_training(run, answer, request, folder), *_serving(run, answer, folder)]
    except OSError as error:
        raise RequestError(f"{folder} can't be written: {error.strerror}. Name another folder.") from None


def _training(run: Run, answer: Plan, request: Sequence[str], folder: Path) -> Iterator[Path]:
    stage = answer.stage("checkpoint")
    if not stage.fits:
        return
    spread = training_layout(run)
    yield layout.write(spread, run.student.sft, folder)
    if spread.strategy == "zero3":
        yield folder / layout.DEEPSPEED
    if not spread.cpu:
        hours = min(24, math.ceil(1.2 * stage.hours)) if stage.hours else 24  # a run that is cut off is queued again
        command = ["r1distill", "distill", *request]
        file = folder / layout.SLURM
        file.write_text(layout.slurm(spread, command, name=run.student.name, cores=run.hardware.cores, hours=hours))
        yield file


def _serving(run: Run, answer: Plan, folder: Path) -> Iterator[Path]:
    """The embedded teacher's weights are made on first use: `r1distill serve` does that, and no script."""
    teacher, cpu = run.teacher, not run.hardware.gpus
    model = teacher.model if isinstance(teacher, VllmTeacher) else None
    if isinstance(teacher, VllmTeacher) and answer.stage("traces").fits and isinstance(model, HubModel | FolderModel):
        options = dict(teacher.options)
        if isinstance(model, HubModel):
            options = {"revision": model.revision, "tokenizer-revision": model.revision, **options}
        name = model.repo if isinstance(model, HubModel) else model.path
        spec = VllmSpec(name, teacher.served_name, options, teacher.environment)
        yield _script(folder / "serve.sh", spec.script(PORT, cpu))
    if answer.stage("scores").fits:
        room = context_tokens(run.benchmarks)
        options = {"max-model-len": room, **stageplan.student_options(run.student, run.hardware, room)}
        spec = VllmSpec(CHECKPOINT, run.student.name, options)
        yield _script(folder / "serve-student.sh", spec.script(PORT, cpu).replace(CHECKPOINT, '"$1"'))


def _script(file: Path, text: str) -> Path:
    file.write_text(text)
    file.chmod(0o755)
    return file
