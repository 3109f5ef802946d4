"""Damaged files: every row in its place, those that can't be read with the reason why."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1distill.data.errors import RequestError
from r1distill.data.sources import file_rows

ROW = {"prompt": "What is 2 + 2?", "completion": "It is 4."}
LINE = json.dumps(ROW).encode()


def read(file):
    """The rows, or the first word of why one can't be read."""
    return [row if isinstance(row, dict) else row.partition(":")[0] for row in file_rows(file)]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (b"\x00\x00\x00", "unreadable"),
        (LINE.replace(b"is", b"i\x00s"), "unreadable"),
        (LINE.replace(b"is", b"\xff\xfe"), "unreadable"),
        (LINE[:20], "unreadable"),
        (b"9" * 5000, "unreadable"),
        (b"null", "unreadable"),
        (b"[" * 100_000, "unreadable"),
        (b"\xef\xbb\xbf" + LINE, ROW),
        (LINE + b"\r", ROW),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_damaged_line_keeps_its_place(tmp_path, damage, found, suffix):
    file = tmp_path / f"in{suffix}"
    whole = b"\n".join([LINE, damage, LINE])
    file.write_bytes(gzip.compress(whole) if suffix == ".jsonl.gz" else whole)
    assert read(file) == [ROW, found, ROW]


def test_what_is_no_gzip_or_breaks_off_says_so_in_its_last_row(tmp_path):
    file = tmp_path / "in.jsonl.gz"
    for damaged in (LINE, gzip.compress(LINE + b"\n") + b"\x1f\x8b\x08\x00 no more"):
        file.write_bytes(damaged)
        assert read(file)[-1] == "unreadable"
    file.write_bytes(b"")
    assert read(file) == []


def test_a_damaged_row_group_is_lost_alone(tmp_path):
    file = tmp_path / "in.parquet"
    rows = [{"completion": os.urandom(20).hex(), "n": n} for n in range(900)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=300)
    assert read(file) == rows
    damaged = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    damaged[start : start + 200] = bytes(200)
    file.write_bytes(damaged)
    assert read(file) == [*rows[:300], *["unreadable"] * 300, *rows[600:]]


@pytest.mark.parametrize("kind", ["text", "date"])
def test_a_value_that_is_none_of_its_type_costs_its_row_alone(tmp_path, kind):
    file = tmp_path / "in.parquet"
    if kind == "text":
        offsets, text = pa.array([0, 2, 4, 6], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff\xfeef")
        values = pa.Array.from_buffers(pa.string(), 3, [None, offsets, text])
    else:
        values = pa.array([0, 2**61, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"n": [0, 1, 2], "value": values}), file)
    found = read(file)
    assert [row["n"] if isinstance(row, dict) else row for row in found] == [0, "unreadable", 2]


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_a_file_that_cant_be_opened_is_told(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(RequestError, match="can't be read"):
        read(tmp_path / name)
