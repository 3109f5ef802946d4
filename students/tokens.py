"""A split's traces as token ids on disk: tokenised in batches on all cores, in parts that survive a kill.

A part is two files: the ids of its traces laid end to end (int32), and an Arrow table of what they are, written last.
Rows are read as a stream and ids by position, never through a memory map, so that memory stays flat however long the
split is.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.students import bpe
from r1distill.students.template import IGNORE, Template, Unusable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PART_ROWS = 8192
BATCH_CHARACTERS = 1_000_000  # the tokenizer's own records take some 30 bytes a character while a batch is in work
MOST_THREADS = 16  # batches in work at once

_WHAT = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int64()),
        ("domain", pa.string()),
        ("tokens", pa.int32()),
        ("prefix_tokens", pa.int32()),  # what is read and takes no loss
    ]
)

Row = dict[str, Any]


class Tokens:
    """The kept traces of all parts, in order; ``lengths`` and ``prefixes`` are (N,) int32."""

    def __init__(self, folder: Path):
        self.read, self.rejected = 0, Counter[str]()
        self.longest_rejected = 0
        self._files: list[int] = []
        tables, parts, starts = [], [], []
        for number, file in enumerate(sorted(folder.glob("part-*.arrow"))):
            with pa.OSFile(str(file)) as source:
                table = pa.ipc.open_file(source).read_all()
            told = json.loads(table.schema.metadata[b"part"])
            self.read += told["read"]
            self.rejected.update(told["rejected"])
            self.longest_rejected = max(self.longest_rejected, told["longest_rejected"])
            self._files.append(os.open(file.with_suffix(".ids"), os.O_RDONLY))
            lengths = table["tokens"].to_numpy()
            tables.append(table.replace_schema_metadata())
            parts.append(np.full(len(lengths), number, np.int32))
            starts.append(np.cumsum(lengths, dtype=np.int64) - lengths)
        what = pa.concat_tables(tables).combine_chunks() if tables else _WHAT.empty_table()
        self.lengths, self.prefixes = what["tokens"].to_numpy(), what["prefix_tokens"].to_numpy()
        self._who = [what[name].combine_chunks() for name in ("prompt_id", "sample", "domain")]
        self._parts = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        self._starts = np.concatenate(starts) if starts else np.zeros(0, np.int64)

    def ids(self, index: int) -> np.ndarray:
        """The (T,) int32 ids of one trace."""
        size = 4 * int(self.lengths[index])
        return np.frombuffer(os.pread(self._files[self._parts[index]], size, 4 * int(self._starts[index])), np.int32)

    def pack(self, members: Sequence[int]) -> Row:
        """A row of ``schema.PACK``: these traces laid end to end, without loss on what each only reads."""
        ids = np.concatenate([self.ids(index) for index in members])
        labels, lengths = ids.copy(), self.lengths[members]
        for end, length, prefix in zip(np.cumsum(lengths), lengths, self.prefixes[members], strict=True):
            labels[end - length : end - length + prefix] = IGNORE
        prompt_ids, samples, domains = self._who
        who = [
            {"prompt_id": prompt_ids[i].as_py(), "sample": samples[i].as_py(), "domain": domains[i].as_py()}
            for i in members
        ]
        return {"input_ids": ids, "labels": labels, "seq_lengths": lengths, "members": who}

    def close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = []


def tokenise(
    template: Template, tokenizer: PreTrainedTokenizerFast, split: Path, work: Path, limit: int, name: str
) -> Tokens:
    """Tokenise the split's rows into parts in ``work``, leaving out those that a killed run has finished.

    A row that can't be used, or that is longer than ``limit`` tokens, is rejected with its reason.
    """
    work.mkdir(parents=True, exist_ok=True)
    total = schema.read(split, schema.TRAINING_ROW).num_rows
    columns = ["prompt_id", "sample", "domain", "messages"]
    rows = (row for batch in schema.stream(split, schema.TRAINING_ROW, columns) for row in batch.to_pylist())
    with tqdm(desc=f"tokens {name}", total=total, unit="trace", disable=None, delay=2) as bar:
        for number in range(-(-total // PART_ROWS)):
            file = work / f"part-{number:05}.arrow"
            part = islice(rows, PART_ROWS)
            if file.is_file():
                bar.update(sum(1 for _ in part))
            else:
                _write_part(file, _encoded(template, tokenizer, part, bar.update), limit)
    return Tokens(work)


def _write_part(file: Path, encoded: Iterator[tuple[Row, np.ndarray | str, int]], limit: int) -> None:
    kept: dict[str, list[Any]] = {name: [] for name in _WHAT.names}
    read, rejected, longest_rejected = 0, Counter[str](), 0
    with file.with_suffix(".ids").open("wb") as out:
        for row, ids, prefix in encoded:
            read += 1
            if isinstance(ids, str):
                rejected[ids] += 1
            elif len(ids) > limit:
                rejected[f"longer than {limit:,} tokens"] += 1
                longest_rejected = max(longest_rejected, len(ids))
            else:
                out.write(ids.data)
                values = (row["prompt_id"], row["sample"], row["domain"], len(ids), prefix)
                for column, value in zip(kept.values(), values, strict=True):
                    column.append(value)
    told = {"read": read, "rejected": rejected, "longest_rejected": longest_rejected}
    table = pa.table(kept, schema=_WHAT.with_metadata({"part": json.dumps(told)}))
    unfinished = file.with_suffix(".unfinished")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    unfinished.rename(file)


def _encoded(
    template: Template, tokenizer: PreTrainedTokenizerFast, rows: Iterator[Row], done: Callable[[int], Any]
) -> Iterator[tuple[Row, np.ndarray | str, int]]:
    """Each row with its ids and how many of them it only reads, in order; the reason in place of ids it can't have.

    The same ids as ``template.encode`` gives one by one.
    """
    waiting: deque[Future[list[tuple[Row, np.ndarray | str, int]]]] = deque()
    fast, threads = bpe.encoder(tokenizer), min(len(os.sched_getaffinity(0)), MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        for batch in _batches(template, rows):
            waiting.append(pool.submit(_encode, tokenizer, fast, batch))
            if len(waiting) > threads:
                yield from waiting.popleft().result()
            done(len(batch))
        while waiting:
            yield from waiting.popleft().result()


def _batches(template: Template, rows: Iterator[Row]) -> Iterator[list[tuple[Row, str, str]]]:
    """Rows with the texts of prefix and target (or the reason against it, and ""), about BATCH_CHARACTERS at a time."""
    batch, characters = [], 0
    for row in rows:
        try:
            before, after = template.texts(row["messages"])
        except Unusable as reason:
            before, after = str(reason), ""
        batch.append((row, before, after))
        characters += len(before) + len(after)
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _encode(
    tokenizer: PreTrainedTokenizerFast, fast: bpe.Encode | None, batch: list[tuple[Row, str, str]]
) -> list[tuple[Row, np.ndarray | str, int]]:
    usable = [text for _, before, after in batch if after for text in (before, after)]
    ids = iter(_ids(tokenizer, fast, usable))
    found: list[tuple[Row, np.ndarray | str, int]] = []
    for row, before, after in batch:
        if after:
            read, learned = next(ids), next(ids)
            found.append((row, np.concatenate([read, learned]), len(read)))
        else:
            found.append((row, before, 0))
    return found


def _ids(tokenizer: PreTrainedTokenizerFast, fast: bpe.Encode | None, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text; what is fast is checked on one text of every batch."""
    rust = tokenizer.backend_tokenizer
    if fast is None or not texts:
        return [np.array(one.ids, np.int32) for one in rust.encode_batch_fast(texts, add_special_tokens=False)]
    ids = [fast(text) for text in texts]
    sample = len(texts) // 2
    if rust.encode(texts[sample], add_special_tokens=False).ids != ids[sample].tolist():
        raise R1DistillError(
            "tiktoken and the tokenizer cut the same text into different tokens, where both were thought to be one. "
            f"Report it with the student's tokenizer.json; the text begins: {texts[sample][:200]!r}"
        )
    return ids
