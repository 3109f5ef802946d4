"""The files of a publication with size and sha256, written down when built and held against the disk later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import tensors

KINDS = ("dataset", "model")  # in the order in which they are uploaded: the model's card names the dataset's commit
SUMS = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` checks it, too
CARD = "model-card.md"  # the model's card with its names and the dataset's commit left open
MAX_FILE_BYTES = 50_000_000_000  # the Hub takes no larger file
CHUNK = 4 << 20


@dataclass(frozen=True)
class Entry:
    """One file: its path within the publication (``model/…`` or ``dataset/…``)."""

    path: str
    size: int
    sha256: str

    @property
    def kind(self) -> str:
        return self.path.split("/", 1)[0]

    @property
    def name(self) -> str:
        """Its path within its repository."""
        return self.path.split("/", 1)[1]


def take(folder: Path) -> list[Entry]:
    """Read and hash every file of both repositories, several at a time."""
    files = [path for kind in KINDS for path in sorted((folder / kind).rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in files]
    with (
        tqdm(total=sum(sizes), desc="sha256", unit="B", unit_scale=True, disable=None, delay=2) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads,
    ):
        sums = list(threads.map(lambda path: sha256(path, bar), files))
    return [
        Entry(path.relative_to(folder).as_posix(), size, digest)
        for path, size, digest in zip(files, sizes, sums, strict=True)
    ]


def sha256(file: Path, bar: tqdm | None = None) -> str:
    """The hash of a file of any size; hashlib lets other threads run meanwhile."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def record(folder: Path) -> list[Entry]:
    """Check what was just laid out and write its SHA256SUMS."""
    entries = take(folder)
    _refuse(folder, _problems(folder, entries))
    (folder / SUMS).write_text("".join(f"{one.sha256}  {one.path}\n" for one in entries), encoding="utf-8")
    return entries


def check(folder: Path) -> list[Entry]:
    """The files of a sealed publication; raises where it is none, or is not what was built."""
    manifest = read_manifest(folder)
    if not (folder / SUMS).is_file() or not (folder / CARD).is_file():
        raise RequestError(f"{folder} was not laid out by this version. Delete it and run again: make distill")
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    wanted = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    sizes = {path: size for path, size in manifest["files"].items() if path.split("/", 1)[0] in KINDS}
    there = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for kind in KINDS
        for path in (folder / kind).rglob("*")
        if path.is_file()
    }
    problems = [f"{path} is missing" for path in sorted(wanted.keys() | sizes.keys()) if path not in there]
    problems += [f"{path} belongs to no publication" for path in sorted(there) if path not in wanted]
    problems += [
        f"{path} has {there[path]:,} bytes, its manifest says {size:,}"
        for path, size in sizes.items()
        if path in there and there[path] != size
    ]
    _refuse(folder, problems)  # what can be seen without reading it all
    entries = take(folder)
    problems = [f"{one.path} is another than was built (sha256)" for one in entries if one.sha256 != wanted[one.path]]
    _refuse(folder, problems or _problems(folder, entries))
    return entries


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a publication; raises RequestError where there is none that can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["stage"] == "publication" and isinstance(manifest["files"], dict):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(f"{folder} holds no publication (its manifest.json says what it is). Make one: make distill")


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        more = f"\nand {len(found) - 8} more" if len(found) > 8 else ""
        raise R1DistillError(
            f"{folder} can't be published:\n" + "\n".join(found[:8]) + more + "\nDelete the folder and run again to "
            "rebuild it; where it comes back the same, delete the checkpoint that it came from, too."
        )


def _problems(folder: Path, entries: list[Entry]) -> Iterator[str]:
    """What is wrong with the files as they are."""
    names = {one.path for one in entries}
    for path in ("dataset/README.md", "model/README.md", "model/LICENSE", "model/config.json"):
        if path not in names:
            yield f"{path} is missing"
    for one in entries:
        if one.size > MAX_FILE_BYTES:
            yield f"{one.path} has {one.size:,} bytes, the Hub takes {MAX_FILE_BYTES:,} at most"
        if one.path.endswith(".safetensors") and (problem := safetensors_problem(folder / one.path)):
            yield f"{one.path} {problem}"
        if one.path.endswith(".safetensors.index.json"):
            yield from _index_problems(folder / one.path, one.path)
    if not any(path.startswith("model/") and path.endswith(".safetensors") for path in names):
        yield "model/ holds no safetensors"


def safetensors_problem(file: Path) -> str:
    """What is wrong with a file's header or length, or ""; the tensors themselves are not read."""
    size = file.stat().st_size
    try:
        length, header = tensors.head(file)
        whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has a header that can't be read (the file has {size:,} bytes): it is cut off or damaged"
    return "" if size == whole else f"has {size:,} bytes, its header says {whole:,}: it is cut off or damaged"


def _index_problems(file: Path, path: str) -> Iterator[str]:
    """An index and its shards: every tensor where the index says, and none beside them."""
    try:
        wanted: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        found = {shard: set(tensors.head(file.parent / shard)[1]) for shard in set(wanted.values())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{path} can't be followed to its shards ({error})"
        return
    for shard, held in sorted(found.items()):
        if held != {name for name, place in wanted.items() if place == shard}:
            yield f"{path} and {shard} disagree about the tensors in it"
