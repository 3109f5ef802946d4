"""A teacher's top-k for every token that is learned, beside the packs: 5 bytes an entry, in shards of whole packs.

Row n of a shard belongs to the n-th label that takes loss, counted through its packs in order: the teacher's most
probable tokens in that place, as 3 bytes for an id and 2 for its log-probability (float16), and the log-probability of
the label itself. A shard is one file of rows and one JSON file, written last, that says which packs it covers and the
hash of their tokens and labels; a split whose JSON files cover all packs is whole. Files are memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from r1distill.data.errors import R1DistillError
from r1distill.students.template import IGNORE

SHARD_TOKENS = 2**21  # of packs, about: 0.7 GB of rows at k = 64
ID_BYTES = 3
PADDING = 2**24 - 1  # the id that pads a row with fewer than k entries
SPOT_ROWS = 4096  # of a shard that are compared with its labels when it is opened
TOLERANCE = 0.02  # nats between a label's log-probability and its entry: both are rounded to float16

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids (N, k), log-probabilities (N, k), the labels' own (N,)


@dataclass(frozen=True)
class Shard:
    """What a shard's JSON file says."""

    number: int
    first: int  # pack
    last: int  # the pack after its last
    rows: int
    k: int
    tokens: str  # sha256 over input ids and labels of its packs

    @property
    def name(self) -> str:
        return f"{self.number:05d}"


def ranges(packs: pa.Table, shard_tokens: int = SHARD_TOKENS) -> list[tuple[int, int]]:
    """The packs [first, last) of each shard; the same for whoever asks."""
    width = max(map(len, packs["input_ids"].slice(0, 16)), default=1)
    each = max(1, shard_tokens // max(1, width))
    return [(first, min(first + each, packs.num_rows)) for first in range(0, packs.num_rows, each)]


def digest(packs: pa.Table) -> str:
    """sha256 over the token ids, labels and lengths of packs."""
    found = hashlib.sha256()
    for name in ("input_ids", "labels", "seq_lengths"):
        for chunk in packs[name].chunks:
            found.update(np.diff(chunk.offsets.to_numpy()).astype("<i4").tobytes())
            found.update(chunk.flatten().to_numpy().astype("<i4", copy=False).tobytes())
    return found.hexdigest()


def targets(packs: pa.Table) -> np.ndarray:
    """(packs,) how many labels of each take loss."""
    counts = [
        np.add.reduceat(np.append(chunk.flatten().to_numpy() != IGNORE, 0), chunk.offsets.to_numpy()[:-1] - base)
        for chunk in packs["labels"].chunks
        if len(chunk)
        for base in [chunk.offsets[0].as_py()]
    ]
    return np.concatenate(counts).astype(np.int64) if counts else np.zeros(0, np.int64)


def _labels(packs: pa.Table, rows: int) -> np.ndarray:
    """The first ``rows`` labels that take loss."""
    found: list[np.ndarray] = []
    for chunk in packs["labels"].chunks:
        flat = chunk.flatten().to_numpy()
        found.append(flat[flat != IGNORE])
        if sum(map(len, found)) >= rows:
            break
    return np.concatenate(found)[:rows] if found else np.zeros(0, np.int32)


def is_written(folder: Path, number: int, packs: pa.Table, k: int) -> bool:
    """Whether shard ``number`` of these packs is already there, whole."""
    file = folder / f"{number:05d}.json"
    if not file.is_file():
        return False
    shard = Shard(**json.loads(file.read_text()))
    return shard.k == k and shard.tokens == digest(packs) and _bin(folder, shard).stat().st_size == _size(shard)


def write(folder: Path, number: int, first: int, packs: pa.Table, k: int, rows: Iterator[Rows]) -> Shard:
    """Write the shard that covers ``packs``, the first of which is pack ``first``, from the ``rows`` of each in turn.

    Raises R1DistillError where a pack's rows are not as many as its labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = targets(packs)
    shard = Shard(number, first, first + packs.num_rows, int(counts.sum()), k, digest(packs))
    partial = folder / f".{shard.name}.{uuid.uuid4().hex[:8]}"  # whoever is taken for dead may be writing it too
    with partial.open("wb") as handle:
        handle.truncate(_size(shard))
    if shard.rows:
        logprobs, own, ids = _map(partial, shard, "r+")
        place = 0
        for count, (its_ids, its_logprobs, its_own) in zip(counts.tolist(), rows, strict=True):
            if len(its_ids) != count:
                raise R1DistillError(f"a pack with {count} labels got {len(its_ids)} rows of logits. This is a bug.")
            here = slice(place, place + count)
            whole = np.where(its_ids < 0, PADDING, its_ids).astype("<u4")
            ids[here] = whole[:, :, None].view(np.uint8)[:, :, :ID_BYTES]
            logprobs[here], own[here] = its_logprobs, its_own
            place += count
        logprobs.base.flush()
    with partial.open("rb") as handle:
        os.fsync(handle.fileno())
    partial.replace(_bin(folder, shard))
    partial.write_text(json.dumps(asdict(shard)) + "\n")
    partial.replace(folder / f"{shard.name}.json")
    return shard


def rows(folder: Path) -> int:
    """How many rows the shards in a folder have, whole or not."""
    return sum(json.loads(file.read_text())["rows"] for file in folder.glob("[0-9]*.json"))


def sweep(folder: Path) -> None:
    """Delete what writers that died have left."""
    for file in folder.glob(".*"):
        file.unlink(missing_ok=True)


def _bin(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.name}.bin"


def _size(shard: Shard) -> int:
    return shard.rows * (shard.k * (2 + ID_BYTES) + 2)


def _map(file: Path, shard: Shard, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-probabilities (rows, k), the labels' (rows,), ids (rows, k, 3 bytes)) over the memory-mapped file."""
    raw = np.memmap(file, np.uint8, mode)
    entries, rows = shard.rows * shard.k, shard.rows
    logprobs = raw[: 2 * entries].view("<f2").reshape(rows, shard.k)
    own = raw[2 * entries : 2 * entries + 2 * rows].view("<f2")
    return logprobs, own, raw[2 * entries + 2 * rows :].reshape(rows, shard.k, ID_BYTES)


class TopK:
    """The rows of one split, found by pack.

    Opening checks that the shards are whole, that they were made from these very packs, and that rows stand with their
    labels: where a label is among its row's ids, its entry must be the log-probability that the label got.
    Raises R1DistillError where one of that does not hold.
    """

    def __init__(self, folder: Path, packs: pa.Table) -> None:
        files = sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))
        self.shards = [Shard(**json.loads(file.read_text())) for file in files]
        covered = 0
        for shard in self.shards:
            if shard.first != covered:
                break
            covered = shard.last
        if covered != packs.num_rows:
            raise R1DistillError(
                f"{folder} has logits for packs up to {covered} of {packs.num_rows}. Run the stage 'logits' to its end."
            )
        self.maps = []
        for shard in self.shards:
            part = packs.slice(shard.first, shard.last - shard.first)
            size = _bin(folder, shard).stat().st_size
            if size != _size(shard):
                raise R1DistillError(f"{_bin(folder, shard)} has {size} bytes, {_size(shard)} expected. Delete it.")
            if digest(part) != shard.tokens:
                raise R1DistillError(
                    f"{folder / shard.name}.json was made from other packs than {shard.first} to {shard.last} of "
                    "these: tokens or labels differ. Delete the logits' folder to have it built again."
                )
            self.maps.append(_map(_bin(folder, shard), shard, "r") if shard.rows else None)
            self._check_rows(folder, shard, part)
        self.counts = targets(packs)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])

    def _check_rows(self, folder: Path, shard: Shard, packs: pa.Table) -> None:
        rows = min(SPOT_ROWS, shard.rows)
        if not rows:
            return
        labels = _labels(packs, rows)
        ids, logprobs, own = self._read(len(self.maps) - 1, slice(0, rows))
        off = np.abs(np.where(ids == labels[:, None], logprobs - own[:, None], 0)).max(1) > TOLERANCE
        if off.any():
            raise R1DistillError(
                f"{_bin(folder, shard)}: row {int(off.argmax())} is not the one of its label: its entry for it differs "
                "from the label's log-probability. Rows are shifted: delete the logits' folder to have it built again."
            )

    def _read(self, number: int, rows: slice) -> Rows:
        found = self.maps[number]
        assert found is not None
        logprobs, own, packed = (one[rows] for one in found)
        whole = np.zeros((*packed.shape[:2], 4), np.uint8)
        whole[:, :, :ID_BYTES] = packed
        ids = whole.view("<i4")[:, :, 0]
        return np.where(ids == PADDING, -1, ids), logprobs.astype(np.float32), own.astype(np.float32)

    @property
    def none(self) -> tuple[np.ndarray, np.ndarray]:
        """What a pack without labels has."""
        k = self.shards[0].k
        return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)

    def of(self, pack: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids (N, k) int32, log-probabilities (N, k) float32) of a pack's N labels that take loss; -1 is padding."""
        number = next(place for place, shard in enumerate(self.shards) if shard.first <= pack < shard.last)
        shard = self.shards[number]
        if not self.counts[pack]:
            return self.none
        first = int(self.starts[pack] - self.starts[shard.first])
        ids, logprobs, _ = self._read(number, slice(first, first + int(self.counts[pack])))
        return ids, logprobs


def concatenated(topk: TopK, packs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of several packs, or of none, one after the other."""
    parts = [topk.none, *map(topk.of, packs)]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([logprobs for _, logprobs in parts])
