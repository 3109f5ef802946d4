"""What a run is held to: before anything is started or paid for, and between its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from r1distill.pipeline import plan
from r1distill.pipeline.run import Run
from r1distill.pipeline.runner import Step, stage_names

PILOT = ["prompts", "traces", "verdicts"]  # what a pilot goes through


def check(run: Run, stages: Sequence[str]) -> None:
    """Raise RequestError where the settings or this machine speak against the ``stages``; nothing is downloaded."""
    hops = [(run, stages), *([(run.via, stage_names("scores"))] if run.via and run.asks_in in stages else [])]
    for one, its in hops:
        if "scores" in its:
            one.check_held_out()
    plan.check_run(run, stages)
    if run.student.beyond and "beyond" in stages:
        from r1distill.students import beyond

        beyond.check(run.student, plan.beyond_layout(run))
    for one, its in hops:
        if "verdicts" in its:
            one.check_sandbox(scored="scores" in its)


def preflight(steps: Sequence[Step]) -> None:
    """Look at the students' bases; a packaged base is ours and was looked at, so that only its vocabulary counts."""
    from r1distill.students import preflight

    for step in steps:
        run = step.run
        if step.stage.name == "packs" and run.student.base.kind != "package" and not step.sealed():
            preflight.require(run.student, run.home)
        if step.stage.name == "packs" and not step.sealed():
            preflight.require_teachers(run.student, run.home)
        if run.via and step.stage.name == run.asks_in and not step.sealed():
            preflight.require_vocabulary(run.student, run.via.student, run.home)


def between(steps: Sequence[Step], failed: Sequence[str], say: Callable[[str], None]) -> Iterator[Step]:
    """The steps, ending where a checkpoint's own gate is among those that ``failed``: such a one is not published, and
    teaches nobody. Raises RequestError, before anything is trained, where the logits of sealed packs have no room."""
    for step in steps:
        if "checkpoint" in failed and step.stage.name == "publication":
            say("The checkpoint failed its gate: nothing is published.")
            return
        if "checkpoint" in failed and step.run.via and step.stage.name == step.run.asks_in:
            say(
                f"The checkpoint of {step.run.via.student.name} failed its gate: it teaches nobody. Its scores say "
                "why. --set via.… changes how it is trained; --set via.gate.min_gain=null lets it teach all the same."
            )
            return
        yield step
        if step.stage.name == "packs":
            _check_room(step, steps)


def _check_room(packs: Step, steps: Sequence[Step]) -> None:
    for step in steps:
        if step.stage.name == "logits" and step.folders["packs"] == packs.path and not step.sealed():
            from r1distill.students import logits

            logits.require_room(step.run.student, packs.path, step.partial)
