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
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def compared(wanted: str, found: str) -> bool | str:
    """Whether math-verify takes two tidy answers for equal, or why it can't say."""
    from math_verify import verify

    if ("\\pi" in wanted) != ("\\pi" in found):  # an angle in degrees may be meant in radians
        wanted, found = (re.sub(r"(\d+(?:\.\d+)?)\s*°$", r"\\frac{\1 \\pi}{180}", side) for side in (wanted, found))
    (wanted, ours), (found, theirs) = _plain(wanted), _plain(found)
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
            equal = _equal_complex(reference, answer) or (
                _close(reference, answer)
                and verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True)
            )
        if equal:
            return True
    return False


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
    return text.replace("°", "").strip(), name


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
    a, b = (side.doit().evalf(60) for side in (reference, answer))
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return None
    if abs(a - b) <= 1e-50 * abs(a):
        return True
    return None if any(abs(a - other) <= 1e-12 * abs(a) for other in (b, b * 100, b / 100)) else False


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
