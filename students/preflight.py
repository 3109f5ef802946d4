"""What would spoil a student, found before anything is paid for: vocabulary, template, mask and settings, in seconds.

``check`` lays out what training would ship from a base, without weights, and looks at that; ``check_folder`` looks at
what is there already: a checkpoint, a variant or a publication. The checks themselves are in ``checks``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from r1distill.data import models
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import base, logits
from r1distill.students.catalogue import Student
from r1distill.students.checks import CHECKS, SHIP, STUDENT, Problem
from r1distill.students.subject import (
    CONFIG,
    GENERATION,
    TOKENIZER,
    Subject,
    damaged,
    is_finished,
    refuse_damaged,
    tokenizer_of,
    unpacked,
)
from r1distill.students.template import TEMPLATES, TOKENIZER_FILES, write_tokenizer

FILES = [*TOKENIZER_FILES, CONFIG, GENERATION]  # what of a base is looked at


@dataclass(frozen=True)
class Finding:
    """What a check found in a file, and what to do where it failed. One that passed names no file."""

    check: str
    passed: bool
    found: str
    file: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return (
            f"{self.check}: {self.found}" if self.passed else f"{self.check}: {self.file}: {self.found}. {self.remedy}"
        )


def look(student: Student, folder: Path | None, home: Path) -> tuple[str, list[Finding]]:
    """What was looked at, in words, and the findings: ``folder``, whichever of the two it is, or the student's base.

    Raises RequestError where there is nothing to look at.
    """
    if folder is None:
        title = models.title(student.base)
        return f"what training from {title} would ship", check(student, fetch(student, home))
    with unpacked(folder) as files:
        finished = is_finished(student, files, refuse_damaged(files))
    if finished:
        return f"the files in {folder}", check_folder(student, folder)
    return f"what training from the base in {folder} would ship", check(student, folder)


def require(student: Student, home: Path) -> None:
    """Raise RequestError, before anything is paid for, where the student's base would not make a sound student."""
    if failed := [finding for finding in check(student, fetch(student, home)) if not finding.passed]:
        lines = "\n".join(f"- {finding}" for finding in failed)
        raise RequestError(f"the preflight of '{student.name}' failed; nothing was started:\n{lines}")


def require_vocabulary(student: Student, teacher: Student, home: Path) -> None:
    """Raise RequestError where the two bases don't have the same tokens at the same ids."""
    with unpacked(fetch(student, home)) as mine, unpacked(fetch(teacher, home)) as its:
        logits.check_vocabulary(tokenizer_of(mine), tokenizer_of(its), teacher.name)


def require_teachers(student: Student, home: Path) -> None:
    """The same of the models that its file names as teachers of their probabilities; one that is trained here is looked
    at when it is."""
    for key in ("distill", "beyond"):
        teacher = getattr(getattr(student, key), "teacher", None)
        if teacher is not None and not isinstance(teacher, models.CheckpointModel):
            with (
                unpacked(fetch(student, home)) as mine,
                unpacked(models.materialise(teacher, home, files=FILES)) as its,
            ):
                logits.check_vocabulary(tokenizer_of(mine), tokenizer_of(its), models.title(teacher), key)


def fetch(student: Student, home: Path) -> Path:
    """A folder with the base's tokenizer and settings, without its weights where it comes from the Hub."""
    try:
        return models.materialise(student.base, home, files=FILES)
    except (R1DistillError, OSError, ValueError) as error:
        raise RequestError(
            f"{error}\nWithout the Hub, pass a folder with the base's tokenizer.json: --tokenizer DIR"
        ) from None


def check_folder(student: Student, folder: Path) -> list[Finding]:
    """Run every check on a folder that holds a finished student's files, or its tokenizer alone.

    Raises RequestError where its tokenizer can't be read.
    """
    with unpacked(folder) as files:
        refuse_damaged(files)
        try:
            subject = Subject(student, files, tokenizer_of(files))
            return list(_findings(subject, folder))
        except UnicodeDecodeError as error:
            raise RequestError(f"{folder}: a file is no UTF-8 ({error}). Fetch it again.") from None


def _findings(subject: Subject, shown: Path) -> Iterator[Finding]:
    for name, function in CHECKS.items():
        try:
            problems = list(function(subject))
        except R1DistillError:
            raise
        except Exception as error:  # a template that can't be rendered, a table that has another form
            problems = [Problem(subject.chat, f"{type(error).__name__}: {error}", SHIP)]
        for problem in problems:
            file = problem.file if problem.file == STUDENT else str(shown / problem.file)
            yield Finding(name, False, problem.found, file, problem.remedy)
        if not problems:
            yield Finding(name, True, (function.__doc__ or "").strip())


def check(student: Student, folder: Path) -> list[Finding]:
    """Run every check on what training would ship from the base in ``folder``: its tokenizer, and config.json if there.

    Raises RequestError where the tokenizer can't be read or is another vocabulary.
    """
    from transformers import GenerationConfig

    with unpacked(folder) as files, tempfile.TemporaryDirectory() as made:
        refuse_damaged(files)
        out = Path(made)
        try:
            tokenizer = write_tokenizer(
                TEMPLATES[student.template], files, out, max_tokens=student.architecture.max_position
            )
        except R1DistillError:
            raise
        except Exception as error:
            raise RequestError(damaged(folder / TOKENIZER, error)) from None
        wrong = []
        try:
            config = base.config(student.architecture, files if (files / CONFIG).is_file() else None, tokenizer)
            config.save_pretrained(out)
        except RequestError as error:
            wrong = [Finding("shape", False, str(error), str(folder / CONFIG), "")]
        GenerationConfig(**base.SAMPLING, **base.marks(tokenizer)).save_pretrained(out)
        return [*wrong, *_findings(Subject(student, out, tokenizer), folder)]
