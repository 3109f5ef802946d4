"""Words of many texts at once, as 64-bit hashes in numpy arrays: what dedup and decontamination compare.

A word is a run of Unicode letters, digits and underscores, as ``\\w+`` finds it, in NFKC and lower case; an ideograph
or kana is a word of its own, because Chinese and Japanese put no spaces between words. Punctuation, LaTeX's backslashes
and braces, and line breaks only separate. Two different words share a hash with a chance of about 2⁻⁶⁴.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")

_IDEOGRAPHS = "\u3041-\u3096\u30a1-\u30fa\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")  # what ``split`` finds, one text at a time
BATCH_CHARACTERS = 1 << 18  # arrays of 2 MiB stay in a core's cache; a longer text is a batch of its own

# What ``figures`` counts, one text at a time.
FIGURE = re.compile(r"\d+|(?<![^\W\d])-|-(?![^\W\d])|[+/^=<>−×÷±≤≥%]")
# What a code point can be: _WORD with any of the others, or _SPACE.
_WORD, _IDEOGRAPH, _DIGIT, _OPERATOR, _SPACE = 1, 2, 4, 8, 16
_OPERATORS = "+-/^=<>−×÷±≤≥%"  # no `*`: Markdown's emphasis comes and goes between copies of one question
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2⁶⁴
_BASE_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def fold(text: str) -> str:
    """The text as words are looked for in it: NFKC, lower case."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()


def mix(values: Any) -> Any:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 in, uint64 out, each input bit sways each output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def _classes() -> Any:
    """uint8[code point]: what it is."""
    characters = np.arange(sys.maxunicode + 1, dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    table = np.zeros(len(characters), np.uint8)
    for pattern, kind in ((r"\w+", _WORD), (r"\d+", _DIGIT), (r"\s+", _SPACE)):
        for run in re.finditer(pattern, characters):
            table[run.start() : run.end()] |= kind
    for first, last in (part.split("-") for part in re.findall(".-.", _IDEOGRAPHS)):
        table[ord(first) : ord(last) + 1] |= table[ord(first) : ord(last) + 1] * _IDEOGRAPH
    table[[ord(operator) for operator in _OPERATORS]] |= _OPERATOR
    return table


@lru_cache(maxsize=2)
def _powers(size: int) -> tuple[Any, Any]:
    """uint64[size] each: the base's powers and their inverses modulo 2⁶⁴."""
    up, down = np.full(size, _BASE), np.full(size, _BASE_INVERSE)
    up[0] = down[0] = 1
    return np.multiply.accumulate(up), np.multiply.accumulate(down)


class _Sums:
    """Hashes of slices of a sequence: prefix sums of value·baseⁱ modulo 2⁶⁴, divided by the slice's first power."""

    def __init__(self, values: Any):
        up, self._down = _powers(max(2 * BATCH_CHARACTERS, 1 << int(len(values) + 1).bit_length()))
        self._sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(np.multiply(values, up[: len(values)], dtype=np.uint64), out=self._sums[1:])

    def slices(self, first: Any, end: Any) -> Any:
        return mix((self._sums[end] - self._sums[first]) * self._down[first])


@dataclass(frozen=True)
class Words:
    """The words of a batch of D texts, W in all.

    ``folded`` joins the folded texts, each with a NUL behind it; ``codes`` are its characters, ``kinds`` what they are.
    ``start`` and ``end`` int64[W] are places in it, ``text_starts`` int64[D + 1] too. ``offsets`` int64[D + 1] says
    which words are a text's: ``offsets[d]`` to ``offsets[d + 1]``.
    """

    folded: str
    codes: Any
    kinds: Any
    text_starts: Any  # int64[D + 1], in characters
    start: Any
    end: Any
    offsets: Any

    @cached_property
    def _characters(self) -> _Sums:
        return _Sums(self.codes)

    @cached_property
    def hashes(self) -> Any:
        """uint64[W]: each word's."""
        return self._characters.slices(self.start, self.end)

    @cached_property
    def _sequence(self) -> _Sums:
        return _Sums(self.hashes)

    @property
    def owners(self) -> Any:
        """int64[W]: which text each word is of."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @property
    def texts(self) -> Any:
        """uint64[D]: a hash of each text's words in their order."""
        return self._sequence.slices(self.offsets[:-1], self.offsets[1:])

    @property
    def numeric(self) -> Any:
        """bool[W]: which words begin with a digit; with ``digits_apart`` they are digits alone."""
        return (self.kinds[self.start] & _DIGIT) > 0

    def prefixes(self, most: int) -> Any:
        """uint64[W]: the hash of each word's first ``most`` characters, without a plural's closing s: a crude stem."""
        length = self.end - self.start
        plural = (length > 3) & (self.codes[self.end - 1] == ord("s"))
        return self._characters.slices(self.start, self.start + np.minimum(length - plural, most))

    def ngrams(self, size: int, short: bool = False) -> tuple[Any, Any]:
        """The word n-grams of every text: hashes uint64[N] and first words int64[N], in order.

        A text of fewer than ``size`` words has none; with ``short`` it has one, of all its words.
        """
        first = np.arange(len(self.start))
        text_end = np.repeat(self.offsets[1:], np.diff(self.offsets))
        whole = first + size <= text_end
        if short:
            head = np.zeros(len(first) + 1, bool)
            head[self.offsets] = True
            whole |= head[:-1]
        first = first[whole]
        return self._sequence.slices(first, np.minimum(first + size, text_end[whole])), first

    def figures(self) -> Any:
        """uint64[D]: a hash of each text's numbers and mathematical operators, in their order.

        A hyphen between letters is none.
        """
        digit = (self.kinds & _DIGIT) > 0
        found = (self.kinds & (_DIGIT | _OPERATOR)) > 0
        letter = (self.kinds & (_WORD | _DIGIT)) == _WORD
        hyphen = np.flatnonzero(self.codes == ord("-"))
        hyphen = hyphen[(hyphen > 0) & (hyphen < len(self.codes) - 1)]
        found[hyphen[letter[hyphen - 1] & letter[hyphen + 1]]] = False
        at = np.flatnonzero(found)
        values = self.codes[at].astype(np.uint64)
        values[digit[at] & ~digit[at - 1]] ^= _BASE  # 1 2 is not 12; place -1 is the NUL behind the last text
        edges = np.searchsorted(at, self.text_starts)
        return _Sums(values).slices(edges[:-1], edges[1:])

    def text(self, first: int, last: int) -> str:
        """The folded text from word ``first`` to word ``last``, in one line."""
        return " ".join(self.folded[self.start[first] : self.end[last]].split())


def _codes(text: str) -> tuple[Any, Any]:
    """The text's code points, uint8 where it is ASCII and otherwise uint32, and what each of them is, uint8."""
    ascii_kinds = _classes()[:128].tobytes() + bytes(128)
    if text.isascii():
        codes = np.frombuffer(text.encode(), np.uint8)
        return codes, np.frombuffer(text.encode().translate(ascii_kinds), np.uint8)
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    low = np.minimum(codes, 128).astype(np.uint8)
    kinds = np.frombuffer(low.tobytes().translate(ascii_kinds), np.uint8).copy()
    high = np.flatnonzero(low == 128)  # few, as a rule
    kinds[high] = _classes()[codes[high]]
    return codes, kinds


def split(texts: Sequence[str], digits_apart: bool = False) -> Words:
    """Find the words of ``texts``; with ``digits_apart``, 3x is the words 3 and x, and _ separates."""
    folded = "\0".join([*map(fold, texts), ""])
    if folded.count("\0") != len(texts):  # a text holds the character that keeps them apart
        return split([text.replace("\0", " ") for text in texts], digits_apart)
    codes, kinds = _codes(folded)
    text_starts = np.append(0, np.flatnonzero(codes == 0) + 1)

    if digits_apart:
        told_apart = np.where(codes == ord("_"), np.uint8(0), kinds & (_WORD | _IDEOGRAPH | _DIGIT))
    else:
        told_apart = kinds & _WORD
    change = np.empty(len(kinds) + 1, bool)
    change[0] = change[-1] = True
    np.not_equal(told_apart[1:], told_apart[:-1], out=change[1:-1])
    if codes.itemsize > 1:
        ideograph = (kinds & _IDEOGRAPH) > 0
        change[:-1] |= ideograph
        change[1:] |= ideograph
    inside = told_apart > 0
    start, end = np.flatnonzero(change[:-1] & inside), np.flatnonzero(change[1:] & inside) + 1
    return Words(folded, codes, kinds, text_starts, start, end, np.searchsorted(start, text_starts))


def tokens(text: str) -> Any:
    """uint64[T]: a hash of each word and of each other mark of one text, as ``\\w+|[^\\w\\s]`` finds them, unfolded.

    A text of over BATCH_CHARACTERS is taken in pieces, cut at spaces, so that the arrays stay small.
    """
    hashes = []
    begin = 0
    while begin < len(text):
        end = begin + BATCH_CHARACTERS
        if end < len(text):
            end = text.rfind(" ", begin, end) + 1 or end
        codes, kinds = _codes(text[begin:end])
        mark = (kinds & (_WORD | _SPACE)) == 0
        word = kinds & _WORD
        change = np.ones(len(kinds) + 1, bool)
        np.not_equal(word[1:], word[:-1], out=change[1:-1])
        change[:-1] |= mark
        change[1:] |= mark
        edges = np.flatnonzero(change)
        first, last = edges[:-1], edges[1:]
        inside = (kinds[first] & _SPACE) == 0
        hashes.append(_Sums(codes).slices(first[inside], last[inside]))
        begin = end
    return np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)


def grams(hashes: Any, size: int) -> Any:
    """uint64[max(0, T - size + 1)]: a hash of every ``size`` of them in a row."""
    first = np.arange(max(0, len(hashes) - size + 1))
    return _Sums(hashes).slices(first, first + size)


def batches(items: Iterable[Item], size: Callable[[Item], int] = len) -> Iterator[list[Item]]:  # type: ignore[assignment]
    """Cut ``items`` into lists of about BATCH_CHARACTERS by their ``size``."""
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item) + 1
        if total >= BATCH_CHARACTERS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
