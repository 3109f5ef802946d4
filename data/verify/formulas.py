"""Two formulas compared by math-verify, whose known misreadings are kept from it.

It can hang (sympy may try to expand 9^(9^9)) or ask for all memory: call it where it can be killed.
"""

from __future__ import annotations

import re
from typing import Any

from r1distill.data.verify.quantities import is_unit
from r1distill.data.verify.units import unit

_TRAILING_UNIT = re.compile(
    r"(?<=[\d})!a-z])\s*(?:°|(?<=[\s}])(?P<unit>[A-Za-z]+(?:[ /.]+[A-Za-z]+)*(?:\s?\^ ?\{? ?[23] ?\}?)?))$"
)
_STRAY_WORDS = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OPERATOR = re.compile(r"\s*([-+=/])\s*|(?<![A-Za-z\\])([a-z]) (?=[a-z](?![a-z]))")
_CHOSEN = re.compile(r"\b([CA]) ?_ ?(?:\{ ?(\w{1,3}) ?\}|(\w)) ?\^ ?(?:\{ ?(\w{1,3}) ?\}|(\w))")
# Numerators of the values put for letters, over 1009: more than one and less, all positive and of both signs.
_POINTS = [(613, 1787, 431, 1993, 811, 2267), (1481, 347, 2417, 709, 1289, 557), (-523, 1607, -937, 2029, -389, 1103)]
_LETTER = re.compile(r"\\(?:mathbb|mathcal|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z](?!\s*(?:_|\([a-z, ]{1,6}\)))")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def compared(wanted: str, found: str) -> bool | str:
    """Whether math-verify takes two tidy answers for equal, or why it can't say."""
    from math_verify import verify

    if ("\\pi" in wanted) != ("\\pi" in found):  # an angle in degrees may be meant in radians
        wanted, found = (re.sub(r"(\d+(?:\.\d+)?)\s*°$", r"\\frac{\1 \\pi}{180}", side) for side in (wanted, found))
    (wanted, ours), (found, theirs) = map(_plain, _cased(wanted, found))
    if ours and theirs and unit(ours) != unit(theirs):
        different = unit(ours).measures != unit(theirs).measures and unit(ours).measures and unit(theirs).measures
        return False if different else "the answer differs from the reference in its unit"
    reference = _parsed(wanted)
    if reference is None:
        return "the reference can't be read as mathematics"
    answers = [answer for part in re.split(r"\\approx|≈", found) if (answer := _parsed(part)) is not None]
    if not answers:
        return "the answer can't be read as mathematics"
    for answer in answers:
        equal = _same_number(reference, answer)  # math-verify would simplify their difference, which is slow
        if equal is None:
            equal = _same_function(reference, answer)
        if equal is None:
            equal = _equal_complex(reference, answer) or (
                _close(reference, answer)
                and verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True)
            )
        if equal:
            return True
    return False


def _cased(wanted: str, found: str) -> list[str]:
    """Capital letters marked where the small one stands in either answer too: math-verify takes R and r for one. A
    constant of integration may be C or c."""
    letters = [{token for token in _LETTER.findall(side) if len(token) == 1} for side in (wanted, found)]
    both = {letter for letter in set.union(*letters) if letter.isupper() and letter.lower() in set.union(*letters)}
    if "C" in both and all(len({"C", "c"} & side) == 1 for side in letters):
        both.remove("C")
    marked = {letter: f"{letter.lower()}_{{capital}}" for letter in both}
    return [_LETTER.sub(lambda one: marked.get(one[0], one[0]), side) if both else side for side in (wanted, found)]


def _plain(text: str) -> tuple[str, str]:
    """The text without what math-verify would drop or misread (a unit behind it, commas in numbers, degrees), and the
    unit."""
    if not text.startswith(("(", "[")):
        text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    if _TRIGONOMETRY.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*°", r"(\1 \\cdot \\pi / 180)", text)
    trailing = _TRAILING_UNIT.search(text)
    name = (trailing["unit"] or "") if trailing else ""
    if trailing and (not name or is_unit(name)):
        text = text[: trailing.start()]
    else:
        name = ""
    text = _CHOSEN.sub(_chosen, text)
    text = re.sub(r"\\lg(?![a-z])", r"\\log_{10} ", text.replace("°", "")).strip()
    return _OPERATOR.sub(r"\1\2", text), name  # a last " + bc" is taken for a unit


def _chosen(match: re.Match[str]) -> str:
    """C_{10}^{3} as \\binom{10}{3} and A_5^2 as 5!/(5-2)!; C_1^2 is a square."""
    kind, n, k = match[1], match[2] or match[3], match[4] or match[5]
    if n.isdecimal() and not (k.isdecimal() and int(n) >= int(k)):
        return match[0]
    return rf"\binom{{{n}}}{{{k}}}" if kind == "C" else rf"\frac{{({n})!}}{{({n}-{k})!}}"


def _parsed(text: str) -> Any | None:
    """The formula as math-verify reads it; None with words or bases in it, which it would multiply or skip."""
    from math_verify import LatexExtractionConfig, parse

    if (
        not text.strip()
        or re.search(r"\d\s*_", text)
        or _STRAY_WORDS.search(re.sub(r"\\(?:begin|end)\s*\{ ?[a-z]* ?\}", "", text))
    ):
        return None
    found = parse(f"${text}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _same_number(reference: Any, answer: Any) -> bool | None:
    """Whether two exact numbers are equal; None of anything else, and where one may be percent."""
    from sympy import Expr, Float

    for side in (reference, answer):
        if not isinstance(side, Expr) or side.free_symbols or side.has(Float):
            return None
    exact, other = (side.doit() for side in (reference, answer))
    if exact.is_Rational and other.is_Rational:  # 2^{2024} and 2^{2024} + 1 are equal in the first sixty digits
        return True if exact == other else None if exact in (other * 100, other / 100) else False
    a, b = (side.evalf(60) for side in (exact, other))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return None
    if abs(a - b) <= 1e-50 * abs(a):
        return True
    return None if any(abs(a - other) <= 1e-50 * abs(a) for other in (b * 100, b / 100)) else False


def _same_function(reference: Any, answer: Any) -> bool | None:
    """Whether two exact expressions in the same letters have the same value wherever they are evaluated; None where
    some of the points can't tell: outside a domain, or where only one sign of a root differs."""
    from sympy import Derivative, Expr, Float, Integral, Limit, Product, Rational, Sum

    if not (isinstance(reference, Expr) and isinstance(answer, Expr)) or reference.has(Float) or answer.has(Float):
        return None
    if any(side.has(Sum, Product, Integral, Limit, Derivative) for side in (reference, answer)):
        return None
    letters = sorted(reference.free_symbols, key=str)
    if not letters or len(letters) > 6 or "i" in map(str, letters) or reference.free_symbols != answer.free_symbols:
        return None
    agreed = 0
    for point in _POINTS:
        at = {letter: Rational(point[place], 1009) for place, letter in enumerate(letters)}
        try:
            a, b = (side.subs(at).doit().evalf(60) for side in (reference, answer))
        except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
            return None
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            continue
        if abs(a - b) > 1e-50 * max(abs(a), abs(b)):
            return False if min(point) > 0 and max(abs(a), abs(b)) > 1e-30 else None
        agreed += 1
    return True if agreed == len(_POINTS) else None


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
    if not (a.is_finite and b.is_finite):
        return bool(a == b)
    return bool(a == b) or any(bool(abs(a - other) <= tolerance * abs(a)) for other in (b, b * 100, b / 100))


def _equal_complex(reference: Any, answer: Any) -> bool:
    """Whether two numbers in which only the letter i stands are equal with it read as the imaginary unit."""
    from sympy import Expr, Float, I

    sides = (reference, answer)
    if not all(isinstance(side, Expr) for side in sides):
        return False
    letters = {symbol for side in sides for symbol in side.free_symbols}
    if {str(letter) for letter in letters} != {"i"} or any(side.has(Float) for side in sides):
        return False
    a, b = (side.subs(dict.fromkeys(letters, I)).evalf(20) for side in sides)
    return bool(a.is_number and b.is_number and a.is_finite and b.is_finite and abs(a - b) <= 1e-12 * abs(a))
