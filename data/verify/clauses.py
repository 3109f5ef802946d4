"""What an answer adds about its letters: "k \\in \\mathbb{Z}", "for all real x", "where c is a constant"."""

from __future__ import annotations

import re

_DOMAIN = (
    r"(?:\\(?:mathbb|mathbf|Bbb)\s*\{?\s*[ZNRQC]\s*\}?|[ZNRQCℤℕℝℚℂ])"
    r"(?:\s*[\^_]\s*(?:\{\s*[*+]\s*\}|[*+])|[*+])?(?![\w(\[])"
)
_IN = rf"\s*(?:\\in(?![a-z])|∈)\s*{_DOMAIN}"
# With one of these a clause chooses between values: it is left where it is.
_PLAIN = r"(?:(?!\b(?:for|and|or|if|except|unless|but|odd|even|prime|otherwise|when|where)\b)[^=;])*"
_ANY = r"\b(?:integers?|reals?|constants?|arbitrary|any|natural|parameters?)\b"
_CLAUSE = re.compile(
    rf"[\s,;:]*\(?\s*(?:(?<![\w\\}}])[A-Za-z]{_IN}"
    rf"|(?:for|where|with|\\forall|∀)\s*(?:(?:all|any|every|each|some)\s+)?[A-Za-z](?:\s*,\s*[A-Za-z])*{_IN}"
    rf"|for\s+(?:all|any|every|each|some)\b(?!\s*\d){_PLAIN}"
    rf"|(?:for|where|with\s+[A-Za-z])\b(?=[^=<>\d]*{_ANY}){_PLAIN})\s*\)?$"
)
_BOUNDED = re.compile(
    r"(?:[\s,;]*\b(?:for|where|with)\s+(?:all\s+)?|\s*[,;]\s*)([A-Za-z]\s*(?:[<>≤≥]|\\(?:[gl]e?q?(?:slant)?|neq?)(?![a-z]))[^,;=]*)$"
)
_LETTER = re.compile(r"(?<![A-Za-z\\])([A-Za-z])\s*(?:(?:\\in(?![a-z])|∈)|is\b)|integers?\s+([A-Za-z])(?![A-Za-z])")
_SET = re.compile(r"(?:\\in(?![a-z])|∈)\s*(?:\\[A-Za-z]+\s*\{?\s*)?([ZNRQCℤℕℝℚℂ])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_NAMED_SETS = str.maketrans("ℤℕℝℚℂ", "ZNRQC")


def apart(text: str) -> tuple[str, str]:
    """(the answer, what it says about its letters behind it, or "")."""
    match = _CLAUSE.search(text)
    if match is None or not text[: match.start()].strip() or _is_bracketed(text, match):
        return text, ""
    return text[: match.start()].strip(" ,;:"), match.group()


def _is_bracketed(text: str, match: re.Match[str]) -> bool:
    """Whether the clause stands in a bracket that was opened before it: the set {x : x in R} is no clause."""
    return any(text.count(a, 0, match.start()) > text.count(b, 0, match.start()) for a, b in ("()", "{}"))


def bounded(text: str) -> tuple[str, str] | None:
    """(the answer, the inequality behind it as it is compared), as in "2^k, k \\ge 1"."""
    match = _BOUNDED.search(text)
    if match is None or not text[: match.start()].strip():
        return None
    bound = re.sub(r"(\\[gln]e)q?(?:slant)?(?![a-z])", r"\1", match[1].replace("≥", "\\ge").replace("≤", "\\le"))
    return text[: match.start()], re.sub(r"\s", "", bound)


def contrary(wanted: str, found: str) -> bool:
    """Whether two clauses name different sets of numbers."""
    ours, theirs = ({one.translate(_NAMED_SETS) for one in _SET.findall(clause)} for clause in (wanted, found))
    return bool(ours and theirs and ours != theirs)


def renamed(wanted: str, found: str, clause: str) -> str:
    """``found`` with the letter that its clause speaks of renamed to the only one that stands in ``wanted`` alone: a
    constant c may be called k, and both k and n run through the integers."""
    said = _LETTER.search(clause)
    old = (said[1] or said[2]) if said else ""
    letters, others = (set(re.findall(r"[A-Za-z]", _COMMAND.sub(" ", side))) for side in (wanted, found))
    if len(letters - others) != 1 or others - letters != {old}:
        return found
    [letter] = letters - others
    return re.sub(rf"\\[A-Za-z]+|{old}", lambda one: letter if one[0] == old else one[0], found)
