"""The publication: a model repository and a dataset repository as folders, and their upload to the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.students.cards import Story, model_card
from r1distill.students.catalogue import Student

LEFT_OUT = {"manifest.json", "loss.json", "README.md"}
SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}")


def build(student: Student, inputs: dict[str, Path], out: Path, *, lineage: dict[str, Any]) -> Result:
    """Lay out ``out/model`` and ``out/dataset``; files are hard links where the disk allows it.

    A variant whose gate failed is withheld. Counts are of variants and the checkpoint.
    """
    for folder in ("model", "dataset"):
        shutil.rmtree(out / folder, ignore_errors=True)  # what a killed attempt left
    manifests = {stage: json.loads((path / "manifest.json").read_text("utf-8")) for stage, path in inputs.items()}
    scores = json.loads((inputs["scores"] / "scores.json").read_text("utf-8"))
    failed = {gate["model"]: gate["message"] for gate in scores["gates"] if not gate["passed"]}
    if "checkpoint" in failed:
        raise R1DistillError(f"the checkpoint failed its gate ({failed['checkpoint']}): nothing is published.")
    published = [name for name in student.variants if name not in failed]
    _link(inputs["checkpoint"], out / "model")
    for name in published:
        _link(inputs["variants"] / name, out / "model" / "variants" / name)
    _link(inputs["dataset"] / "parquet", out / "dataset" / "parquet")
    shutil.copy(inputs["dataset"] / "README.md", out / "dataset" / "README.md")
    story = Story(
        student, lineage, manifests, scores, published, {n: w for n, w in failed.items() if n in student.variants}
    )
    (out / "model" / "README.md").write_text(model_card(story), encoding="utf-8")
    shutil.copy(inputs["scores"] / "scores.json", out / "model" / "scores.json")
    _refuse_secrets(out)
    rejected = {"failed its gate": len(story.withheld)} if story.withheld else {}
    files = [path for path in out.rglob("*") if path.is_file() and ".work" not in path.parts]
    metrics = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    return Result(1 + len(student.variants), 1 + len(published), rejected, metrics, unit="models")


def _link(source: Path, target: Path) -> None:
    """The files of a folder and of its sub-folders, but for what is the artifact's own."""
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name not in LEFT_OUT):
        if file.suffix == ".log" or any(part.startswith(".") for part in file.relative_to(source).parts):
            continue
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:
            shutil.copy(file, place)


def _refuse_secrets(out: Path) -> None:
    """Raise where a text file holds something that looks like a key, or a path of this machine."""
    here = str(Path.home()).encode()
    for file in (path for path in out.rglob("*") if path.suffix in (".json", ".md", ".jinja", ".txt")):
        text = file.read_bytes()
        if SECRET.search(text):
            raise R1DistillError(f"{file} holds something that looks like a key or token: nothing is published.")
        if len(here) > 6 and here + b"/" in text:
            raise R1DistillError(f"{file} holds a path of this machine ({here.decode()}): nothing is published.")


def upload(folder: Path, student: Student, *, private: bool = True) -> Iterator[str]:
    """Upload a publication's two folders, one commit each, and yield their addresses.

    Raises RequestError without a token, or where the token may not write.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    for name in ("model", "dataset"):
        if not (folder / name / "README.md").is_file():
            raise RequestError(f"{folder / name} holds no publication. Make one first: make distill")
    if not get_token():
        raise RequestError("uploading needs a token of the Hub: set HF_TOKEN to one that may write.")
    api = HfApi()
    publication = student.publication
    repositories = (("model", publication.repository), ("dataset", publication.dataset_repository))
    for kind, repository in repositories:
        try:
            url = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=url.repo_id,
                repo_type=kind,
                folder_path=folder / kind,
                commit_message=f"r1distill: {folder.name}",
            )
        except HfHubHTTPError as error:
            raise R1DistillError(
                f"the Hub refused {repository} ({error.response.status_code}). Check that HF_TOKEN may write there; "
                "what was uploaded is kept, so run the same command again."
            ) from None
        yield str(url)
