"""What a run was asked to do: the settings of its student, teacher, prompts and hardware, and where it keeps things."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data import hub, models, sources
from r1distill.data.config import load, nearest, parse_overrides
from r1distill.data.errors import RequestError
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.verify import sandbox
from r1distill.pipeline.hardware import Hardware, named
from r1distill.students.catalogue import OnPolicy, Student
from r1distill.teacher.settings import RecordedTeacher, Teacher, VllmTeacher, load_teacher

if TYPE_CHECKING:
    from r1distill.data.verify.judge import Judge

SECTIONS = ("student", "teacher", "prompts", "hardware")


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

    @classmethod
    def load(
        cls,
        student: str,
        teacher: str | None = None,
        prompts: str | None = None,
        hardware: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Run:
        """Read the configurations that the names stand for; raises RequestError for a wrong name, key or value."""
        values = parse_overrides(overrides, SECTIONS)
        the_student = load("students", student, Student, values["student"])
        the_teacher = load_teacher(teacher or the_student.teacher, values["teacher"])
        the_prompts = load("prompts", prompts or the_teacher.prompts, PromptSet, values["prompts"])
        the_hardware = named(hardware, home_folder())
        if values["hardware"]:
            the_hardware = _with(the_hardware, values["hardware"])
        return cls(
            student=the_student,
            teacher=the_teacher,
            prompts=the_prompts,
            hardware=the_hardware,
            benchmarks=[load("benchmarks", name, Benchmark) for name in the_student.benchmarks],
            held_out=[load("benchmarks", name, Benchmark) for name in the_prompts.decontaminate.against],
        )

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
        return {"student": self.student.name, **base, **self._lineage_of_beyond(), **self.lineage_of_data()}

    def _lineage_of_beyond(self) -> dict[str, Any]:
        beyond = self.student.beyond
        if not isinstance(beyond, OnPolicy):
            return {"beyond": "GRPO on its own answers"} if beyond else {}
        teacher = f"{models.title(beyond.teacher)}@{models.revision(beyond.teacher)}"
        return {"beyond": "on-policy distillation", "beyond_teacher": teacher}


def _with(hardware: Hardware, changes: dict[str, Any]) -> Hardware:
    if unknown := [key for key in changes if key not in Hardware.model_fields]:
        raise RequestError(
            f"--set hardware.{unknown[0]}: unknown key.{nearest(unknown[0], list(Hardware.model_fields))}"
        )
    return Hardware.model_validate({**hardware.model_dump(), **changes})
