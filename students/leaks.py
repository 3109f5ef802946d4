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
from r1distill.students.inventory import Entry
from r1distill.students.tensors import MAX_HEADER_BYTES, gguf

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

    def check(self, folder: Path, entries: Iterable[Entry]) -> None:
        """Raise R1DistillError for the first of these files that holds something that must stay here."""
        seen: set[str] = set()
        for one in entries:
            if one.sha256 in seen:  # every variant carries the same tokenizer
                continue
            seen.add(one.sha256)
            file = folder / one.path
            for where, problem in self._of_table(file) if file.suffix == ".parquet" else self._of_text(file):
                raise R1DistillError(
                    f"{one.path}{where} holds {problem}: nothing is published. Remove it at its source."
                )

    def _of_text(self, file: Path) -> Iterator[tuple[str, str]]:
        """What is in a file that no reader has to unpack, piece by piece."""
        left, tail = _text_bytes(file), b""
        with file.open("rb") as handle:
            while left and (chunk := handle.read(min(CHUNK, left))):
                if problem := self._problem(tail + chunk):
                    yield "", problem
                left, tail = left - len(chunk), chunk[-OVERLAP:]

    def _of_table(self, file: Path) -> Iterator[tuple[str, str]]:
        """What is in the string columns of a Parquet file, and in which row. Arrow's own search reads them at the speed
        of the disk; what it finds is looked at again."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        literals = [*self._secrets.values(), *self._paths]
        anything = "|".join([KEY.pattern.decode(), *(rf"\Q{text.decode()}\E" for text in literals)])
        first = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=2048):
                for column in batch.columns:
                    for strings in _strings(column):
                        for text in strings.filter(pc.match_substring_regex(strings, anything)).to_pylist():
                            if problem := self._problem(text.encode(), prose=True):
                                yield _row(batch, text, first), problem
                first += batch.num_rows

    def _problem(self, text: bytes, *, prose: bool = False) -> str:
        """What is wrong with a text; ``prose`` may speak of any path but this machine's."""
        for match in KEY.finditer(text):
            if match[0] not in self._harmless and _stands_alone(text, match):
                return (
                    f"what looks like a key or token ({match[0][:6].decode()}…; if it is none: "
                    '--set "student.publication.harmless=[…]" with the whole text)'
                )
        for name, value in self._secrets.items():
            if value in text:
                return f"the value of the environment variable {name}"
        for path in self._paths:
            if path in text:
                return f"a path of this machine ({path.decode()})"
        for found in () if prose else PATH.finditer(text):
            if found[0] not in self._harmless:
                return f"a path of a machine ({found[0].decode()})"
        return ""


def _stands_alone(text: bytes, match: re.Match[bytes]) -> bool:
    """The form is no piece of a longer word ("task-…"), and of sk-… no plain words with dashes."""
    if match[0].startswith(b"-----"):
        return True
    if re.match(rb"[A-Za-z0-9_-]", text[max(0, match.start() - 1) : match.start()]):
        return False
    return not match[0].startswith(b"sk-") or any(char in b"0123456789" for char in match[0])


def _text_bytes(file: Path) -> int:
    """How much of a file is text: the whole of it, or what stands before the weights."""
    size = file.stat().st_size
    if file.suffix == ".safetensors":
        with file.open("rb") as handle:
            return min(size, 8 + min(int.from_bytes(handle.read(8), "little"), MAX_HEADER_BYTES))
    if file.suffix == ".gguf":
        return int(gguf(file).data_offset)
    return size


def _strings(array: Any) -> Iterator[Any]:
    """The string arrays in an Arrow array, nested ones included."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        for child in array.flatten():
            yield from _strings(child)
    elif pa.types.is_list(array.type):
        yield from _strings(array.flatten())
    elif pa.types.is_string(array.type):
        yield array


def _row(batch: Any, text: str, first: int) -> str:
    """Which row it is, for a person who has to look at it."""
    for number, row in enumerate(batch.to_pylist()):
        if text in _leaves(row):
            return f", row {first + number} (prompt {row.get('prompt_id')}),"
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value
