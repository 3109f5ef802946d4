"""Answers of several parts: lists, sets, tuples, matrices, unions, named and labelled values, ranges of a variable."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from r1distill.data.verify.quantities import quantity

_LIST_WORDS = re.compile(
    r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*|\s*;\s*|\s*\\(?:lor|vee|land|wedge)(?![a-z])\s*"
    r"|\s*[或和及与]\s*"
)
_OPENING, _CLOSING = ("\\{", "(", "[", "{", "\\langle", "\\begin"), ("\\}", ")", "]", "}", "\\rangle", "\\end")
_TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|[()\[\]{},]", re.S)
_THOUSANDS = re.compile(r"(?<=\d),\d{3}(?!\d)")
_MATRIX = re.compile(
    r"(?:\(|\[)?\s*\\begin\s*\{ ?([pbvBV]?matrix|array) ?\}\s*(?:\{[lcr| ]*\})?(.*?)\\end\s*\{ ?\1 ?\}\s*(?:\)|\])?",
    re.S,
)
_NAME = r"\\?[A-Za-z][A-Za-z ]*(?:_\s*\{?\s*\w+\s*\}?)?'?"
_NAMED = re.compile(rf"\s*({_NAME})\s*=\s*([^=<>]+)")
_LABEL = re.compile(r"(?:^|(?<=[\s,;]))\(?([a-h]|i{1,3}|iv|v)\)\s*[:.]?\s*")
_LABELS = (["a", "b", "c", "d", "e", "f", "g", "h"], ["i", "ii", "iii", "iv", "v"])
_ROWS = re.compile(r"\\begin\s*\{ ?(cases|aligned|align\*?|gathered) ?\}(.*?)\\end\s*\{ ?\1 ?\}", re.S)
_SYSTEM = re.compile(r"\\\{\s*\\begin\s*\{ ?array ?\}\s*\{[lcr ]*\}(.*?)\\end\s*\{ ?array ?\}(?!\s*\\\})", re.S)
_PLUS_MINUS = "\\pm"
_RELATION = r"(<|>|\\leq?(?![a-z])|\\geq?(?![a-z])|\\leqslant|\\geqslant|≤|≥|\\lt(?![a-z])|\\gt(?![a-z]))"
_BOUND = r"([^<>=≤≥,]*?)"
_VARIABLE = r"([A-Za-z])"
_ONE_SIDED = re.compile(rf"\s*{_VARIABLE}\s*{_RELATION}\s*{_BOUND}\s*")
_TURNED = re.compile(rf"\s*{_BOUND}\s*{_RELATION}\s*{_VARIABLE}\s*")
_TWO_SIDED = re.compile(rf"\s*{_BOUND}\s*{_RELATION}\s*{_VARIABLE}\s*{_RELATION}\s*{_BOUND}\s*")
_EXCEPT = re.compile(rf"\s*{_VARIABLE}\s*(?:\\neq?(?![a-z])|≠)\s*{_BOUND}\s*")
_BUILDER = re.compile(
    r"\\\{\s*[a-z]\s*(?:(?:\\in(?![a-z])|∈)\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid(?![a-z])|\||:)(.*)\\\}", re.S
)


class Collection(NamedTuple):
    """``kind`` is set, tuple, list or matrix (rows of equal length); ``ends`` are a tuple's brackets."""

    kind: str
    items: list[str]
    ends: str = ""


def split(text: str, bracketed: bool = False) -> list[str]:
    """The items between commas that stand in no bracket.

    A comma as in "1,234" is none, but between brackets ("(1,200)") where no other comma has a space behind it.
    """
    commas, depth = [], 0
    for match in _TOKEN.finditer(text):
        depth += (match.group() in _OPENING) - (match.group() in _CLOSING)
        if match.group() == "," and depth == 0:
            commas.append(match.start())
    if not bracketed or any(text[place + 1 : place + 2] == " " for place in commas):
        commas = [place for place in commas if not _THOUSANDS.match(text, place)]
    ends = [-1, *commas, len(text)]
    return [text[start + 1 : end].strip() for start, end in pairwise(ends)]


def spelled(text: str) -> str:
    """One way to write brackets, the empty set, enumerations and signs that stand for two values."""
    text = text.replace("\\lbrace", "\\{").replace("\\rbrace", "\\}").replace("∪", "\\cup ").replace("∞", "\\infty ")
    text = re.sub(r"\\langle(?![a-z])|⟨", "(", re.sub(r"\\rangle(?![a-z])|⟩", ")", text))
    text = re.sub(r"\\varnothing(?![a-z])|∅|\\\{\s*\\\}", r"\\emptyset", text)
    text = _SYSTEM.sub(r"\\begin{cases}\1\\end{cases}", text)
    text = f"\\{{{text[1:-1]}\\}}" if re.fullmatch(r"\{.*,.*\}", text) and _closed(text) else text
    text = _ROWS.sub(lambda rows: re.sub(r"\s*\\\\\s*", ", ", rows[2].replace("&", "")).strip(" ,"), text)
    text = re.sub(r"^(?:all |the )*real numbers$", r"\\mathbb{R}", text)
    text = re.sub(r"^(?:all |the )*real numbers(?: x)? (?:except|other than)(?: for)?(?: x =)? ", r"x \\neq ", text)
    text = _LIST_WORDS.sub(", ", text)
    text = re.sub(rf"^{_VARIABLE}(?:_\w)?\s*(?:\\in(?![a-z])|∈)\s*(?=[(\[\\])", "", text)
    text = text.replace("±", "\\pm ")
    if text.count("\\pm") == 1 and text.startswith("(") and _closed(text) and "\\mp" not in text:
        text = f"{text.replace(_PLUS_MINUS, '')}, {text.replace(_PLUS_MINUS, '-')}"
    if "\\pm" in text and not text.startswith(("(", "[")):
        inner = text[2:-2] if (braced := text.startswith("\\{") and text.endswith("\\}")) else text
        inner = ", ".join(map(_both_signs, split(inner)))
        text = f"\\{{{inner}\\}}" if braced else inner
    return text.strip()


def _both_signs(item: str) -> str:
    if "\\pm" not in item:
        return item
    item = re.sub(rf"^{_VARIABLE}\s*=\s*", "", item)
    upper = re.sub(r"^\s*\+\s*", "", item.replace("\\pm", "+").replace("\\mp", "-"))
    return f"{upper}, {item.replace(chr(92) + 'pm', '-').replace(chr(92) + 'mp', '+')}"


def collection(text: str) -> Collection | None:
    """What a ``spelled`` answer collects; None where it is one thing."""
    if matrix := _MATRIX.fullmatch(text.strip()):
        rows = [row.split("&") for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        if rows and len({len(row) for row in rows}) == 1:
            return Collection("matrix", [cell.strip() for row in rows for cell in row], f"{len(rows)}x{len(rows[0])}")
        return None
    if text.startswith("\\{") and text.endswith("\\}") and _closed(text):
        return Collection("set", split(text[2:-2], bracketed=True))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closed(text):
        items = split(text[1:-1], bracketed=True)
        return Collection("tuple", items, text[0] + text[-1]) if len(items) > 1 else None
    items = split(text)
    return Collection("list", items) if len(items) > 1 else None


def _closed(text: str) -> bool:
    """Whether the first bracket is closed by the last one."""
    depth = 0
    for match in _TOKEN.finditer(text):
        depth += (match.group() in _OPENING) - (match.group() in _CLOSING)
        if depth == 0:
            return match.end() == len(text)
    return False


def solutions(text: str) -> str:
    """ "x_1 = 2, x_2 = 5" and "x = 2, x = 5" as the values "2, 5"; any other text as it is."""
    found = [_NAMED.fullmatch(item) for item in split(text)]
    pairs = [match.groups() for match in found if match]
    bases = {name.partition("_")[0].strip() for name, _ in pairs}
    if len(pairs) < 2 or len(pairs) < len(found) or len(bases) > 1 or "(" in text:
        return text
    names = {name.replace("{", "").replace("}", "").replace(" ", "") for name, _ in pairs}
    return ", ".join(value.strip() for _, value in pairs) if len(names) in (1, len(pairs)) else text


def named(text: str) -> dict[str, str] | None:
    """ "a = 2, b = -3" and "(a, b) = (2, -3)" as {"a": "2", "b": "-3"}; x_1 and x_2 are two solutions."""
    left, equals, right = text.partition("=")
    names, values = collection(left.strip()), collection(right.strip())
    if equals and names and values and names.kind == values.kind == "tuple" and len(names.items) == len(values.items):
        return dict(zip(names.items, values.items, strict=True))
    *chain, last = re.split(r"\s*=\s*", text)
    if len(chain) > 1 and all(re.fullmatch(rf"\s*{_NAME}", name) for name in chain) and not collection(last):
        return {name.strip(): last for name in chain}  # a = b = c = 1
    found = [_NAMED.fullmatch(item) for item in split(text)]
    pairs = {match[1].strip().lstrip("\\"): match[2].strip() for match in found if match}
    if len(pairs) != len(found) or len(pairs) < 2 or len({name.partition("_")[0].strip() for name in pairs}) == 1:
        return None
    return pairs


def labelled(text: str) -> list[str] | None:
    """The parts of "(a) 3, (b) 5" in their order."""
    labels = list(_LABEL.finditer(text))
    names = [label[1] for label in labels]
    if len(labels) < 2 or labels[0].start() or all(names != known[: len(names)] for known in _LABELS):
        return None
    ends = [*(m.start() for m in labels[1:]), len(text)]
    return [text[m.end() : end].strip(" ,;.") for m, end in zip(labels, ends, strict=True)]


def ranges(text: str) -> tuple[str, str] | None:
    """(variable, intervals) of inequalities in one variable: "x \\le 2, x > 5" is (-\\infty, 2] \\cup (5, \\infty)."""
    if builder := _BUILDER.fullmatch(text):
        text = builder[1]
    texts = re.split(r",|\\cup(?![a-z])", text)
    found = [_range(piece) for piece in texts]
    pieces = [piece for piece in found if piece]
    if len(pieces) < len(found) or len({variable for variable, _ in pieces}) > 1:
        return None
    points = [point[2] for piece in texts if (point := _EXCEPT.fullmatch(piece))]
    if 0 < len(points) < len(pieces) == 2:
        [(variable, interval)] = [piece for piece, one in zip(pieces, texts, strict=True) if not _EXCEPT.fullmatch(one)]
        return variable, _without(interval, points[0])
    return pieces[0][0], _both([interval for _, interval in pieces])


def _without(interval: str, point: str) -> str:
    """An interval without a point that is taken out of it: "x > 0, x \\neq 1" is (0, 1) \\cup (1, \\infty)."""
    return f"{interval.partition(',')[0]}, {point}) \\cup ({point},{interval.partition(',')[2]}"


def _both(intervals: list[str]) -> str:
    """The union; but of two half-lines that meet, what they share: "x > 3, x < 5" is meant as (3, 5)."""
    above = [one for one in intervals if one.endswith("\\infty)")]
    below = [one for one in intervals if one.startswith("(-\\infty")]
    if len(intervals) == 2 and len(above) == len(below) == 1:
        low, high = quantity(above[0][1:-8].strip(" ,")), quantity(below[0][9:-1].strip(" ,"))
        if low and high and low.value < high.value:
            return f"{above[0].partition(',')[0]}, {below[0].partition(',')[2].strip()}"
    return " \\cup ".join(intervals)


def _range(text: str) -> tuple[str, str] | None:
    def ascending(relation: str) -> bool:
        return relation[:2] in ("<", "\\l", "≤")

    def is_open(relation: str) -> bool:
        return relation in ("<", ">", "\\lt", "\\gt")

    if match := _TWO_SIDED.fullmatch(text):
        low, first, variable, second, high = match.groups()
        if ascending(first) != ascending(second):
            return None
        if not ascending(first):
            low, first, second, high = high, second, first, low
        return variable, f"{'(' if is_open(first) else '['}{low}, {high}{')' if is_open(second) else ']'}"
    if match := _EXCEPT.fullmatch(text):
        return match[1], f"(-\\infty, {match[2]}) \\cup ({match[2]}, \\infty)"
    if match := _ONE_SIDED.fullmatch(text):
        variable, relation, bound = match.groups()
        below = ascending(relation)
    elif match := _TURNED.fullmatch(text):
        bound, relation, variable = match.groups()
        below = not ascending(relation)
    else:
        return None
    if below:
        return variable, f"(-\\infty, {bound}{')' if is_open(relation) else ']'}"
    return variable, f"{'(' if is_open(relation) else '['}{bound}, \\infty)"
