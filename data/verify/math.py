"""Correctness of mathematics: the final answer against the reference.

Numbers are compared exactly, words as words, several parts part by part, and formulas by math-verify. math-verify can
hang: call ``examine`` where it can be killed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction

from r1distill.data.thinking import CLOSE, OPEN
from r1distill.data.verify import clauses, formulas, moments, parts, words
from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.check import Finding, failed, passed, unverifiable
from r1distill.data.verify.quantities import Quantity, compound, equal, quantity, tidy, written

VERSION = "math 4, math-verify 0.9"
LONGEST_ANSWER_CHARACTERS = 1000

_BASED = re.compile(r"\(?\s*(?P<digits>-?[0-9A-F]+)\s*\)?\s*_\s*\{?\s*(?P<base>\d+|[a-z]+)\s*\}?")
_BASE_TEN = re.compile(r"(?<=\d)_\s*\{?\s*(?:10|ten)\s*\}?$")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
          "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16"}  # fmt: skip
_SAYING = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is)?\s*[:=]?\s*|^(?:only|just)\s+|\s+only$", re.I)
# What may stand before an equals sign as the name of a value: x, S_{10}, f(x), P(A), |z|, AB, \angle ABC, Total cost.
_LABEL = re.compile(
    r"^(?:\\?(?:angle|triangle|overline|m)\s*\\?(?:angle)?\s*\{?\s*[A-Z]{1,3}\s*\}?|\|\s*[A-Za-z]+\s*\||[A-Z]{2,3}"
    r"|[A-Za-z](?:_\s*\{?\s*\w+\s*\}?)?'?\s*(?:\([^()=]*\))?|\[[A-Z]{3,8}\]|[A-Z](?:\s*\\(?:cap|cup|setminus)\s*\(?[A-Z]\)?)*|[A-Z]_\s*\{[^{}=]*\}"
    r"|\\?[A-Za-z]{3,}(?: [A-Za-z]+){0,4})\s*=\s*(?=[^=<>]+$)"
)
_FUNCTION = re.compile(r"^(?:[fgh]\(x\)|y)\s*=\s*(?=[^=<>y]*x[^=<>y]*$)")  # two ways to name a function of x
_TURNED = re.compile(r"^([^=<>]*\d[^=<>]*?)\s*=\s*[A-Za-z]$")  # 5 = x
_OPTION = re.compile(r"(?:\([A-J]\)|[A-J][).:])\s*(?=\S)")  # (B) 42
# 2x = 10 and x^2 = 4 do not say what x is.
_CALCULATION = re.compile(
    r"^(?=[^=]*\d)(?:[-+*/^!()\d.,{}× ]|\\(?:frac|sqrt|cdot|times|binom|div)(?![a-z]))+=\s*(?=[^=<>]+$)"
)
_UNSOLVED = re.compile(r"(?:-?\d+\s*[a-z]|[a-z]\s*(?=\^))\s*(?:\^\s*(?:\{[^{}]*\}|\w))?\s*=[^=]*")
_REMARK = re.compile(r"(?<=[\d}%°])\s*\((?!(?:mod|not|per|or|if)\b)[a-z]{3}[a-z -]*\)$", re.I)  # 42 (forty-two)
_SUBSTANCE = re.compile(r"(?:[A-Z][a-z]?\s*(?:_\s*)?(?:\{\s*\d+\s*\}|\d*)\s*){2,}")  # H_2O
_REALS = re.compile(
    r"(?:all |the |set of |any )*real(?: number|s)s?"
    r"|(?:[a-z] *(?:\\in|∈) *)?(?:\\mathbb ?\{? ?R ?\}?|ℝ|\( ?-\\infty ?, ?\+?\\infty ?\))"
)
_ROUNDED = re.compile(r"(?:,?\s*\bor\b\s*)?(?:\\approx(?![a-z])|≈|\b(?:which is )?(?:approximately|about)\b)")
_RELATION = re.compile(r"[=<>≤≥]|\\(?:le|ge|lt|gt|ne)")
_COMMA_DECIMAL = re.compile(r"-?\d{1,3}(?:[.,]\d{3})+|-?\d+[.,]\d+")


def reference_of(text: str) -> str:
    """The answer in a reference: what follows the last ``####`` (GSM8K), or the last box, or the text itself."""
    text = str(text).rpartition("####")[2].strip()
    return (final_answer(text) or text) if "\\boxed" in text else text


def examine(response: str, reference: str, question: str = "") -> Finding:
    """Judge the final answer of ``response`` (what follows the thinking) against ``reference``.

    ``question`` helps to tell the answer from numbers that are repeated. May run for ever or exhaust its memory limit.
    """
    response = _after_thinking(response)
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
    verdict = _stated(wanted, _SAYING.sub("", found) or found)
    if isinstance(verdict, str):
        return unverifiable(verdict, detail)
    return passed(detail) if verdict else failed("wrong answer", detail)


def answer_of(response: str, question: str = "") -> str | None:
    """The final answer of a response, tidied: what ``compared`` compares; None where it states none clearly."""
    answer = tidy(final_answer(_after_thinking(response), question) or "")
    return _SAYING.sub("", answer) or answer or None


def _stated(wanted: str, found: str) -> bool | str:
    """The answer as it is written, without its option's letter or what it adds about its letters, or as the exact and
    the rounded value that it gives ("2/3, or about 0.667")."""
    verdict = compared(wanted, found)
    if verdict is True:
        return True
    asked, option = _OPTION.match(wanted), _OPTION.match(found)
    if asked and words.is_words(found):
        return words.compared(re.sub(r"\W", "", asked[0]), found)
    if (asked or option) and not words.is_words(wanted):
        if asked and option and asked[0] != option[0]:
            return verdict
        bare = [text[match.end() :] if match else text for text, match in ((wanted, asked), (found, option))]
        return compared(*bare) is True or verdict
    (ours, clause), (theirs, other) = clauses.apart(wanted), clauses.apart(_REMARK.sub("", found))
    if (ours, theirs) != (wanted, found):
        if clauses.contrary(clause, other):
            return "the answer's letters are of other numbers"
        return compared(ours, clauses.renamed(ours, theirs, other)) is True or verdict
    asked_bound, bound = clauses.bounded(wanted), clauses.bounded(found)
    if asked_bound and bound and asked_bound[1] == bound[1]:
        return compared(asked_bound[0], bound[0]) is True or verdict
    values = [value.strip(" ,()") for value in _ROUNDED.split(found)]
    if len(values) < 2:
        return verdict
    return any(compared(wanted, value) is True for value in values if value) or verdict


def _after_thinking(response: str) -> str:
    """Without thinking that was left in the response, or begun again in it."""
    _, closed, after = response.rpartition(CLOSE)
    return after if closed else response.partition(OPEN)[0]


def compared(wanted: str, found: str) -> bool | str:
    """Whether two tidy answers are equal, or why that stays open."""
    if "_" not in wanted:
        found = _BASE_TEN.sub("", found)
    if _closed_up(wanted) == _closed_up(found):
        return True
    wanted, found = written(wanted, found), written(found, wanted)
    if _REALS.fullmatch(wanted) and _REALS.fullmatch(found):
        return True
    for rule in (_in_base, moments.compared, words.nothing, _unsolved, _as_numbers, _as_words, _as_ratios, _by_part):
        verdict = rule(wanted, found)
        if verdict is not None:
            return verdict
    return _by_collection(wanted, found)


def _closed_up(text: str) -> str:
    """Without spaces, but for those that tell "1, 234" from "1,234"."""
    if _SUBSTANCE.fullmatch(text):
        return re.sub(r"[\s_{}]", "", text)
    return re.sub(r"(?<!\d,)\s|\s(?!\d{3}(?!\d))", "", text)


def _unnamed(wanted: str, found: str) -> tuple[str, str]:
    """Without the name of the value ("Area = 12") on one side where the other has none."""
    if _FUNCTION.match(wanted) and _FUNCTION.match(found):
        return _FUNCTION.sub("", wanted), _FUNCTION.sub("", found)
    if _RELATION.search(wanted) is None:
        return wanted, _LABEL.sub("", _CALCULATION.sub("", _TURNED.sub(r"\1", found), 1))
    return (_LABEL.sub("", wanted) if _RELATION.search(found) is None else wanted), found


def _unsolved(wanted: str, found: str) -> str | None:
    return "the answer is an equation" if _UNSOLVED.fullmatch(found) and quantity(wanted) else None


def _in_base(wanted: str, found: str) -> bool | str | None:
    sides = [_BASED.fullmatch(side) or re.fullmatch(r"(?P<digits>-?[0-9A-F]+)", side) for side in (wanted, found)]
    written = [_BASES.get(side["base"], side["base"]) for side in sides if side and "base" in side.re.groupindex]
    if None in sides or not written:
        return None
    same = len({side["digits"].lstrip("0") for side in sides if side}) == 1
    if _BASED.fullmatch(wanted) is None:
        return "the answer is in a base, the reference names none" if same else _in_base_ten(sides[1], wanted)
    return len(set(written)) == 1 and same


def _in_base_ten(number: re.Match[str] | None, wanted: str) -> bool:
    """Whether a number with its base is the ``wanted`` one in base ten."""
    assert number
    try:
        return wanted.isdecimal() and int(number["digits"], int(_BASES.get(number["base"], number["base"]))) == int(
            wanted
        )
    except ValueError:
        return False


def _as_numbers(wanted: str, found: str) -> bool | str | None:
    wanted, found = _unnamed(wanted, found)
    references, answers = _quantities(wanted), _quantities(found)
    if not references:
        return None
    verdicts = [equal(reference, answer) for reference in references for answer in answers]
    if True in verdicts:
        return True
    if None in verdicts:
        return "the answer differs from the reference in its unit"
    if _COMMA_DECIMAL.fullmatch(found):
        other = quantity(found.translate(str.maketrans(",.", ".,")))
        if other and any(equal(reference, other) for reference in references):
            return "the answer's comma or point may be a decimal one"
    # Words where a number was asked for are wrong.
    return None if not answers and (re.search(r"[\d\\]", found) or len(found) < 3) else False


def _quantities(text: str) -> list[Quantity]:
    """The quantity that a text states, in each unit that it may be told in; a chain of equals states its last."""
    chain = [quantity(side.strip()) for side in text.split("=")]
    return compound(text) or ([chain[-1]] if chain[-1] and all(chain) else [])


def _as_words(wanted: str, found: str) -> bool | str | None:
    return words.compared(wanted, found) if words.is_words(wanted) else None


def _as_ratios(wanted: str, found: str) -> bool | str | None:
    reference, answer = _ratio(wanted), _ratio(found)
    if reference is None or answer is None or len(reference) == len(answer) == 1:
        return None
    if 1 in (len(reference), len(answer)):
        pair, [value] = (answer, reference) if len(reference) == 1 else (reference, answer)
        return len(pair) == 2 and pair[1] != 0 and pair[0] / pair[1] == value
    same = len(reference) == len(answer) and all(
        a * answer[0] == b * reference[0] for a, b in zip(reference, answer, strict=True)
    )
    times = moments.clock(wanted) and moments.clock(found)
    return "the answer may be a time or a ratio" if same and times else same


def _ratio(text: str) -> list[Fraction] | None:
    terms = [quantity(term.strip()) for term in re.split(r"\s*:\s*|\\colon|\s+(?:to|in|out of)\s+", text)]
    return [term.value * term.scale for term in terms if term] if all(terms) else None


def _by_part(wanted: str, found: str) -> bool | str | None:
    """Labelled or named values, each with its own."""
    wanted, found = parts.spelled(wanted), parts.spelled(found)
    ours, theirs = parts.labelled(wanted), parts.labelled(found)
    if ours or theirs:
        return _each(ours or parts.split(wanted), theirs or parts.split(found))
    mine, yours = parts.named(wanted), parts.named(found)
    if mine and yours:
        if mine.keys() != yours.keys():
            return None
        return _each([*mine.values()], [yours[name] for name in mine])
    pairs, other = (mine, found) if mine else (yours, wanted)
    collected = parts.collection(other) if pairs else None
    if not pairs or not collected or collected.kind not in ("tuple", "list"):
        return None
    values = [pairs[name] for name in (sorted(pairs) if collected.kind == "tuple" else pairs)]
    verdict = _each(collected.items, values) if other is wanted else _each(values, collected.items)
    if collected.kind == "list" and verdict is False and _in_any_order(collected.items, values) is True:
        return "the order of the answer's parts is open"
    return verdict


def _by_collection(wanted: str, found: str) -> bool | str:
    """Lists and sets in any order, tuples, matrices and intervals in theirs; all else is one formula."""
    wanted, found = _as_intervals(*(parts.solutions(parts.spelled(side)) for side in _unnamed(wanted, found)))
    pieces = [[piece.strip() for piece in re.split(r"\\cup(?![a-z])", side)] for side in (wanted, found)]
    if all(len(side) > 1 for side in pieces):
        return _in_any_order(*pieces) is True or formulas.compared(wanted, found)
    ours, theirs = parts.collection(wanted), parts.collection(found)
    if ours is None or theirs is None:
        several = ours or theirs
        # A set or a matrix may be written as a formula; a list is never one number.
        return False if several and several.kind == "list" else formulas.compared(wanted, found)
    kinds = {ours.kind, theirs.kind}
    if kinds <= {"list", "set"}:
        return _in_any_order(ours.items, theirs.items)
    if kinds == {"set", "tuple"} or ("matrix" in kinds and kinds & {"set", "list"}):
        return False
    if len(kinds) == 1 and len(ours.items) == 2 and ours.kind == "tuple" and ours.ends != theirs.ends:
        return False  # an end of the interval
    if kinds == {"matrix"} and ours.ends != theirs.ends:
        return False
    verdict = _each(ours.items, theirs.items)
    if "list" in kinds and verdict is False and _in_any_order(ours.items, theirs.items) is True:
        return "the order of the answer's parts is open"
    return verdict


def _as_intervals(wanted: str, found: str) -> tuple[str, str]:
    """Inequalities as the intervals they describe, unless they are about different variables."""
    reference, answer = parts.ranges(wanted), parts.ranges(found)
    if reference and answer and reference[0] != answer[0]:
        return wanted, found
    return reference[1] if reference else wanted, answer[1] if answer else found


def _each(wanted: list[str], found: list[str]) -> bool | str:
    if len(wanted) != len(found):
        return False
    return _all(compared(a, b) for a, b in zip(wanted, found, strict=True))


def _in_any_order(wanted: list[str], found: list[str]) -> bool | str:
    if len(wanted) != len(found):
        return False
    left = list(found)
    for reference in wanted:
        verdicts = [compared(reference, answer) for answer in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif all(verdict is False for verdict in verdicts):
            return False
        else:
            return next(verdict for verdict in verdicts if verdict is not False)
    return True


def _all(verdicts: Iterable[bool | str]) -> bool | str:
    """False if one is, else the first that stays open, else True."""
    seen = list(verdicts)
    return False if False in seen else next((verdict for verdict in seen if verdict is not True), True)


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"
