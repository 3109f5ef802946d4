"""What must not leave this machine: keys, tokens and paths, looked for in every file that would be published.

Weights are numbers: of safetensors the header is read, of GGUF what stands before the tensors. Of Parquet every string
column is read, for keys and for the paths of this run alone, since a trace may well speak of /tmp.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from r1distill.data.config import ROOT
from r1distill.data.errors import R1DistillError
from r1distill.students.inventory import MAX_HEADER_BYTES

KEY = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[opsu]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{40,}"
    rb"|glpat-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{35}|xox[abp]-[A-Za-z0-9-]{20,}"
    rb"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
)
# An absolute path of a machine: a folder that people work under, and something in it; no part of an address.
PATH = re.compile(
    rb"(?<![A-Za-z0-9_./:~-])/(?:home|root|Users|tmp|mnt|media|scratch|workspace|work|data|opt|srv|var)/[A-Za-z0-9_.-]+"
)
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)(_|$)")
CHUNK, OVERLAP = 8 << 20, 4096


class Leaks:
    """What to look for: the forms of keys, the secrets in this environment by their value, and paths."""

    def __init__(self, home: Path, harmless: Iterable[str] = ()):
        self._harmless = {text.encode() for text in harmless}
        self._secrets = {
            name: value.strip().encode()
            for name, value in os.environ.items()
            if SECRET_NAME.search(name) and len(value.strip()) >= 12 and not value.startswith("/")
        }
        places = {path.resolve() for path in (home, Path.home(), ROOT, Path.cwd())}
        self._paths = [str(path).encode() + b"/" for path in places if len(path.parts) > 2]

    def check(self, folder: Path, names: Iterable[str]) -> None:
        """Raise R1DistillError for the first of these files that holds something that must stay here."""
        for name in names:
            for text, anywhere in _texts(folder / name):
                if problem := self._problem(text, anywhere):
                    where = f"{name}{_row(folder / name, self, anywhere)}"
                    raise R1DistillError(
                        f"{where} holds {problem}: nothing is published. Remove it where it came from."
                    )

    def _problem(self, text: Any, anywhere: bool) -> str:
        for match in KEY.finditer(text):
            if match[0] not in self._harmless and _stands_alone(text, match):
                return (
                    f"what looks like a key or token ({match[0][:6].decode()}…; if it is none: "
                    '--set "student.publication.harmless=[…]" with the whole text)'
                )
        raw = bytes(text)
        for name, value in self._secrets.items():
            if value in raw:
                return f"the value of the environment variable {name}"
        for path in self._paths:
            if path in raw:
                return f"a path of this machine ({path.decode()})"
        for found in () if anywhere else PATH.finditer(raw):
            if found[0] not in self._harmless:
                return f"a path of a machine ({found[0].decode()})"
        return ""


def _stands_alone(text: Any, match: re.Match[bytes]) -> bool:
    """The form is no piece of a longer word ("task-…"), and of sk-… no plain words with dashes."""
    before = bytes(text[max(0, match.start() - 1) : match.start()])
    if re.match(rb"[A-Za-z0-9_-]", before) and not match[0].startswith(b"-----"):
        return False
    return not match[0].startswith(b"sk-") or any(char in b"0123456789" for char in match[0])


def _texts(file: Path) -> Iterator[tuple[Any, bool]]:
    """Pieces of a file in which something may be written, and whether they are prose that may speak of any path."""
    if file.suffix == ".parquet":
        for batch in _batches(file):
            yield from ((text, True) for column in batch.columns for text in _strings(column))
    else:
        limit = _head_bytes(file)
        with file.open("rb") as handle:
            tail, left = b"", limit
            while left and (chunk := handle.read(min(CHUNK, left))):
                yield tail + chunk, False
                tail, left = chunk[-OVERLAP:], left - len(chunk)


def _head_bytes(file: Path) -> int:
    """How much of a file is text: the whole of it, or what stands before the weights."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        with file.open("rb") as handle:
            return min(size, 8 + min(int.from_bytes(handle.read(8), "little"), MAX_HEADER_BYTES))
    if file.suffix == ".gguf":
        from gguf import GGUFReader

        return int(GGUFReader(file).data_offset)
    return size


def _batches(file: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=2048)


def _strings(array: Any) -> Iterator[Any]:
    """The text of an Arrow array's string values, nested ones included, as one buffer each."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _strings(child)
    elif pa.types.is_list(array.type):
        yield from _strings(array.flatten())
    elif pa.types.is_string(array.type) and (data := array.buffers()[2]) is not None:
        yield memoryview(data)


def _row(file: Path, leaks: Leaks, anywhere: bool) -> str:
    """Which row of a Parquet file it is, for a person who has to look at it."""
    if not anywhere:
        return ""
    number = 0
    for batch in _batches(file):
        for row in batch.to_pylist():
            if leaks._problem(repr(row).encode(), True):
                return f", row {number} (prompt {row.get('prompt_id')}),"
            number += 1
    return ""
