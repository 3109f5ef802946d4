"""Answers that are words: choices, names, yes and no."""

from __future__ import annotations

import re

_WORDS = re.compile(r"\(?[A-J]\)?(?:, ?\(?[A-J]\)?)*|[^\W\d_]{2,}(?:['’. ,-]+[^\W\d_]+)*")
_LETTER = re.compile(r"\(?([A-J])\)?")
_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s*&\s*)\(?[A-J]\)?)+")
_CHOICE = re.compile(
    r"(?:[Cc]hoice |[Oo]ption )?\(?([A-J])\)?(?:[).:]\s*.*|\s*\(.*\)|\s+(?:[-$]*\d|\\frac|\\sqrt).*)?", re.S
)
_ARTICLE = re.compile(r"^(?:an?|the) (?=[a-z]{3})", re.I)
_SAID = re.compile(r"(yes|no|true|false)\b\s*(?:[,.;:–—-]|$)", re.I)
_POLAR = {"yes": True, "true": True, "no": False, "false": False}
_SHORT_FORMS = {"dne": "doesnotexist", "emptyset": "nosolution", "nosolutions": "nosolution",
                "infinite": "infinitelymany", "infinitelymanysolutions": "infinitelymany"}  # fmt: skip
_FILLERS = {"a", "an", "the", "on", "in", "at", "by", "is"}
# Nouns that name again what was asked for: an "obtuse" triangle, a series that "converges".
_GENERAL = {"triangle", "angle", "series", "sequence", "integral", "function", "number", "numbers", "solution",
            "solutions"}  # fmt: skip
_NOTHING = re.compile(
    r"(?:there (?:is|are) )?no (?P<kind>(?:such|real|integer|positive|rational|valid|possible)(?: such| \w+)?)? ?"
    r"(?:solution|root|value|number|integer|pair|triple|function)s?(?: exists?)?|none(?: exists?)?"
    r"|(?:the )?empty set|\\(?:emptyset|varnothing)(?![a-z])|∅|\\\{ ?\\\}",
    re.I,
)
_NEGATIONS = {"not", "no", "never", "neither", "nor", "non", "false", "incorrect", "isn", "cannot"}


def is_words(text: str) -> bool:
    """Whether a tidy reference is words or choices; one or two letters may be a variable."""
    text = _ARTICLE.sub("", text)
    if not _WORDS.fullmatch(text):
        return False
    return len(text) > 2 or text.casefold() in _POLAR or bool(_LETTER.fullmatch(text))


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
    if len(ours) == len(theirs) == 1 and len(ours[0]) > 2 and sorted(ours[0]) == sorted(theirs[0]):
        return ours[0][-1] == theirs[0][-1] or "the answer has another order"  # an isosceles right triangle
    if sorted(ours) == sorted(theirs):  # a ranking may be meant
        return "the answer has another order" if "," in wanted else True
    meant, said = _SAID.match(wanted), _SAID.match(found)
    if meant and said:
        return _POLAR[meant[1].casefold()] == _POLAR[said[1].casefold()]
    words, more = ({word for item in items for word in item} for items in (ours, theirs))
    denied = bool(_NEGATIONS & more) and not _NEGATIONS & words and len(more) <= 3  # "not even"
    if words <= more and not denied and more - words <= _GENERAL:
        return True
    if words <= more and not denied:
        return "the answer says more than the reference"
    return "the answer says less than the reference" if more < words and len(ours) == 1 and not denied else False


def nothing(wanted: str, found: str) -> bool | str | None:
    """Whether two tidy answers both say that there is none ("no solutions", \\emptyset), or why that stays open."""
    ours, theirs = _NOTHING.fullmatch(wanted), _NOTHING.fullmatch(found)
    if not (ours and theirs):
        return None
    kinds = {kind.lower() for match in (ours, theirs) if (kind := (match["kind"] or "").strip())}
    return True if len(kinds) < 2 else "the answers exclude different things"


def _joined(text: str) -> str:
    text = re.sub(r"[\W_]", "", text.casefold())
    return _SHORT_FORMS.get(text, text)


def _items(text: str) -> list[tuple[str, ...]]:
    """The words of each item of an enumeration."""
    items = re.split(r"\s*(?:,|;|&|\band\b)\s*", text.casefold())
    words = [tuple(re.findall(r"\w+", item)) for item in items]
    return [tuple(word for word in item if word not in _FILLERS) or item for item in words if item]
