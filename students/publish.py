"""The publication: a model repository and a dataset repository as folders that need no hand after.

Nothing is laid out where a gate of the checkpoint failed, where a source's licence forbids it, or where a key, a token
or a path of this machine is in a file.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from r1distill.data import cards as data_cards
from r1distill.data import licences, rejected
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.students import inventory, preflight, terms
from r1distill.students.cards import Story, fill, model_card
from r1distill.students.catalogue import Publication, Student
from r1distill.students.inventory import Entry
from r1distill.students.leaks import Leaks

LEFT_OUT = {"manifest.json", "loss.json", "README.md"}
FOLDERS_LEFT_OUT = ("rollouts", ".")  # what the student answered while it trained, and what is hidden: by their start


def build(
    student: Student, inputs: dict[str, Path], model: Path, out: Path, home: Path, *, lineage: dict[str, Any]
) -> Result:
    """Lay out ``out/model`` and ``out/dataset``; files are hard links where the disk allows it.

    ``model`` is the checkpoint that the student ends with. A variant whose gate failed is withheld. Counts are of
    variants and the checkpoint.
    """
    for folder in inventory.KINDS:
        shutil.rmtree(out / folder, ignore_errors=True)  # what a killed attempt left
    manifests = {stage: json.loads((path / "manifest.json").read_text("utf-8")) for stage, path in inputs.items()}
    scores = json.loads((inputs["scores"] / "scores.json").read_text("utf-8"))
    failed = failed_gates(scores)
    if against := {model: why for model, why in failed.items() if model not in student.variants}:
        raise R1DistillError(
            "a gate failed that stands before all publication: "
            + "; ".join(f"{model}: {why}" for model, why in against.items())
            + ". Nothing is published."
        )
    parquet = (inputs["dataset"] / "parquet").glob("*.parquet")
    licences.check(licences.of_files(parquet), student.publication.accept_licences)
    published = [name for name in student.variants if name not in failed]
    _lay_out_dataset(student.publication, inputs, manifests, out / "dataset")
    _link(model, out / "model")
    for name in published:
        _link(inputs["variants"] / name, out / "model" / "variants" / name)
    texts = terms.write(student, home, out / "model")
    withheld = {name: why for name, why in failed.items() if name in student.variants}
    card = model_card(Story(student, lineage, manifests, scores, published, withheld, texts))
    (out / inventory.CARD).write_text(card, encoding="utf-8")
    names = student.publication.repository, student.publication.dataset_repository
    (out / "model" / "README.md").write_text(fill(card, *names), encoding="utf-8")
    shutil.copy(inputs["scores"] / "scores.json", out / "model" / "scores.json")
    entries = inventory.record(out)
    _refuse_unsound(student, out / "model")
    Leaks(home, student.publication.harmless).check(out, entries)
    rejections = {"failed its gate": len(withheld)} if withheld else {}
    metrics = {"files": len(entries), "bytes": sum(one.size for one in entries)}
    return Result(1 + len(student.variants), 1 + len(published), rejections, metrics, unit="models")


def failed_gates(scores: dict[str, Any]) -> dict[str, str]:
    """The models whose gates failed, and why; whatever is no variant stands before all publication."""
    failed: dict[str, str] = {}
    for gate in scores["gates"]:
        if not gate["passed"]:
            failed[gate["model"]] = "; ".join(filter(None, (failed.get(gate["model"]), gate["message"])))
    return failed


def _lay_out_dataset(
    publication: Publication, inputs: dict[str, Path], manifests: dict[str, dict[str, Any]], out: Path
) -> None:
    """Parquet and card, with the fingerprints of what it was made from; nothing of the student, who shares it."""
    _link(inputs["dataset"] / "parquet", out / "parquet")
    card = (inputs["dataset"] / "README.md").read_text(encoding="utf-8")
    stages = [name for name in ("prompts", "traces", "verdicts", "dataset") if name in manifests]
    card = data_cards.with_fingerprints(card, {name: manifests[name]["fingerprint"] for name in stages})
    if publication.rejected_traces:
        read = inputs["prompts"], inputs["traces"], inputs["verdicts"], inputs["dataset"]
        counts = rejected.write(*read, out / "rejected")
        licences.check(licences.of_files((out / "rejected").glob("*.parquet")), publication.accept_licences)
        if counts:
            card = data_cards.with_rejected(card, counts)
    (out / "README.md").write_text(card, encoding="utf-8")


def _refuse_unsound(student: Student, model: Path) -> None:
    """Raise R1DistillError where others would load another student than was trained (see ``preflight``)."""
    if failed := [finding for finding in preflight.check_folder(student, model) if not finding.passed]:
        raise R1DistillError(
            "the model's files fail their preflight, nothing is published:\n" + "\n".join(f"- {one}" for one in failed)
        )


def _link(source: Path, target: Path) -> None:
    """The files of a folder and of its sub-folders, but for what is the artifact's own."""
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name not in LEFT_OUT):
        if file.suffix == ".log" or any(part.startswith(FOLDERS_LEFT_OUT) for part in file.relative_to(source).parts):
            continue
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:
            shutil.copy(file, place)


def check(folder: Path, home: Path) -> tuple[Publication, list[Entry]]:
    """What a sealed publication says of itself and its files, after every reason not to upload it was looked for.

    Raises RequestError where it is none, R1DistillError where it is damaged, where a gate failed, or where something
    of this machine is in it.
    """
    manifest = inventory.read_manifest(folder)
    entries = inventory.check(folder)
    try:
        publication = Publication.model_validate(manifest["identity"]["decides"]["publication"])
    except (KeyError, TypeError, ValueError):
        raise RequestError(
            f"{folder} was not laid out by this version. Delete it and run again: make distill"
        ) from None
    variants = {path.name for path in (folder / "model" / "variants").glob("*")}
    failed = failed_gates(json.loads((folder / "model" / "scores.json").read_text(encoding="utf-8")))
    if against := [f"{model}: {why}" for model, why in failed.items() if model == "checkpoint" or model in variants]:
        raise R1DistillError(f"{folder} holds what failed its gate ({'; '.join(against)}): nothing is published.")
    licences.check(licences.of_files((folder / "dataset").rglob("*.parquet")), publication.accept_licences)
    Leaks(home, publication.harmless).check(folder, entries)
    return publication, entries


def newest(home: Path, student: str) -> Path:
    """The student's publication that was sealed last; raises RequestError where there is none."""
    found = [path for path in (home / "publication").glob(f"{student}-*/manifest.json") if _is_of(path, student)]
    if not found:
        raise RequestError(
            f"there is no publication of '{student}' under {home}. Make one: make distill STUDENT={student}"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _is_of(manifest: Path, student: str) -> bool:
    """Whether it is this student's, and not one's whose name only begins like it."""
    return manifest.parent.name.rpartition("-")[0] == student
