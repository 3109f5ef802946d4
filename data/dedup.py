"""Near-duplicates: MinHash (Broder 1997) with locality-sensitive hashing proposes, exact Jaccard similarity decides.

A text is the set of its 3-word shingles. Of 125 permutations of the shingles' hashes it keeps the smallest value each,
in 25 bands of 5; texts that agree in a whole band are candidates. A pair of similarity s is proposed with the chance
1 - (1 - s⁵)²⁵: 99.995% at 0.8, 98.9% at 0.7. Every candidate is confirmed on the shingle sets themselves, so what is
rejected is at or above the threshold, always.

Questions made from one template share nearly all their words and differ in their numbers. So two texts are duplicates
only if their numbers and operators are the same in the same order: 3 apples and 5 pears are not 5 apples and 3 pears,
3 + 4 is not 3 - 4. That is part of a band's key, so a template's questions never even become candidates.

Each text is compared with the kept ones before it, and dropped for the first that is similar enough: what is dropped
always has its like among the kept, which chains of pairs don't promise.

Memory: 216 bytes a text, some 40 more while the bands are looked through, and a few hundred for each text that shares a
band with another. The shingles' hashes, 8 bytes a word, lie in a temporary file; the texts themselves are not kept.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from r1distill.data import words

SHINGLE_WORDS = 3
BANDS, ROWS = 25, 5
# A band's key that so many kept texts share says little (a long preamble); later ones are not compared with still more.
MOST_PER_KEY = 1000
_BLOCK = 1 << 16  # hashes permuted at a time: 256 KiB stay in a core's cache
_BATCHES = 8  # batches of words signed together, so that enough texts are of one length


class Pair(NamedTuple):
    """Text number ``text`` was dropped for ``kept``, an earlier one that was kept; both count from 0."""

    text: int
    kept: int
    similarity: float


def near_duplicates(
    texts: Iterable[str], threshold: float = 0.8, *, figures: bool = True, scratch: Path | None = None
) -> tuple[Any, list[Pair]]:
    """Which of N ``texts`` to keep, bool[N], and for each of the others the kept text that it is similar to.

    ``threshold`` is the Jaccard similarity of their 3-word shingles; a text of fewer words is one shingle, one without
    words is always kept. Without ``figures``, numbers and operators may differ (traces: one slip doesn't make another
    text). ``texts`` are read once, in order; the temporary file lies in ``scratch``, or where the system has such.
    """
    with tempfile.TemporaryFile(dir=scratch) as file:
        keys, worded, offsets = [], [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
        count = 0
        cut = words.batches(texts)
        while batches := list(islice(cut, _BATCHES)):
            signed, shingles, lengths = _signed(batches, figures)
            keys.append(signed)
            worded.append(count + np.flatnonzero(lengths))
            offsets.append(offsets[-1][-1] + np.cumsum(lengths[lengths > 0]))
            file.write(shingles.tobytes())
            count += len(lengths)
        file.flush()
        pairs = _confirmed(_Sets(file, np.concatenate(offsets)), keys, threshold)
    names = np.concatenate(worded)
    pairs = [Pair(int(names[text]), int(names[kept]), similarity) for text, kept, similarity in pairs]
    keep = np.ones(count, bool)
    keep[[pair.text for pair in pairs]] = False
    return keep, pairs


def _signed(batches: Sequence[list[str]], figures: bool) -> tuple[Any, Any, Any]:
    """Of D texts: band keys uint64[BANDS, T] of the T that have words, their shingles' hashes, int64[D] how many."""
    shingles, lengths, marks = [], [], []
    for batch in batches:
        split = words.split(batch)
        found, first = split.ngrams(SHINGLE_WORDS, short=True)
        shingles.append(found)
        lengths.append(np.diff(np.searchsorted(first, split.offsets)))
        marks.append(split.figures() if figures else np.zeros(len(batch), np.uint64))
    all_shingles, all_lengths = np.concatenate(shingles), np.concatenate(lengths)
    worded = all_lengths > 0
    keys = _band_keys(signatures(all_shingles, all_lengths[worded])) ^ np.concatenate(marks)[worded]
    return keys, all_shingles, all_lengths


@lru_cache(maxsize=1)
def _factors() -> Any:
    """uint32[BANDS·ROWS], odd: h -> a·h modulo 2³² is a permutation (Dietzfelbinger et al. 1997)."""
    random = np.random.Generator(np.random.PCG64(20250120))
    return random.integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint32) | np.uint32(1)


def signatures(shingles: Any, lengths: Any) -> Any:
    """MinHash signatures uint32[125, D] of D texts, from all their ``shingles`` uint64 and ``lengths`` int64[D] > 0.

    Texts of about one length make a block, filled up with each text's last shingle (the smallest value stays the same),
    so that a permutation and its minima are two passes over a block.
    """
    hashes = (shingles >> np.uint64(32)).astype(np.uint32)
    last = np.cumsum(lengths) - 1
    order = np.argsort(lengths, kind="stable")
    ordered = np.empty((BANDS * ROWS, len(lengths)), np.uint32)
    for begin, stop in _blocks(lengths[order]):
        texts = order[begin:stop]
        places = last[texts] - (lengths[texts] - 1) + np.arange(lengths[texts[-1]])[:, None]
        block = hashes[np.minimum(places, last[texts])]
        permuted = np.empty_like(block)
        for row, factor in enumerate(_factors()):
            np.multiply(block, factor, out=permuted)
            np.minimum.reduce(permuted, axis=0, out=ordered[row, begin:stop])
    out = np.empty_like(ordered)
    out[:, order] = ordered
    return out


def _blocks(lengths: Any) -> Iterator[tuple[int, int]]:
    """Slices of sorted ``lengths``: about _BLOCK shingles, the longest text at most a quarter over the shortest."""
    begin = 0
    while begin < len(lengths):
        shortest = int(lengths[begin])
        alike = int(np.searchsorted(lengths, shortest + shortest // 4 + 4, side="right"))
        stop = min(alike, begin + max(1, _BLOCK // shortest))
        yield begin, stop
        begin = stop


def _band_keys(signature: Any) -> Any:
    """uint64[BANDS, D] from signatures [BANDS·ROWS, D]."""
    keys = np.zeros((BANDS, signature.shape[1]), np.uint64)
    for row in range(ROWS):
        keys = words.mix(keys ^ signature[row::ROWS])
    return keys


class _Sets:
    """Shingle sets, read from the temporary file; the last few stay in memory."""

    def __init__(self, file: BinaryIO, offsets: Any):
        self._file, self._offsets = file, offsets
        self.of = lru_cache(maxsize=256)(self._read)

    def _read(self, text: int) -> frozenset[int]:
        begin, end = self._offsets[text : text + 2].tolist()
        stored = os.pread(self._file.fileno(), 8 * (end - begin), 8 * begin)
        return frozenset(np.frombuffer(stored, np.uint64).tolist())

    def similarity(self, text: int, other: int) -> float:
        """The exact Jaccard similarity of two shingle sets."""
        a, b = self.of(text), self.of(other)
        shared = len(a & b)
        return shared / (len(a) + len(b) - shared)


def _confirmed(sets: _Sets, keys: Sequence[Any], threshold: float) -> list[Pair]:
    """For each text whose like was kept before it, the first such; texts are numbered as ``keys`` has them."""
    text_of, group_of, groups = _groups(keys)
    kept_of: list[list[int]] = [[] for _ in range(groups)]
    pairs = []
    edges = np.flatnonzero(np.diff(text_of, prepend=-1, append=-1)).tolist()
    group_list = group_of.tolist()
    for begin, end in pairwise(edges):
        text, mine = int(text_of[begin]), group_list[begin:end]
        for other in sorted({kept for group in mine for kept in kept_of[group]}):
            similarity = sets.similarity(text, other)
            if similarity >= threshold:
                pairs.append(Pair(text, other, similarity))
                break
        else:
            for group in mine:
                if len(kept_of[group]) < MOST_PER_KEY:
                    kept_of[group].append(text)
    return pairs


def _groups(keys: Sequence[Any]) -> tuple[Any, Any, int]:
    """Who shares a band's key with whom: (text, group) by text, and how many groups there are.

    Groups of the same texts, which near-duplicates form in many bands, count once.
    """
    members, sizes, marks = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for band in range(BANDS if keys else 0):
        column = np.concatenate([part[band] for part in keys])
        order = np.argsort(column)
        first = np.flatnonzero(np.diff(column[order], prepend=~column[order[:1]]))
        size = np.diff(first, append=len(order))
        shared = np.repeat(size > 1, size)
        size = size[size > 1]
        texts = order[shared].astype(np.int32)
        if len(texts):
            members.append(texts)
            sizes.append(size)
            begins = np.cumsum(size) - size
            marks.append(np.add.reduceat(words.mix(texts.astype(np.uint64)), begins))
    size, texts = np.concatenate(sizes), np.concatenate(members)
    once = np.zeros(len(size), bool)
    once[np.unique(np.concatenate(marks), return_index=True)[1]] = True
    texts, size = texts[np.repeat(once, size)], size[once]
    group = np.repeat(np.arange(len(size), dtype=np.int32), size)
    by_text = np.argsort(texts, kind="stable")
    return texts[by_text], group[by_text], len(size)
