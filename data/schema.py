"""The hand-offs between stages as Arrow schemas, checked at every write and every read.

A table is a folder that ``datasets.load_from_disk`` memory-maps: one Arrow stream and two small JSON files. It is
written in batches, so a table never has to fit in memory, and read here as a memory-mapped ``pyarrow.Table``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1distill.data.errors import R1DistillError

DATA_FILE = "data-00000-of-00001.arrow"
ROWS_PER_BATCH = 512

_TEXT, _INT = pa.string(), pa.int64()

PROMPT = pa.schema(
    [
        ("prompt_id", _TEXT),  # hash of the normalised question alone
        ("question", _TEXT),
        ("domain", _TEXT),  # math, code, stem, logic, general
        ("reference_answer", _TEXT),
        ("verifier", _TEXT),
        ("verifier_args", _TEXT),  # JSON
        ("source", _TEXT),
        ("source_id", _TEXT),
        ("license", _TEXT),
    ]
)

# The prompts that were rejected for being another's like, with the evidence.
REJECTED_PROMPT = pa.schema(
    [
        ("prompt_id", _TEXT),
        ("question", _TEXT),
        ("source", _TEXT),
        ("source_id", _TEXT),
        ("reason", _TEXT),  # as the manifest counts it
        ("against", _TEXT),  # a benchmark's name, or "prompts"
        ("matched_id", _TEXT),  # the benchmark's question, or the earlier prompt
        ("matched_text", _TEXT),  # the passage of this question that matches; of a near duplicate, the earlier question
        ("score", pa.float64()),  # words in a row for n-grams, otherwise a similarity up to 1
    ]
)

TRACE = pa.schema(
    [
        ("prompt_id", _TEXT),
        ("sample", _INT),
        ("teacher", _TEXT),  # as the server reports it
        ("teacher_revision", _TEXT),  # a commit
        ("sampling", _TEXT),  # JSON
        ("request_text", _TEXT),  # exactly what was sent: the messages, as JSON
        ("completion", _TEXT),  # exactly what came back
        ("reasoning", _TEXT),  # the thinking, without its tags
        ("response", _TEXT),  # what follows the thinking
        ("finish_reason", _TEXT),
        ("state", _TEXT),  # done, truncated, refused, failed
        ("error", _TEXT),
        ("prompt_tokens", _INT),
        ("reasoning_tokens", _INT),
        ("completion_tokens", _INT),
        ("seconds", pa.float64()),
        ("cost_usd", pa.decimal128(18, 9)),
        ("created_at", _TEXT),  # ISO 8601, UTC
    ]
)

VERDICT = pa.schema(
    [
        ("prompt_id", _TEXT),
        ("sample", _INT),
        ("check", _TEXT),
        ("outcome", _TEXT),  # pass, fail, unverifiable
        ("reason", _TEXT),
        ("detail", _TEXT),
        ("version", _TEXT),
    ]
)

MESSAGE = pa.struct([("role", _TEXT), ("content", _TEXT), ("thinking", _TEXT)])

TRAINING_ROW = pa.schema(
    [
        ("prompt_id", _TEXT),
        ("sample", _INT),
        ("messages", pa.list_(MESSAGE)),  # user (content), assistant (thinking, content)
        ("domain", _TEXT),
        ("source", _TEXT),
        ("license", _TEXT),
        ("completion_tokens", _INT),
        ("pass_rate", pa.float64()),  # of the prompt's traces that were judged, how many were right
    ]
)

PACK = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),  # -100 where no loss is taken
        ("seq_lengths", pa.list_(pa.int32())),  # lengths of the members, in order; they sum to len(input_ids)
        ("members", pa.list_(pa.struct([("prompt_id", _TEXT), ("sample", _INT), ("domain", _TEXT)]))),
    ]
)

# What a student answered while it learned from its own answers.
ROLLOUT = pa.schema(
    [
        ("step", _INT),  # of the training, from 1
        ("number", _INT),  # in the step, over all processes; answers to one prompt stand together
        ("prompt_id", _TEXT),
        ("completion", _TEXT),  # as a server would give it: without its end token
        ("token_ids", pa.list_(pa.int32())),  # exactly what was sampled, with the end token where there is one
        ("finish_reason", _TEXT),  # stop, length
        ("verdicts", pa.list_(pa.struct([("check", _TEXT), ("outcome", _TEXT), ("reason", _TEXT)]))),
        ("reward", pa.float64()),  # null where nothing was learned from it
        ("advantage", pa.float64()),  # null as well
    ]
)


class TableWriter:
    """Writes rows of one schema into ``folder``; see ``writing``."""

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_batch: int = ROWS_PER_BATCH):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.schema, self.rows, self.rows_per_batch = folder, schema, 0, rows_per_batch
        self._pending: list[Mapping[str, Any]] = []
        self._stream = pa.ipc.new_stream(str(folder / DATA_FILE), schema)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; its keys must be exactly the schema's columns."""
        if row.keys() != set(self.schema.names):
            odd = sorted(set(row) ^ set(self.schema.names))
            raise R1DistillError(f"a row for {self.folder} has other columns than its schema: {', '.join(odd)}")
        self._pending.append(row)
        if len(self._pending) >= self.rows_per_batch:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._stream.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self.schema))
            self.rows += len(self._pending)
            self._pending = []

    def close(self) -> None:
        self._flush()
        self._stream.close()
        _describe(self.folder, self.schema)


@contextmanager
def writing(folder: Path, schema: pa.Schema, rows_per_batch: int = ROWS_PER_BATCH) -> Iterator[TableWriter]:
    """Open ``folder`` for writing rows; the table is complete when the block ends without an exception."""
    writer = TableWriter(folder, schema, rows_per_batch)
    try:
        yield writer
    except BaseException:
        writer._stream.close()
        raise
    writer.close()


def write(folder: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write all ``rows`` into ``folder`` and return how many there were."""
    with writing(folder, schema) as writer:
        for row in rows:
            writer.append(row)
    return writer.rows


def read(folder: Path, schema: pa.Schema) -> pa.Table:
    """Memory-map the table in ``folder``; raises R1DistillError where it is damaged or has another schema."""
    file = folder / DATA_FILE
    try:
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_stream(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(file, error) from error
    if not table.schema.equals(schema):
        raise R1DistillError(
            f"{file} has another schema than this version expects.\nexpected: {schema}\nfound: {table.schema}\n"
            "Delete its artifact folder and run again to rebuild it."
        )
    return table


def _damaged(file: Path, error: Exception) -> R1DistillError:
    return R1DistillError(
        f"{file} can't be read as an Arrow table ({error}). Delete its artifact folder and run again to rebuild it."
    )


def stream(folder: Path, schema: pa.Schema, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The table in ``folder`` batch by batch, read and forgotten: a memory map would count every page it has touched.

    Raises as ``read`` does.
    """
    read(folder, schema)
    file = folder / DATA_FILE
    try:
        with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as batches:
            for batch in batches:
                yield batch.select(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(file, error) from error


def rows(table: pa.Table, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Iterate over a memory-mapped table row by row, holding one batch in memory at a time."""
    for batch in (table.select(columns) if columns else table).to_batches(max_chunksize=ROWS_PER_BATCH):
        yield from batch.to_pylist()


def write_splits(folder: Path, names: list[str]) -> None:
    """Make ``folder``, whose sub-folders are tables, one ``datasets.DatasetDict`` on disk."""
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": names}))


def _describe(folder: Path, schema: pa.Schema) -> None:
    """The two JSON files that make an Arrow stream a ``datasets`` folder."""
    (folder / "dataset_info.json").write_text(
        json.dumps({"citation": "", "description": "", "features": _features(schema), "homepage": "", "license": ""})
    )
    state: dict[str, Any] = {
        "_data_files": [{"filename": DATA_FILE}],
        "_fingerprint": "r1distill",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state))


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The schema in ``datasets``' own notation (what ``Features.to_dict`` gives), without importing the library."""

    def feature(kind: pa.DataType) -> Any:
        if pa.types.is_list(kind):
            return {"feature": feature(kind.value_type), "_type": "List"}
        if pa.types.is_struct(kind):
            return {field.name: feature(field.type) for field in kind}
        name = {"double": "float64"}.get(str(kind), str(kind))
        return {"dtype": name, "_type": "Value"}

    return {field.name: feature(field.type) for field in schema}
