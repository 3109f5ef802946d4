"""Which prompts a benchmark also asks: the same question, shared word n-grams, or the question in other words.

The benchmarks are indexed, prompts go by in batches; memory depends on the benchmarks alone. Three methods, the first
that holds is the evidence:

- **same question**: equal but for case, spaces and Unicode's compatibility forms.
- **n-gram**: n words in a row stand in both, whatever the punctuation between them.
- **reworded**: within a passage of twice the benchmark question's length, the prompt says nearly all that the question
  says. Words are cut to crude stems and weighted by how rare they are among the benchmarks' questions; function words,
  variables and LaTeX's commands count nothing. The share of the question's weight that the passage holds has to reach
  the threshold. The numbers have to agree: each that is written in digits in one has to stand in the other, in digits
  or as a word. Questions of few content words are told apart by their formula, whose numbers and operators have to be
  the same in the same order. This catches what n-grams can't: rewordings, and questions or prompts of fewer than n
  words.

What it finds at 0.65, the default: of 24 questions reworded by hand 23 (10-grams: none). In 7,474 questions of MATH's
training set 38 like one of MATH-500's, which has no question in common with it (0.5%; most are siblings from one
template, a few the same problem put otherwise), and in GSM8K's 7,473 training questions 3 like one of its test's.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from r1distill.data import words
from r1distill.data.prompts import normalise

STEM_CHARACTERS = 6
WORDY = 6  # content words from which on the words alone tell a question; below, its formula has to be there too
TELLING_FIGURES = 8  # numbers and operators in a row that tell a formula; fewer have to be all that the prompt has
_CELLS = 1 << 24  # looked at together: prompt x term, and candidate x term

# What a question says with these, it says without them too; single letters are variables, and count as little.
_WEIGHTLESS = """
a an the this that these those there here it its he she they them his her their him i we you your our us of in on at to
for from by with as into onto over under about between among than then so if when while where which who whose what why
how whether is are was were be been being am do does did done has have had having can could will would shall should may
might must and or but nor not no each every all any some both either such same also only just more most many much few
other another let given suppose assume consider find determine compute calculate evaluate give express answer solve
write problem question value values following please step steps expression number numbers
frac dfrac tfrac cfrac left right text mathrm mathbf textbf mbox displaystyle begin end array align aligned cases cdot
times ldots dots cdots quad qquad big bigl bigr boxed hspace vspace newline rm bf
b c d e f g h j k l m n o p q r s t u v w x y z
"""
_SPELT = """
zero 0 two 2 three 3 four 4 five 5 six 6 seven 7 eight 8 nine 9 ten 10 eleven 11 twelve 12 thirteen 13 fourteen 14
fifteen 15 sixteen 16 seventeen 17 eighteen 18 nineteen 19 twenty 20 thirty 30 forty 40 fifty 50 sixty 60 seventy 70
eighty 80 ninety 90 hundred 100 thousand 1000 half 2 twice 2 dozen 12
"""
_OPERATORS = {"times": "×", "cdot": "×", "div": "÷", "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "pm": "±"}


class Match(NamedTuple):
    """Why a prompt is rejected: ``text`` is the prompt's passage, folded, that matches the benchmark's question.

    ``score``: for the same question 1; for n-grams the words in a row that are shared; for rewording the share of the
    question's weight that the passage holds.
    """

    method: str
    benchmark: str
    question_id: str
    text: str
    score: float


class Question(NamedTuple):
    """A benchmark's question."""

    benchmark: str
    question_id: str
    text: str


class HeldOut:
    """The questions of all benchmarks, indexed."""

    def __init__(self, questions: Iterable[Question], ngram: int | None, reworded: float | None):
        self.questions = list(questions)
        texts = [question.text for question in self.questions]
        split = words.split(texts)
        self._same = _Table(split.texts)
        self._questions_of: dict[int, list[int]] = defaultdict(list)  # row: the questions that have these words
        for number, row in enumerate(np.searchsorted(self._same.hashes, split.texts).tolist()):
            self._questions_of[row].append(number)
        self._ngrams = _NGrams(split, ngram) if ngram and texts else None
        self._reworded = _Reworded(texts, reworded) if reworded and texts else None

    def matches(self, texts: Sequence[str]) -> list[Match | None]:
        """For each of ``texts`` the first match, or None."""
        split = words.split(texts)
        found: dict[int, tuple[str, int, str, float]] = {}
        for place, row in zip(*self._same.find(split.texts), strict=True):  # the same words: the same question?
            text = normalise(texts[place])
            for number in self._questions_of[row]:
                if text == normalise(self.questions[number].text):
                    found[int(place)] = ("same question", number, text, 1.0)
        if self._ngrams:
            for place, number, passage, length in self._ngrams.hits(split):
                found.setdefault(place, (f"{self._ngrams.size}-gram", number, passage, float(length)))
        if self._reworded:
            for place, number, passage, share in self._reworded.hits(texts):
                found.setdefault(place, ("reworded", number, passage, share))
        return [self._match(*found[place]) if place in found else None for place in range(len(texts))]

    def _match(self, method: str, number: int, text: str, score: float) -> Match:
        return Match(method, self.questions[number].benchmark, self.questions[number].question_id, text, score)


class _Table:
    """A sorted set of hashes; most of those that aren't in it are turned away by a small table of their first bits."""

    def __init__(self, hashes: Any):
        self.hashes, self.first = np.unique(hashes, return_index=True)
        bits = max(10, len(self.hashes).bit_length() + 4)
        self._shift = np.uint64(64 - bits)
        self._some = np.zeros(1 << bits, bool)
        self._some[self.hashes >> self._shift] = True

    def find(self, hashes: Any) -> tuple[Any, Any]:
        """Places in ``hashes`` of those that the table has, and their rows in it."""
        places = np.flatnonzero(self._some[hashes >> self._shift])
        rows = np.searchsorted(self.hashes, hashes[places])
        rows[rows == len(self.hashes)] = 0
        same = self.hashes[rows] == hashes[places] if len(self.hashes) else np.zeros(0, bool)
        return places[same], rows[same]


class _NGrams:
    def __init__(self, split: words.Words, size: int):
        self.size = size
        hashes, first = split.ngrams(size)
        self._table = _Table(hashes)
        self._question = split.owners[first[self._table.first]]

    def hits(self, split: words.Words) -> Iterator[tuple[int, int, str, int]]:
        """(text, question, passage, words in a row) for each text with a hit: the first run of shared n-grams."""
        hashes, first = split.ngrams(self.size)
        places, rows = self._table.find(hashes)
        starts = first[places]
        owners = split.owners[starts]
        text_begins = np.flatnonzero(np.diff(owners, prepend=-1))
        breaks = np.append(np.flatnonzero((np.diff(starts) != 1) | (np.diff(owners) != 0)) + 1, len(starts))
        run_ends = breaks[np.searchsorted(breaks, text_begins, side="right")] - 1
        for begin, end in zip(text_begins.tolist(), run_ends.tolist(), strict=True):
            last = int(starts[end]) + self.size - 1
            passage = split.text(int(starts[begin]), last)
            yield int(owners[begin]), int(self._question[rows[begin]]), passage, last - int(starts[begin]) + 1


@dataclass(frozen=True)
class _Terms:
    """The words of D texts as terms of the vocabulary: stems, and numbers, which are their digits however written."""

    split: words.Words
    hashes: Any  # uint64[W]
    digits: Any  # bool[W]: written in digits


class _Meant(NamedTuple):
    """What a benchmark's question says: its terms' weights, all its numbers, those in digits, how many words it has.

    ``figures``: where it has few content words, its numbers and operators in their order; otherwise None.
    """

    weights: dict[int, float]
    numbers: frozenset[int]
    digits: frozenset[int]
    words: int
    figures: list[str] | None


class _Reworded:
    def __init__(self, questions: list[str], threshold: float):
        self.threshold = threshold
        spelt = words.split([_SPELT], digits_apart=True)
        self._spelt = _Table(spelt.prefixes(STEM_CHARACTERS)[0::2])
        self._spelt_as = spelt.hashes[1::2][self._spelt.first]
        terms = self._terms(questions)
        weightless = words.split([_WEIGHTLESS]).prefixes(STEM_CHARACTERS)
        self._vocabulary = _Table(np.setdiff1d(terms.hashes, weightless))
        rows, edges = self._rows(terms), terms.split.offsets.tolist()
        number = np.isin(self._vocabulary.hashes, np.concatenate([terms.hashes[terms.digits], self._spelt_as]))
        said = [set(rows[begin:end].tolist()) - {-1} for begin, end in pairwise(edges)]
        frequency = Counter(row for each in said for row in each)
        self._meant = []
        for text, each, (begin, end) in zip(questions, said, pairwise(edges), strict=True):
            numbers = frozenset(row for row in each if number[row])
            wordy = len(each) - len(numbers) >= WORDY
            weighed = each - numbers if wordy else each
            weights = {row: math.log1p(len(questions) / frequency[row]) for row in weighed}
            digits = frozenset(rows[begin:end][terms.digits[begin:end]].tolist())
            figures = None if wordy else _figures(text)
            self._meant.append(_Meant(weights, numbers, digits, end - begin, figures))
        self._index()

    def _terms(self, texts: Sequence[str]) -> _Terms:
        split = words.split([_plain(text) for text in texts], digits_apart=True)
        hashes = np.where(split.numeric, split.hashes, split.prefixes(STEM_CHARACTERS))
        places, rows = self._spelt.find(hashes)
        hashes[places] = self._spelt_as[rows]
        return _Terms(split, hashes, split.numeric)

    def _rows(self, terms: _Terms) -> Any:
        """int64[W]: each word's row in the vocabulary, -1 where it isn't there."""
        rows = np.full(len(terms.hashes), -1)
        places, found = self._vocabulary.find(terms.hashes)
        rows[places] = found
        return rows

    def _index(self) -> None:
        """The questions' terms one after the other, and for each term the questions that it is an anchor of.

        A question's anchors are its heaviest terms, so many that without them the threshold is out of reach: a prompt
        that holds none of them needs no further look.
        """
        anchors = []
        for number, meant in enumerate(self._meant):
            spare = (1 - self.threshold) * sum(meant.weights.values()) + 1e-9
            for row, weight in sorted(meant.weights.items(), key=lambda item: (-item[1], item[0])):
                anchors.append((row, number))
                spare -= weight
                if spare < 0:
                    break
        anchors.sort()
        table = np.array(anchors, np.int64).reshape(-1, 2)
        self._anchored = np.ascontiguousarray(table[:, 1])
        self._anchors = np.searchsorted(table[:, 0], np.arange(len(self._vocabulary.hashes) + 1))
        terms = [sorted(meant.weights.keys() | meant.digits) for meant in self._meant]
        self._offsets = np.cumsum([0, *map(len, terms)])
        flat = [
            (row, meant.weights.get(row, 0.0), row in meant.digits)
            for meant, rows in zip(self._meant, terms, strict=True)
            for row in rows
        ]
        self._term = np.array([row for row, _, _ in flat], np.int64)
        self._weight = np.array([weight for _, weight, _ in flat])
        self._needed = np.array([needed for _, _, needed in flat], bool)

    def hits(self, texts: Sequence[str]) -> Iterator[tuple[int, int, str, float]]:
        """(text, question, passage, share) for each text that rewords a question; the question it rewords most."""
        terms = self._terms(texts)
        rows = self._rows(terms)
        best: dict[int, tuple[float, int, int, int]] = {}
        for text, question in self._candidates(terms, rows):
            begin, end = terms.split.offsets[text : text + 2].tolist()
            meant = self._meant[question]
            if meant.figures is not None and not _has(_figures(texts[text]), meant.figures):
                continue
            least = max(self.threshold, best.get(text, (0.0,))[0])
            passage = _passage(meant, rows[begin:end].tolist(), terms.digits[begin:end].tolist(), least)
            if passage:
                best[text] = (passage[0], question, begin + passage[1], begin + passage[2])
        for text, (share, question, first, last) in best.items():
            yield text, question, terms.split.text(first, last), share

    def _candidates(self, terms: _Terms, rows: Any) -> Iterator[tuple[int, int]]:
        """(text, question) where the whole text holds the question's numbers and enough of its weight."""
        vocabulary, questions = len(self._vocabulary.hashes), len(self._meant)
        known = rows >= 0
        owners, rows = terms.split.owners[known], rows[known]
        for begin, end in pairwise(self._slices(owners, rows, len(terms.split.offsets) - 1)):
            some = slice(*np.searchsorted(owners, [begin, end]))
            owner, row = owners[some] - begin, rows[some]
            holds = np.zeros((end - begin, vocabulary), bool)
            holds[owner, row] = True
            posted, reach = _ranges(self._anchors[row], self._anchors[row + 1])
            pairs = np.unique(np.repeat(owner, reach) * questions + self._anchored[posted])
            text, question = np.divmod(pairs, questions)
            places, sizes = _ranges(self._offsets[question], self._offsets[question + 1])
            if not len(places):
                continue
            held = holds[np.repeat(text, sizes), self._term[places]]
            starts = np.cumsum(sizes) - sizes
            share = np.add.reduceat(held * self._weight[places], starts) / np.add.reduceat(self._weight[places], starts)
            lacking = np.logical_or.reduceat(self._needed[places] & ~held, starts)
            near = np.flatnonzero((share >= self.threshold) & ~lacking)
            yield from zip((text[near] + begin).tolist(), question[near].tolist(), strict=True)

    def _slices(self, owners: Any, rows: Any, texts: int) -> list[int]:
        """Where to cut ``texts`` so that what is held for a slice, its table and its candidates, is about _CELLS."""
        proposed = (self._anchors[rows + 1] - self._anchors[rows]) * np.diff(self._offsets).max()
        cells = np.bincount(owners, proposed, minlength=texts) + len(self._vocabulary.hashes)
        cuts = np.flatnonzero(np.diff(np.cumsum(cells) // _CELLS)) + 1
        return [0, *cuts.tolist(), texts]


def _ranges(begin: Any, end: Any) -> tuple[Any, Any]:
    """The numbers of all the ranges, one after the other, and each range's length."""
    sizes = end - begin
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begin - (ends - sizes), sizes), sizes


def _plain(text: str) -> str:
    """Without drawings ([asy] in MATH) and separators between thousands, and LaTeX's operators as characters."""
    if "[asy]" in text:
        text = re.sub(r"\[asy\].*?\[/asy\]", " ", text, flags=re.DOTALL)
    if "\\" in text:
        text = re.sub(r"\\(times|cdot|div|le|leq|ge|geq|pm)(?![a-zA-Z])", lambda name: _OPERATORS[name[1]], text)
    return re.sub(r"(?<=\d)(?:,(?:\\!)?|\{,\})(?=\d{3}(?!\d))", "", text) if "," in text else text


def _figures(text: str) -> list[str]:
    """Its numbers and operators, in order."""
    return words.FIGURE.findall(words.fold(_plain(text)))


def _has(figures: list[str], wanted: list[str]) -> bool:
    """Whether ``figures`` are those ``wanted``, or have them in a row where they are enough to tell questions apart."""
    if len(wanted) < TELLING_FIGURES:
        return figures == wanted
    return any(figures[start : start + len(wanted)] == wanted for start in range(len(figures) - len(wanted) + 1))


def _passage(meant: _Meant, rows: list[int], digits: list[bool], least: float) -> tuple[float, int, int] | None:
    """The passage that holds most of what is meant, ``least`` of its weight and all numbers: (share, first, last word).

    A passage is at most twice as long as the question, and goes over no number that the question lacks. Of equal ones
    it is the first.
    """
    total, longest = sum(meant.weights.values()), 2 * meant.words
    best: tuple[float, int, int] | None = None
    first, held, counts = 0, 0.0, Counter[int]()
    for last, row in enumerate(rows):
        if digits[last] and row not in meant.numbers:
            first, held, counts = last + 1, 0.0, Counter()
            continue
        counts[row] += 1
        held += meant.weights.get(row, 0.0) if counts[row] == 1 else 0.0
        if last - first >= longest:
            gone = rows[first]
            first += 1
            counts[gone] -= 1
            held -= meant.weights.get(gone, 0.0) if counts[gone] == 0 else 0.0
        # Sums and differences of weights err by less than 1e-9: a share of 1 is one.
        if held >= (least - 1e-9) * total and all(counts[number] for number in meant.digits):
            share = min(held / total, 1.0)
            if best is None or share > best[0] + 1e-9:
                best = (share, first, last)
                least = share
    return best
