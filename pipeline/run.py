"""What a run was asked to do: the settings of its student, teacher, prompts and hardware, and where it keeps things."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data import hub, models, sources
from r1distill.data.config import changed, load, parse_overrides
from r1distill.data.errors import RequestError
from r1distill.data.models import CheckpointModel
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.verify import sandbox
from r1distill.pipeline.hardware import Hardware, named
from r1distill.students.catalogue import OnPolicy, Student
from r1distill.teacher.settings import RecordedTeacher, Teacher, VllmTeacher, load_teacher

if TYPE_CHECKING:
    from r1distill.data.verify.judge import Judge

SECTIONS = ("student", "via", "teacher", "prompts", "hardware")
STAGES_THAT_ASK = {"distill": "logits", "beyond": "beyond"}  # by the part of a student's settings, in order
PADDING_TOKENS = 512  # by which the vocabularies of one family differ at most: Qwen2.5's have 151,936 or 152,064


def home_folder() -> Path:
    """Where artifacts, the ledger and logs live: $R1DISTILL_HOME, or ``runs`` in the working folder."""
    return Path(os.environ.get("R1DISTILL_HOME") or "runs").resolve()


@dataclass(frozen=True)
class Run:
    """One request, fully loaded and validated; nothing in it is started or downloaded."""

    student: Student
    teacher: Teacher
    prompts: PromptSet
    hardware: Hardware
    benchmarks: list[Benchmark]  # what the student is scored on
    held_out: list[Benchmark]  # what the prompts are kept apart from
    home: Path = field(default_factory=home_folder)
    via: Run | None = None  # the run into the student that teaches this one its probabilities: it comes first
    asks_in: str | None = None  # the stage that asks for the checkpoint of ``via``

    @classmethod
    def load(
        cls,
        student: str,
        teacher: str | None = None,
        prompts: str | None = None,
        hardware: str | None = None,
        overrides: Sequence[str] = (),
        via: str | None = None,
    ) -> Run:
        """Read the configurations that the names stand for; raises RequestError for a wrong name, key or value.

        ``via`` names a student that is trained first, from the same teacher and prompts, and whose checkpoint then
        teaches ``student`` its probabilities; a student's file says the same by ``distill.teacher``.
        """
        values = parse_overrides(overrides, SECTIONS)
        if via is not None:
            values["student"] = _taught_by(via, student, values["student"])
        the_student = load("students", student, Student, values["student"])
        the_teacher = load_teacher(teacher or the_student.teacher, values["teacher"])
        the_prompts = load("prompts", prompts or the_teacher.prompts, PromptSet, values["prompts"])
        the_hardware = named(hardware, home_folder())
        if values["hardware"]:
            the_hardware = changed(the_hardware, values["hardware"])
        run = cls(
            student=the_student,
            teacher=the_teacher,
            prompts=the_prompts,
            hardware=the_hardware,
            benchmarks=[load("benchmarks", name, Benchmark) for name in the_student.benchmarks],
            held_out=[load("benchmarks", name, Benchmark) for name in the_prompts.decontaminate.against],
        )
        return run._with_hop(values["via"])

    def _with_hop(self, changes: dict[str, Any]) -> Run:
        """With the run that comes first, where the student learns from a checkpoint that has yet to be trained.

        That student is scored on its own benchmarks, for its gate: what failed teaches nobody. Its variants and its
        published twin are left away, since nothing depends on them here.
        """
        asking = _asking(self.student)
        if not asking:
            if changes:
                raise RequestError(f"--set via.{next(iter(changes))}: there is no VIA, the student that is meant.")
            return self
        if len({teacher.student for teacher in asking.values()}) > 1:
            raise RequestError("'distill' and 'beyond' name two students that are yet to be trained; one is the limit.")
        first = load("students", next(iter(asking.values())).student, Student, changes)
        if _asking(first):
            raise RequestError(
                f"'{first.name}' is itself taught by a checkpoint that has yet to be trained; one hop is the limit. "
                "Train it first, and name its checkpoint's fingerprint in its file."
            )
        _check_family(first, self.student)
        first = first.model_copy(update={"variants": {}, "twin": None})
        benchmarks = [load("benchmarks", name, Benchmark) for name in first.benchmarks]
        via = replace(self, student=first, benchmarks=benchmarks)
        return replace(self._teaching(student=first.name), via=via, asks_in=STAGES_THAT_ASK[next(iter(asking))])

    def _teaching(self, **known: str) -> Run:
        """With what becomes known of the teacher that has yet to be trained."""
        parts = {
            part: getattr(self.student, part).model_copy(update={"teacher": teacher.model_copy(update=known)})
            for part, teacher in _asking(self.student).items()
        }
        return replace(self, student=self.student.model_copy(update=parts))

    def taught_by(self, fingerprint: str) -> Run:
        """The same run, now that it is known which checkpoint the first one makes."""
        return self._teaching(fingerprint=fingerprint)

    @property
    def label(self) -> str:
        """What the student's own artifacts are called."""
        return f"{self.student.name}-via-{self.via.student.name}" if self.via else self.student.name

    @cached_property
    def judge(self) -> Judge | None:
        """Who settles the answers that no rule does, where the prompts' file names one."""
        settings = self.prompts.verdicts.judge
        if settings is None:
            return None
        from r1distill.teacher.judging import judge

        return judge(load_teacher(settings.teacher), self.home)

    def check_held_out(self) -> None:
        """Raise RequestError where the student would be scored on questions that its prompts may hold."""
        apart = self.prompts.decontaminate.against
        if missing := [name for name in self.student.benchmarks if name not in apart]:
            raise RequestError(
                f"'{self.student.name}' is scored on {', '.join(missing)}, which the prompts '{self.prompts.name}' are "
                f"not kept apart from. Say so: --set 'prompts.decontaminate.against={[*apart, *missing]}'"
            )

    def check_sandbox(self, scored: bool = False) -> None:
        """Raise RequestError, before a teacher is paid, where generated code is to be judged and can't be run: that of
        the traces, and of the answers to benchmarks where the student is to be ``scored``."""
        asked = [*self.prompts.sources, *(bench.source for bench in self.benchmarks if scored)]
        if any(source.verifier == "code" for source in asked):
            sandbox.require()

    @cached_property
    def base_revision(self) -> str:
        """The commit (package version, content hash) of the student's base model."""
        return models.revision(self.student.base)

    @cached_property
    def twin_revision(self) -> str | None:
        """The commit of the published checkpoint, or the content of a recorded run of it."""
        if (twin := self.student.twin) is None:
            return None
        if twin.recorded is not None:
            return sources.revision(twin.recorded)
        return hub.commit("model", twin.repo, twin.revision)

    @cached_property
    def teacher_revision(self) -> str:
        """The commit of the teacher's weights, or of the recorded traces; what an endpoint's file says of itself."""
        if isinstance(self.teacher, VllmTeacher):
            return models.revision(self.teacher.model)
        if isinstance(self.teacher, RecordedTeacher):
            return sources.revision(self.teacher.source)
        return self.teacher.model

    # What decides each stage's content, beside what it reads.

    def identity_of_prompts(self) -> dict[str, Any]:
        """Sources and what they are kept apart from, each with its revision."""
        return {
            "sources": [[source.identity(), sources.revision(source)] for source in self.prompts.sources],
            "near_duplicates": self.prompts.near_duplicates and self.prompts.near_duplicates.identity(),
            "decontaminate": self.prompts.decontaminate.identity(),
            "against": [
                [bench.source.identity(), bench.layout.identity(), sources.revision(bench.source)]
                for bench in self.held_out
            ],
        }

    def identity_of_teacher(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.identity(),
            "revision": self.teacher_revision,
            "instruction": self.prompts.instruction,
        }

    def identity_of_verdicts(self) -> dict[str, Any]:
        return {"verdicts": self.prompts.verdicts.identity(), "judge": self.judge.identity if self.judge else None}

    def identity_of_student(self, *parts: str) -> dict[str, Any]:
        """The named parts of the student's settings and its base model's revision."""
        whole = self.student.identity()
        return {"base": whole["base"], "revision": self.base_revision, **{part: whole[part] for part in parts}}

    def identity_of_logits(self) -> dict[str, Any]:
        """What the teacher's top-k depends on beside the packs; weights of the loss do not change it."""
        distill = self.student.distill
        assert distill
        asked = {"k": distill.k, "temperature": distill.temperature}
        return {"teacher": [distill.teacher.identity(), models.revision(distill.teacher)], **asked}

    def identity_of_checkpoint(self) -> dict[str, Any]:
        return self.identity_of_student("sft", "architecture", *(["distill"] if self.student.distill else []))

    def identity_of_beyond(self) -> dict[str, Any]:
        """Its own settings, its teacher, and how answers are asked for and judged; the checkpoint decides the rest."""
        beyond, rules = self.student.beyond, self.prompts.verdicts.identity()
        assert beyond
        teacher = [beyond.teacher.identity(), models.revision(beyond.teacher)] if isinstance(beyond, OnPolicy) else None
        asked = {"instruction": self.prompts.instruction, "held_out": self.prompts.dataset.validation_share}
        return {"beyond": beyond.identity(), "teacher": teacher, "rules": rules, **asked}

    def identity_of_variants(self) -> dict[str, Any]:
        """How variants are made; their gates belong to the scores."""
        made = {
            name: {key: value for key, value in settings.items() if key != "gate"}
            for name, settings in self.student.identity()["variants"].items()
        }
        return {"variants": made}

    def identity_of_scores(self) -> dict[str, Any]:
        whole = self.student.identity()
        return {
            "benchmarks": [[bench.identity(), sources.revision(bench.source)] for bench in self.benchmarks],
            "twin": [whole["twin"], self.twin_revision],
            "gate": whole["gate"],
            "variant_gates": {name: settings.get("gate") for name, settings in whole["variants"].items()},
            "variant_answers": [whole["variant_questions"], whole["variant_samples"]],
            "base": [whole["base"], self.base_revision],
            "teacher": [self.teacher.identity(), self.teacher_revision] if self.scores_teacher else None,
        }

    @property
    def scores_teacher(self) -> bool:
        """A recorded teacher can't be asked; any other is scored where the student's file says so."""
        return self.student.score_teacher and not isinstance(self.teacher, RecordedTeacher)

    def lineage_of_data(self) -> dict[str, Any]:
        """Names and revisions for the dataset's card; nothing of the student, since every student shares it."""
        apart = self.prompts.decontaminate
        return {
            "teacher": self.teacher.name,
            "teacher_revision": self.teacher_revision,
            "prompts": self.prompts.name,
            "kept_apart_from": ", ".join(bench.name for bench in self.held_out) or "nothing",
            "shared_ngrams": f"{apart.ngram} words" if apart.ngram else "not looked for",
        }

    def lineage(self) -> dict[str, Any]:
        """Names and revisions for the student's card."""
        base = {"base": models.title(self.student.base), "base_revision": self.base_revision}
        more = {**self._lineage_of_distill(), **self._lineage_of_beyond()}
        return {"student": self.student.name, **base, **more, **self.lineage_of_data()}

    def _lineage_of_distill(self) -> dict[str, Any]:
        if (distill := self.student.distill) is None:
            return {}
        return {"probabilities_of": f"{models.title(distill.teacher)}@{models.revision(distill.teacher)}"}

    def _lineage_of_beyond(self) -> dict[str, Any]:
        beyond = self.student.beyond
        if not isinstance(beyond, OnPolicy):
            return {"beyond": "GRPO on its own answers"} if beyond else {}
        teacher = f"{models.title(beyond.teacher)}@{models.revision(beyond.teacher)}"
        return {"beyond": "on-policy distillation", "beyond_teacher": teacher}


def _asking(student: Student) -> dict[str, CheckpointModel]:
    """The parts of a student's settings that name a checkpoint which has yet to be trained."""
    found = {part: getattr(getattr(student, part), "teacher", None) for part in STAGES_THAT_ASK}
    return {
        part: teacher
        for part, teacher in found.items()
        if isinstance(teacher, CheckpointModel) and teacher.fingerprint is None
    }


def _taught_by(via: str, student: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with those that make ``via`` the teacher of the probabilities; all else about them is the user's."""
    others = {key: value for key, value in changes.items() if key.partition(".")[0] != "distill"}
    kind = {} if load("students", student, Student, others).distill else {"distill.kind": "topk_kl"}
    return {**kind, **changes, "distill.teacher": {"kind": "checkpoint", "student": via}}


def _check_family(first: Student, second: Student) -> None:
    """Raise RequestError where the first can't teach the second its probabilities, as far as their files tell."""
    ours, others = second.architecture, first.architecture
    if others.model_type != ours.model_type or abs(others.vocab - ours.vocab) > PADDING_TOKENS:
        why = (
            f"it has {others.vocab:,} tokens of a {others.model_type}, '{second.name}' {ours.vocab:,} of a "
            f"{ours.model_type}: its probabilities are of other tokens"
        )
    elif first.template != second.template:
        why = f"it is trained on the template '{first.template}', and would read packs of '{second.template}'"
    else:
        return
    raise RequestError(
        f"'{first.name}' can't teach '{second.name}' its probabilities: {why}. Name a student of the same family as "
        "VIA, or leave VIA out and learn from the text."
    )
