"""Parquet for publishing: shards that can be downloaded and viewed one by one, in row groups that fit in memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SHARD_BYTES = 500_000_000  # of Arrow data, before compression
ROWS_PER_GROUP = 1000


def write(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path, split: str) -> int:
    """Write ``split-00000-of-0000N.parquet`` files and return the number of rows; no rows make no file.

    The same rows in the same batches make the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Path] = []
    rows = room = 0
    writer = None
    try:
        for batch in batches:
            if writer is None or room < 0:
                if writer is not None:
                    writer.close()
                parts.append(folder / f".{split}-{len(parts)}.partial")
                writer, room = pq.ParquetWriter(parts[-1], schema, compression="zstd"), SHARD_BYTES
            writer.write_batch(batch)
            rows, room = rows + batch.num_rows, room - batch.nbytes
    finally:
        if writer is not None:
            writer.close()
    for number, part in enumerate(parts):
        part.rename(folder / f"{split}-{number:05d}-of-{len(parts):05d}.parquet")
    return rows
