"""The upload of a publication: the dataset, then the model, whose card names its commit; both are loaded back."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1distill.data.errors import R1DistillError
from r1distill.students import inventory, publish
from r1distill.students.cards import fill
from r1distill.students.hub import PATIENCE_SECONDS, File, Hub
from r1distill.students.inventory import Entry

WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Published:
    """A repository as it is on the Hub now, or the collection that ties them together."""

    kind: str
    repository: str
    url: str
    commit: str = ""
    new: bool = False  # this call made the commit
    files: int = 0
    bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def upload(
    folder: Path,
    home: Path,
    *,
    public: bool = False,
    endpoint: str | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Iterator[Published]:
    """Upload, load back what was uploaded, and yield each repository, and then the collection.

    Repositories are private until both have been loaded back; then, if it is to be ``public``, they are opened.
    Raises R1DistillError for every reason of ``publish.check``, and where what comes back is not what went up.
    """
    publication, entries = publish.check(folder, home)
    hub = Hub(endpoint, patience_seconds)
    dataset, model = hub.owned(publication.dataset_repository), hub.owned(publication.repository)
    names = {"dataset": dataset, "model": model}
    done: dict[str, str] = {}
    for kind in inventory.KINDS:
        files = _files(folder, entries, kind)
        if kind == "model":
            card = fill((folder / inventory.CARD).read_text(encoding="utf-8"), model, dataset, done["dataset"])
            files = [_of_bytes("README.md", card.encode()) if one.name == "README.md" else one for one in files]
        message = f"r1distill: {folder.name}"
        done[kind], new = hub.commit(kind, names[kind], files, message, public=public)
        _load_back_once(hub, kind, names[kind], done[kind], files, folder)
        size = sum(one.size for one in files)
        yield Published(kind, names[kind], hub.url(kind, names[kind]), done[kind], new, len(files), size)
    if public:
        for kind in inventory.KINDS:
            hub.make_public(kind, names[kind])
    address = hub.collect(publication.collection, {model: "model", dataset: "dataset"}, public=public)
    yield Published("collection", publication.collection, address)


def _files(folder: Path, entries: list[Entry], kind: str) -> list[File]:
    return [File(one.name, one.size, one.sha256, folder / one.path) for one in entries if one.kind == kind]


def _of_bytes(name: str, content: bytes) -> File:
    return File(name, len(content), hashlib.sha256(content).hexdigest(), content)


def _load_back_once(hub: Hub, kind: str, repository: str, commit: str, files: list[File], folder: Path) -> None:
    """Load a commit back unless it has been before; a small file beside the publication says so."""
    receipt = folder.parent / f".{folder.name}.loaded-back.json"
    seen: list[str] = []
    with suppress(OSError, ValueError):
        seen = list(json.loads(receipt.read_text(encoding="utf-8")))
    mark = f"{hub.url(kind, repository)}@{commit}"
    if mark in seen:
        return
    with tempfile.TemporaryDirectory(prefix=".loading-back-", dir=folder.parent) as scratch:
        problems = list(load_back(hub, kind, repository, commit, files, Path(scratch)))
    if problems:
        raise R1DistillError(
            f"{repository} at {commit} is not what was uploaded:\n" + "\n".join(problems[:8]) + "\nIt is damaged on "
            "the Hub. Delete the repository there and run the same command again."
        )
    with suppress(OSError):
        receipt.write_text(json.dumps([*seen, mark]), encoding="utf-8")


def load_back(hub: Hub, kind: str, repository: str, commit: str, files: list[File], scratch: Path) -> Iterator[str]:
    """Download every file of a commit, compare its sha256, and load what comes back; yields what is wrong.

    Weights are deleted as soon as they are compared, so that one shard at a time is on the disk.
    """
    there = hub.files(kind, repository, commit)
    for name in sorted(there.keys() - {one.name for one in files} - {".gitattributes"}):
        yield f"{name} is there and was not uploaded"
    damaged = False
    for one in tqdm(files, desc=f"loading {repository} back", unit="file", disable=None, delay=2):
        if one.name not in there or not there[one.name].same(one):
            damaged = True
            yield f"{one.name} is {'listed with another content' if one.name in there else 'missing'}"
            continue
        file = hub.download(kind, repository, commit, one.name, scratch)
        if (found := inventory.sha256(file)) != one.sha256:
            damaged = True
            yield f"{one.name} comes back with sha256 {found}, uploaded was {one.sha256}"
        if file.suffix in WEIGHTS:
            file.unlink()
    if not damaged:
        yield from _load_dataset(scratch) if kind == "dataset" else _load_model(scratch)


def _load_model(folder: Path) -> Iterator[str]:
    """What transformers says against configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        AutoConfig.from_pretrained(folder)
        GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if not tokenizer.chat_template:
            yield "its tokenizer has no chat template"
    except (OSError, ValueError, KeyError) as error:
        yield f"transformers can't load it ({type(error).__name__}: {error})"


def _load_dataset(folder: Path) -> Iterator[str]:
    """What datasets says against each configuration of the card, read as the Hub's users read it."""
    from datasets import get_dataset_config_names, load_dataset

    try:
        for name in get_dataset_config_names(str(folder)):
            for split, rows in load_dataset(str(folder), name, streaming=True).items():
                if next(iter(rows), None) is None:
                    yield f"its split {name}/{split} is empty"
    except Exception as error:  # datasets raises whatever its readers raise
        yield f"datasets can't load it ({type(error).__name__}: {error})"
