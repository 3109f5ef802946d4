"""Correctness of mathematics: the final answer against the reference.

Numbers are compared exactly, words as words, and everything else by math-verify. math-verify can hang (sympy may try to
expand 9^(9^9)), so ``settle`` tells first what needs it; the caller runs ``compare_formulas`` where it can be killed.
"""

from __future__ import annotations

import re

from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.check import Finding, failed, passed, unverifiable
from r1distill.data.verify.quantities import equal, quantity, tidy

VERSION = "math 1, math-verify 0.9"
LONGEST_ANSWER_CHARACTERS = 1000

_WORDS = re.compile(r"\(?[^\W\d_]\)?|[^\W\d_][^\W\d_' .,-]*(?:[ '.,-]+[^\W\d_]+)*")
_CHOICE = re.compile(r"\(?([A-J])\)?(?:[).:]\s*.*|\s*\(.*\))?", re.S)
_BASED = re.compile(r"([0-9A-F]+)_\{?\s*(\d+)\s*\}?")
_LIST_WORDS = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")
_TRAILING_UNIT = re.compile(r"(?<=[\d})!a-z])\s*(?:°|(?<=[\s}])(?!in\b)[A-Za-z]{2,}[A-Za-z. /]*(?:\^\{?[23]\}?)?)$")
_STRAY_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_BRACKETS = re.compile(r"^(?:\\\{|[(\[]).*(?:\\\}|[)\]])$", re.S)


def reference_of(text: str) -> str:
    """The answer in a source's reference: what follows the last ``####`` (GSM8K), or the last box, or the text itself."""
    text = str(text).rpartition("####")[2].strip()
    return (final_answer(text) or text) if "\\boxed" in text else text


def settle(response: str, reference: str, question: str = "") -> Finding | tuple[str, str]:
    """Judge what needs no computer algebra; else return the pair (reference, answer) for ``compare_formulas``."""
    if not response.strip():
        return failed("no response after the thinking")
    wanted = tidy(reference_of(reference))
    if not wanted:
        return unverifiable("no reference answer")
    answer = final_answer(response, question)
    if answer is None:
        return unverifiable("no clear final answer in the response")
    found = tidy(answer)
    detail = f"answer {_short(answer)}, reference {_short(wanted)}"
    if max(len(found), len(wanted)) > LONGEST_ANSWER_CHARACTERS:
        return unverifiable("the answer is too long to compare", detail)
    verdict = _without_algebra(wanted, found)
    if verdict is None:
        return wanted, found
    return _finding(verdict, detail)


def _finding(verdict: bool | str, detail: str) -> Finding:
    if isinstance(verdict, str):
        return unverifiable(verdict, detail)
    return passed(detail) if verdict else failed("wrong answer", detail)


def _without_algebra(wanted: str, found: str) -> bool | str | None:
    """True or False, or why it stays open, or None where the two have to be compared as formulas."""
    if not found:
        return "no clear final answer in the response"
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
    if reference and not re.search(r"[\d\\]", found) and not _is_symbolic(found):
        return False  # words where a number was asked for
    return None


def _is_symbolic(text: str) -> bool:
    """One or two letters may be a variable; a longer word is a word."""
    return len(text) < 3 and not re.fullmatch(r"\(?[A-J]\)?", text)


def _same_words(wanted: str, found: str) -> bool | str | None:
    letter = re.fullmatch(r"\(?([A-J])\)?", wanted)
    if letter:
        chosen = _CHOICE.fullmatch(found)
        return chosen[1] == letter[1] if chosen else "the answer names no choice"
    ours, theirs = (re.findall(r"\w+", text.casefold()) for text in (wanted, found))
    if ours == theirs:
        return True
    return "the answer says more than the reference" if set(ours) <= set(theirs) else False


def compare_formulas(wanted: str, found: str) -> tuple[str, str]:
    """(outcome, reason) of two tidy answers under math-verify; may run for ever or exhaust its memory limit."""
    from math_verify import verify

    wanted, found = _formula(wanted), _formula(found)
    if not _comparable(wanted):
        return "unverifiable", "the reference can't be read as mathematics"
    if not _comparable(found):
        return "unverifiable", "the answer can't be read as mathematics"
    reference, answers = _parsed(wanted), [_parsed(part) for part in re.split(r"\\approx|≈", found)]
    if reference is None:
        return "unverifiable", "the reference can't be read as mathematics"
    if all(answer is None for answer in answers):
        return "unverifiable", "the answer can't be read as mathematics"
    if _kind(wanted) == "set" != _kind(found) == "tuple" or _kind(wanted) == "tuple" and _kind(found) == "set":
        return "fail", "wrong answer"
    right = any(
        answer is not None and verify(reference, answer, timeout_seconds=None) and _close(reference, answer)
        for answer in answers
    )
    return ("pass", "") if right else ("fail", "wrong answer")


def _formula(text: str) -> str:
    """The text without what math-verify would drop or misread: units behind it, words for commas, "x in"."""
    text = _LIST_WORDS.sub(", ", text)
    text = re.sub(r"^[A-Za-z](?:_\w)?\s*(?:\\in(?![a-z])|∈)\s*", "", text)
    text = _TRAILING_UNIT.sub("", text)
    return text.replace("°", "").strip()


def _comparable(text: str) -> bool:
    """Whether no words are left that math-verify would multiply letter by letter or skip."""
    return bool(text) and not _STRAY_WORDS.search(re.sub(r"\\(?:begin|end)\s*\{[a-z]*\}", "", text))


def _parsed(text: str) -> object | None:
    from math_verify import LatexExtractionConfig, parse

    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _kind(text: str) -> str:
    """How a collection is written: math-verify takes the point (1, 2) for the set {1, 2}."""
    if not _BRACKETS.match(text) or "," not in text:
        return "list" if "," in text else "one"
    return "set" if text.startswith("\\{") else "tuple"


def _close(reference: object, answer: object) -> bool:
    """math-verify rounds to six decimals, which makes all small numbers equal: hold them to six significant digits."""
    from sympy import Expr, Float

    if not (isinstance(reference, Expr) and isinstance(answer, Expr)):
        return True
    if not (reference.has(Float) or answer.has(Float)) or reference.free_symbols or answer.free_symbols:
        return True
    a, b = complex(reference.doit().evalf()), complex(answer.doit().evalf())
    percents = (b, b * 100, b / 100)
    return any(abs(a - other) <= 1e-6 * abs(a) for other in percents)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
