"""Where questions come from: procedural tasks, local files, datasets on the Hub.

Reading yields raw rows as the source names its columns; ``records`` maps and filters them. A source's revision is the
content that it had: a commit, a hash of the file, a package's version.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import zlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from r1distill.data import hub
from r1distill.data.config import Settings, nearest
from r1distill.data.errors import RequestError

Record = dict[str, Any]
_ROWS_PER_BATCH = 512


class Task(Settings):
    """One reasoning-gym task: how many questions of it, and the task's own configuration."""

    count: int = Field(gt=0)
    config: dict[str, Any] = {}


class ReasoningGymSource(Settings):
    """Questions made by reasoning-gym's generators; the same seed makes the same questions."""

    kind: Literal["reasoning_gym"]
    seed: int
    tasks: dict[str, Task] = Field(min_length=1)
    domain: str = "math"
    verifier: str = "math"
    verifier_args: dict[str, Any] = {}
    license: str = "apache-2.0"


class _Columns(Settings):
    columns: dict[str, str] = {}  # our column: the source's column
    where: dict[str, Any] = {}  # only rows whose column has this value
    domain: str = "math"
    verifier: str = "math"
    verifier_args: dict[str, Any] = {}
    license: str
    limit: int | None = Field(None, gt=0)


class FileSource(_Columns):
    """A local JSONL, JSONL.gz or Parquet file."""

    kind: Literal["file"]
    path: str
    source: str | None = None  # what the rows' source is called; default: the file's name


class HubSource(_Columns):
    """A dataset on the Hugging Face Hub."""

    kind: Literal["hub"]
    repo: str
    revision: str = "main"
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()  # JSONL or Parquet files of the repository, in place of what its card makes of them


Source = Annotated[ReasoningGymSource | FileSource | HubSource, Field(discriminator="kind")]


def title(source: Source) -> str:
    """What the rows' ``source`` column says."""
    if isinstance(source, ReasoningGymSource):
        return "reasoning-gym"
    return source.repo if isinstance(source, HubSource) else source.source or Path(source.path).name


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def revision(source: Source) -> str:
    """The exact content that the source has now; raises RequestError where it can't be had."""
    if isinstance(source, ReasoningGymSource):
        try:
            return importlib.metadata.version("reasoning-gym")
        except importlib.metadata.PackageNotFoundError:
            raise RequestError("the package reasoning-gym is not installed. Install it: make setup") from None
    if isinstance(source, FileSource):
        path = _file(source)
        return _file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)
    return hub.commit("dataset", source.repo, source.revision)


def _file(source: FileSource) -> Path:
    path = Path(source.path)
    if not path.is_file():
        raise RequestError(
            f"there is no file {path} (seen from {Path.cwd()}). Give another: --set SECTION.source.path=FILE, or "
            "correct 'path' in the configuration."
        )
    return path


def records(source: FileSource | HubSource) -> Iterator[Record | str]:
    """Rows with our column names, filtered by ``where``; a row that can't be read is the reason, as a string.

    Columns that are not mapped keep their name. Raises RequestError where the source as a whole can't be read.
    """
    rows = _hub_rows(source) if isinstance(source, HubSource) else file_rows(_file(source))
    names = {theirs: ours for ours, theirs in source.columns.items()}
    taken = 0
    for row in rows:
        if isinstance(row, str):
            yield row
            continue
        if missing := [column for column in (*source.columns.values(), *source.where) if column not in row]:
            if not taken:
                raise RequestError(f"{title(source)} has no column '{missing[0]}'.{nearest(missing[0], list(row))}")
            yield f"column {missing[0]} missing"
            continue
        if all(row[column] == value for column, value in source.where.items()):
            if source.limit is not None and taken >= source.limit:
                return
            taken += 1
            yield {names.get(key, key): value for key, value in row.items()}


def file_rows(path: Path) -> Iterator[Record | str]:
    """Rows of a JSONL, JSONL.gz or Parquet file or a datasets folder; an unreadable JSONL line is a reason instead."""
    if path.is_dir():
        yield from _folder_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        yield from _json_rows(path)
    else:
        raise RequestError(f"{path} should end in .jsonl, .jsonl.gz or .parquet, or be a datasets folder.")


def _json_rows(path: Path) -> Iterator[Record | str]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise RequestError(f"{path} can't be read: {error.strerror}.") from None
    with file, gzip.open(file) if path.suffix == ".gz" else file as lines:
        while True:
            try:
                line = lines.readline()
            except (OSError, EOFError, zlib.error) as error:
                yield f"unreadable: the file is damaged from here on ({type(error).__name__})"
                return
            if not line:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield "unreadable: not JSON"
                continue
            yield row if isinstance(row, dict) else "unreadable: not a JSON object"


def _parquet_rows(path: Path) -> Iterator[Record | str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"{path} can't be read as Parquet: {error}") from None
    with file:
        for group in range(file.num_row_groups):
            left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=[group]):
                    yield from _batch_rows(batch)
                    left -= batch.num_rows
            except (pa.ArrowException, OSError) as error:
                yield from repeat(f"unreadable: damaged Parquet ({type(error).__name__})", left)


def _batch_rows(batch: Any) -> Iterator[Record | str]:
    """The rows of an Arrow batch; one with text that is no UTF-8 or a date beyond Python's is lost alone."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        if batch.num_rows == 1:
            yield "unreadable: a value that is none of its type"
            return
    for place in range(batch.num_rows):
        yield from _batch_rows(batch.slice(place, 1))


def _folder_rows(path: Path) -> Iterator[Record | str]:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:
        raise RequestError(f"{path} can't be read as a datasets folder: {error}") from None
    for part in [found] if isinstance(found, Dataset) else list(found.values()):
        for table in part.with_format("arrow").iter(_ROWS_PER_BATCH):
            for batch in table.to_batches():
                yield from _batch_rows(batch)


def _hub_rows(source: HubSource) -> Iterator[Record | str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    commit = revision(source)
    try:
        for name in source.files:
            yield from file_rows(Path(hf_hub_download(source.repo, name, repo_type="dataset", revision=commit)))
        if not source.files:
            from datasets import load_dataset

            yield from load_dataset(source.repo, source.config, split=source.split, revision=commit, streaming=True)
    except (HTTPError, OSError, ValueError) as error:  # datasets says ValueError for a config or split that isn't there
        raise RequestError(
            f"the dataset {source.repo} can't be read ({type(error).__name__}: {str(error)[:300]}). Check the network; "
            f"if it is gated, ask for access at https://huggingface.co/datasets/{source.repo} and set HF_TOKEN; or use "
            "a local copy: a source of kind 'file'."
        ) from None
