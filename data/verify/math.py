"""Correctness of mathematics: the final answer against the reference.

Numbers are compared exactly, words as words, and everything else by math-verify. math-verify can hang (sympy may try to
expand 9^(9^9)): call ``examine`` where it can be killed.
"""

from __future__ import annotations

import re
from typing import Any

from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.check import Finding, failed, passed, unverifiable
from r1distill.data.verify.quantities import compound, equal, quantity, tidy

VERSION = "math 1, math-verify 0.9"
LONGEST_ANSWER_CHARACTERS = 1000

_WORDS = re.compile(r"\(?[A-J]\)?(?:, ?\(?[A-J]\)?)*|[^\W\d_]{2,}(?:['’. ,-]+[^\W\d_]{2,})*")
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[).:]\s*.*|\s*\(.*\))?", re.S)
_BASED = re.compile(r"([0-9A-F]+)\s*_\s*\{?\s*(\d+)\s*\}?")
_LIST_WORDS = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_TRAILING_UNIT = re.compile(r"(?<=[\d})!a-z])\s*(?:°|(?<=[\s}])(?!in\b)[A-Za-z]{2,}[A-Za-z. /]*(?:\^\{?[23]\}?)?)$")
_STRAY_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_BRACKETS = re.compile(r"^(?:\\\{|[(\[]).*(?:\\\}|[)\]])$", re.S)


def reference_of(text: str) -> str:
    """The answer in a reference: what follows the last ``####`` (GSM8K), or the last box, or the text itself."""
    text = str(text).rpartition("####")[2].strip()
    return (final_answer(text) or text) if "\\boxed" in text else text


def examine(response: str, reference: str, question: str = "") -> Finding:
    """Judge the final answer of ``response`` (what follows the thinking) against ``reference``.

    ``question`` helps to tell the answer from numbers that are repeated. May run for ever or exhaust its memory limit.
    """
    if not response.strip():
        return failed("no response after the thinking")
    wanted = tidy(reference_of(reference))
    if not wanted:
        return unverifiable("no reference answer")
    answer = final_answer(response, question)
    found = tidy(answer or "")
    if not found:
        return unverifiable("no clear final answer in the response")
    detail = f"answer {_short(found)}, reference {_short(wanted)}"
    if max(len(found), len(wanted)) > LONGEST_ANSWER_CHARACTERS:
        return unverifiable("the answer is too long to compare", detail)
    verdict = _without_algebra(wanted, found)
    if verdict is None:
        verdict = _as_formulas(wanted, found)
    if isinstance(verdict, str):
        return unverifiable(verdict, detail)
    return passed(detail) if verdict else failed("wrong answer", detail)


def _without_algebra(wanted: str, found: str) -> bool | str | None:
    """True or False, or why it stays open, or None where the two have to be compared as formulas."""
    if re.sub(r"\s", "", wanted) == re.sub(r"\s", "", found):
        return True
    if (base := _BASED.fullmatch(wanted)) and (other := _BASED.fullmatch(found) or re.fullmatch(r"([0-9A-F]+)", found)):
        return base[1] == other[1] and base[2] == (other[2] if other.re is _BASED else base[2])
    if _WORDS.fullmatch(wanted) and not _is_symbolic(wanted):
        return _same_words(wanted, found)
    reference, answer = quantity(wanted), quantity(found)
    if reference and answer:
        verdict = equal(reference, answer)
        return "the answer differs from the reference in its unit" if verdict is None else verdict
    if reference and (parts := compound(found)):
        return any(equal(reference, part) for part in parts)
    if reference and not re.search(r"[\d\\]", found) and not _is_symbolic(found):
        return False  # words where a number was asked for
    return None


def _is_symbolic(text: str) -> bool:
    """One or two letters may be a variable; a longer word is a word."""
    return len(text) < 3 and not re.fullmatch(r"\(?[A-J]\)?", text)


def _same_words(wanted: str, found: str) -> bool | str | None:
    letter = re.fullmatch(r"\(?([A-J])\)?", wanted)  # several letters are compared as words
    if letter:
        chosen = _CHOICE.fullmatch(found)
        return chosen[1] == letter[1] if chosen else "the answer names no choice"
    ours, theirs = (re.findall(r"\w+", text.casefold()) for text in (wanted, found))
    if ours == theirs:
        return True
    return "the answer says more than the reference" if set(ours) <= set(theirs) else False


def _as_formulas(wanted: str, found: str) -> bool | str:
    """Whether math-verify takes two tidy answers for equal, or why it can't say."""
    from math_verify import verify

    wanted, found = _formula(wanted), _formula(found)
    reference = _parsed(wanted)
    if reference is None:
        return "the reference can't be read as mathematics"
    answers = [answer for part in re.split(r"\\approx|≈", found) if (answer := _parsed(part)) is not None]
    if not answers:
        return "the answer can't be read as mathematics"
    if {_kind(wanted), _kind(found)} == {"set", "tuple"}:
        return False
    return any(verify(reference, answer, timeout_seconds=None) and _close(reference, answer) for answer in answers)


def _formula(text: str) -> str:
    """The text without what math-verify would drop or misread: units behind it, words for commas, "x in"."""
    text = _LIST_WORDS.sub(", ", text)
    text = re.sub(r"^[A-Za-z](?:_\w)?\s*(?:\\in(?![a-z])|∈)\s*", "", text)
    text = _TRAILING_UNIT.sub("", text)
    return text.replace("°", "").strip()


def _parsed(text: str) -> Any | None:
    """The formula as math-verify reads it; None with words in it, which it would multiply letter by letter or skip."""
    from math_verify import LatexExtractionConfig, parse

    if _STRAY_WORDS.search(re.sub(r"\\(?:begin|end)\s*\{[a-z]*\}", "", text)):
        return None
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _kind(text: str) -> str:
    """How a collection is written: math-verify takes the point (1, 2) for the set {1, 2}."""
    if not _BRACKETS.match(text) or "," not in text:
        return "list" if "," in text else "one"
    return "set" if text.startswith("\\{") else "tuple"


def _close(reference: Any, answer: Any) -> bool:
    """math-verify rounds differences to some decimals, which makes all small numbers equal: hold numbers to relative
    errors, entry by entry in matrices."""
    from sympy import Expr, Float, MatrixBase

    if isinstance(reference, MatrixBase) and isinstance(answer, MatrixBase):
        return reference.shape == answer.shape and all(map(_close, reference.flat(), answer.flat()))
    if not (isinstance(reference, Expr) and isinstance(answer, Expr)) or reference.free_symbols | answer.free_symbols:
        return True
    tolerance = 1e-6 if reference.has(Float) or answer.has(Float) else 1e-12
    a, b = (side.doit().evalf(20) for side in (reference, answer))
    return bool(a == b) or any(bool(abs(a - other) <= tolerance * abs(a)) for other in (b, b * 100, b / 100))


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
