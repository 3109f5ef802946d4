"""The chain, in order, on one page.

A stage is its name (the function's), what it reads, what decides its content, and the function that fills a folder.
Upstream fingerprints decide too, so `decides` names only what is the stage's own. No stage calls another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1distill.data.result import Result
from r1distill.pipeline.run import Run

Inputs = Mapping[str, Path]


@dataclass(frozen=True)
class Stage:
    """One link of the chain. `version` is raised when the same settings come to mean another content."""

    name: str
    reads: tuple[str, ...]
    version: int
    label: Callable[[Run], str]
    decides: Callable[[Run], dict[str, Any]]
    build: Callable[[Run, Inputs, Path], Result]
    wanted: Callable[[Run], bool]

    @property
    def summary(self) -> str:
        return (self.build.__doc__ or "").strip()


STAGES: list[Stage] = []


def stage(
    *,
    reads: tuple[str, ...] = (),
    version: int = 1,
    label: Callable[[Run], str],
    decides: Callable[[Run], dict[str, Any]],
    wanted: Callable[[Run], bool] = lambda run: True,
) -> Callable[[Callable[[Run, Inputs, Path], Result]], Callable[[Run, Inputs, Path], Result]]:
    """Append the decorated function to the chain. A run that does not want it goes without, and so do its readers."""

    def add(build: Callable[[Run, Inputs, Path], Result]) -> Callable[[Run, Inputs, Path], Result]:
        STAGES.append(Stage(build.__name__, reads, version, label, decides, build, wanted))
        return build

    return add


# The first four don't depend on the student: every student shares them.


@stage(version=3, label=lambda run: run.prompts.name, decides=lambda run: run.identity_of_prompts())
def prompts(run: Run, inputs: Inputs, out: Path) -> Result:
    """Prompts with a stable id, deduplicated and decontaminated."""
    from r1distill.data import prompts

    return prompts.build(run.prompts, run.held_out, out)


@stage(reads=("prompts",), label=lambda run: run.teacher.name, decides=lambda run: run.identity_of_teacher())
def traces(run: Run, inputs: Inputs, out: Path) -> Result:
    """One row for every (prompt, sample) asked of the teacher, whatever became of it."""
    from r1distill.teacher import traces

    return traces.build(
        run.teacher, inputs["prompts"], out, run.home, run.prompts.instruction, run.hardware.ray_address
    )


@stage(
    reads=("prompts", "traces"),
    version=2,
    label=lambda run: run.teacher.name,
    decides=lambda run: run.identity_of_verdicts(),
)
def verdicts(run: Run, inputs: Inputs, out: Path) -> Result:
    """Every check's result and reason for every trace, also for those that fail."""
    from r1distill.data import verdicts

    settings, address = run.prompts.verdicts, run.hardware.ray_address
    return verdicts.build(settings, **inputs, out=out, home=run.home, judge=run.judge, ray_address=address)


@stage(
    reads=("prompts", "traces", "verdicts"),
    version=4,
    label=lambda run: f"{run.teacher.name}-{run.prompts.name}",
    decides=lambda run: {"dataset": run.prompts.dataset.identity()},
)
def dataset(run: Run, inputs: Inputs, out: Path) -> Result:
    """The selected traces as messages, with splits and a dataset card."""
    from r1distill.data import dataset

    title = f"{run.teacher.name} traces of {run.prompts.name}"
    settings, rules = run.prompts.dataset, run.prompts.verdicts
    return dataset.build(settings, rules, **inputs, out=out, title=title, lineage=run.lineage_of_data())


# From here on each student has its own.


@stage(
    reads=("dataset",),
    version=3,
    label=lambda run: run.student.name,
    decides=lambda run: run.identity_of_student("template", "packs"),
)
def packs(run: Run, inputs: Inputs, out: Path) -> Result:
    """Exact token ids and loss mask in the student's template, packed to its context length."""
    from r1distill.students import packing

    return packing.build(run.student, inputs["dataset"], out, run.home)


@stage(
    reads=("packs",),
    label=lambda run: run.label,
    decides=lambda run: run.identity_of_logits(),
    wanted=lambda run: run.student.distill is not None,
)
def logits(run: Run, inputs: Inputs, out: Path) -> Result:
    """The top-k of a teacher of the student's own vocabulary, for every label of the packs."""
    from r1distill.pipeline import plan
    from r1distill.students import logits

    each, machine = max(1, plan.scoring_gpus(run)), run.hardware
    processes = max(1, machine.gpus_per_node // each)
    return logits.build(run.student, inputs["packs"], out, run.home, processes, each, machine.ray_address)


@stage(
    reads=("packs", "logits"),
    label=lambda run: run.student.name if run.asks_in == "beyond" else run.label,
    decides=lambda run: run.identity_of_checkpoint(),
)
def checkpoint(run: Run, inputs: Inputs, out: Path) -> Result:
    """The fine-tuned student: full, or LoRA merged."""
    from r1distill.pipeline import plan
    from r1distill.students import sft

    return sft.build(
        run.student, inputs["packs"], out, run.home, plan.training_layout(run), logits=inputs.get("logits")
    )


@stage(
    reads=("prompts", "checkpoint"),
    label=lambda run: run.label,
    decides=lambda run: run.identity_of_beyond(),
    wanted=lambda run: run.student.beyond is not None,
)
def beyond(run: Run, inputs: Inputs, out: Path) -> Result:
    """The checkpoint trained further on its own answers: GRPO, or a teacher's probabilities. Later stages take it."""
    from r1distill.pipeline import plan
    from r1distill.students import beyond

    return beyond.build(
        run.student,
        **inputs,
        out=out,
        home=run.home,
        spread=plan.beyond_layout(run),
        rules=run.prompts.verdicts,
        instruction=run.prompts.instruction,
        validation_share=run.prompts.dataset.validation_share,
    )


def trained(inputs: Inputs) -> Path:
    """The checkpoint that the student ends with: that of ``beyond`` where there is one."""
    return inputs.get("beyond", inputs["checkpoint"])


@stage(
    reads=("dataset", "checkpoint", "beyond"),
    version=2,
    label=lambda run: run.label,
    decides=lambda run: run.identity_of_variants(),
)
def variants(run: Run, inputs: Inputs, out: Path) -> Result:
    """Quantised forms of the checkpoint, checked statically; nothing is served here."""
    from r1distill.students import quantise

    return quantise.build(run.student, trained(inputs), inputs["dataset"], out, run.hardware.gpus_per_node)


@stage(
    reads=("checkpoint", "beyond", "variants"),
    version=3,
    label=lambda run: run.label,
    decides=lambda run: run.identity_of_scores(),
)
def scores(run: Run, inputs: Inputs, out: Path) -> Result:
    """Base, teacher, twin, student and each variant served, sampled and judged; the gates' verdicts."""
    from r1distill.pipeline import scores

    return scores.build(run, trained(inputs), inputs["variants"], out)


@stage(
    reads=("prompts", "traces", "verdicts", "dataset", "packs", "logits", "checkpoint", "beyond", "variants", "scores"),
    version=2,
    label=lambda run: run.label,
    decides=lambda run: run.identity_of_student("publication"),
)
def publication(run: Run, inputs: Inputs, out: Path) -> Result:
    """A model repository and a dataset repository, complete with cards."""
    from r1distill.students import publish

    return publish.build(run.student, dict(inputs), trained(inputs), out, run.home, lineage=run.lineage())
