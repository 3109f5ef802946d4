"""Answers that are words: choices, names, yes and no."""

from __future__ import annotations

import re

_WORDS = re.compile(r"\(?[A-J]\)?(?:, ?\(?[A-J]\)?)*|[^\W\d_]{2,}(?:['’. ,-]+[^\W\d_]+)*")
_LETTER = re.compile(r"\(?([A-J])\)?")
_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s*&\s*)\(?[A-J]\)?)+")
_CHOICE = re.compile(
    r"(?:[Cc]hoice |[Oo]ption )?\(?([A-J])\)?(?:[).:]\s*.*|\s*\(.*\)|\s+(?:[-$]*\d|\\frac|\\sqrt).*)?", re.S
)
_POLAR = {"yes": True, "true": True, "no": False, "false": False}
_SHORT_FORMS = {"dne": "doesnotexist", "emptyset": "nosolution", "nosolutions": "nosolution"}
_FILLERS = {"a", "an", "the", "on", "in", "at", "by", "is"}
_NEGATIONS = {"not", "no", "never", "neither", "nor", "non", "false", "incorrect", "isn", "cannot"}


def is_words(text: str) -> bool:
    """Whether a tidy reference is words or choices; one or two letters may be a variable."""
    return bool(_WORDS.fullmatch(text)) and (len(text) > 2 or bool(_LETTER.fullmatch(text)))


def compared(wanted: str, found: str) -> bool | str:
    """Whether the answer names what the reference names, or why that stays open."""
    if letter := _LETTER.fullmatch(wanted):
        if _LETTERS.fullmatch(found):
            return False
        chosen = _CHOICE.fullmatch(found)
        return chosen[1] == letter[1] if chosen else "the answer names no choice"
    if _LETTERS.fullmatch(wanted) and re.fullmatch(rf"{_LETTERS.pattern}|{_LETTER.pattern}", found):
        return sorted(re.findall(r"[A-J]", wanted)) == sorted(re.findall(r"[A-J]", found))
    ours, theirs = _items(wanted), _items(found)
    if ours == theirs or _joined(wanted) == _joined(found):
        return True
    if sorted(ours) == sorted(theirs):  # a ranking may be meant
        return "the answer has another order" if "," in wanted else True
    said = re.match(r"(yes|no|true|false)\b\s*(?:[,.;:–—-]|$)", found, re.I)
    if (meant := _POLAR.get(wanted.casefold())) is not None and said:
        return meant == _POLAR[said[1].casefold()]
    words, more = ({word for item in items for word in item} for items in (ours, theirs))
    denied = bool(_NEGATIONS & more) and not _NEGATIONS & words and len(more) <= 3  # "not even"
    if words <= more and not denied:
        return "the answer says more than the reference"
    return "the answer says less than the reference" if more < words and len(ours) == 1 and not denied else False


def _joined(text: str) -> str:
    text = re.sub(r"[\W_]", "", text.casefold())
    return _SHORT_FORMS.get(text, text)


def _items(text: str) -> list[tuple[str, ...]]:
    """The words of each item of an enumeration."""
    items = re.split(r"\s*(?:,|;|&|\band\b)\s*", text.casefold())
    words = [tuple(re.findall(r"\w+", item)) for item in items]
    return [tuple(word for word in item if word not in _FILLERS) or item for item in words if item]
