"""The licence files of a model repository: our own terms, the base's and the teacher's.

MIT (with DeepSeek's notice) and Apache-2.0 come along. Any other text, Llama's above all, is the base's own and is
copied from its repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r1distill.data import models
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students.catalogue import Student

SHIPPED = Path(__file__).parent / "licences"
PATTERNS = ["LICENSE*", "NOTICE*", "USE_POLICY*"]  # what a base's repository may hold of it


def write(student: Student, home: Path, out: Path) -> list[str]:
    """Write ``LICENSE``, a ``LICENSE-…`` for every other licence, and what the base wants kept; returns the names.

    Raises R1DistillError where a text can't be had.
    """
    publication = student.publication
    files: dict[str, str] = {}
    for licence in dict.fromkeys((publication.license, publication.base_license, publication.teacher_license)):
        name = f"LICENSE-{licence}" if files else "LICENSE"
        if (SHIPPED / f"{licence}.txt").is_file():
            files[name] = (SHIPPED / f"{licence}.txt").read_text(encoding="utf-8")
        elif licence == publication.base_license:
            files |= _of_base(student, home, name)
        else:
            known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.txt")))
            raise RequestError(
                f"there is no text of the licence '{licence}' (there are {known}, and the base's own). Correct "
                "publication.license or publication.teacher_license in the student's file."
            )
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return list(files)


def _of_base(student: Student, home: Path, name: str) -> dict[str, str]:
    """The base's licence under ``name``, its use policy and its notice, as its repository holds them."""
    licence, title = student.publication.base_license, models.title(student.base)
    found = {file.name: file.read_text(encoding="utf-8") for file in _texts(student, home)}
    text = next((found[file] for file in sorted(found) if file.upper().startswith("LICENSE")), "")
    if not text:
        raise R1DistillError(
            f"the base {title} is under '{licence}', whose text has to go along, and it holds no file LICENSE. "
            "Nothing is published without it: put the text beside the base's weights, or ask for access to its "
            "repository and set HF_TOKEN."
        )
    files = {name: text, **{file: kept for file, kept in found.items() if not file.upper().startswith("LICENSE")}}
    if licence.startswith("llama"):
        version = licence.removeprefix("llama")
        if f"LLAMA {version} COMMUNITY LICENSE" not in text.upper():
            raise R1DistillError(f"the LICENSE of {title} is not the Llama {version} Community License it should be.")
        # The sentence that section 1.b.iii asks for.
        files["NOTICE"] = (
            f"Llama {version} is licensed under the Llama {version} Community License, "
            "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
        )
    return files


def _texts(student: Student, home: Path) -> Iterator[Path]:
    if isinstance(student.base, models.PackageModel):
        return
    try:
        folder = models.materialise(student.base, home, files=PATTERNS)
    except R1DistillError as error:
        title = models.title(student.base)
        raise R1DistillError(f"nothing is published without the licence of {title}: {error}") from None
    for pattern in PATTERNS:
        yield from sorted(file for file in folder.glob(pattern) if file.is_file())
