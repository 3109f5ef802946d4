"""Answers as exact quantities: "\\$1,450.50", "016", "3\\frac{1}{2} \\text{ feet}", "70\\%", "1.5 million"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip

_WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad\b|qquad\b|displaystyle\b|left(?![a-z])|right(?![a-z]))|~")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_FRACTION = r"\\frac\s*(?:\{\s*(?P<n>[-+]?\d+)\s*\}|(?P<n1>\d))\s*(?:\{\s*(?P<d>\d+)\s*\}|(?P<d1>\d+))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<sign2>[-+]?)\s*"
    rf"(?:(?P<whole>{_DIGITS})?\s*{_FRACTION}|(?P<top>{_DIGITS})\s*/\s*(?P<bottom>\d+)|(?P<decimal>{_DIGITS}))"
    rf"\s*(?P<unit>.*)",
    re.S,
)
_UNIT = re.compile(
    r"(?P<percent>%|percent\b|percentage points?\b)?\s*(?P<name>[^\W\d_][^\d\\{}=<>+*|]*(?:\^\{?[23]\}?)?|°|²|³)?"
)
_CLOCK = re.compile(r"(\d{1,2})(?::00)? ?([ap])\.?m\.?|(\d{1,2}):00", re.I)
_ALIASES = {
    "degree": "°", "dollar": "$", "usd": "$", "buck": "$", "cent": "¢", "inche": "in", "inch": "in", "feet": "ft",
    "foot": "ft", "yard": "yd", "mile": "mi", "millimeter": "mm", "centimeter": "cm", "centimetre": "cm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "hour": "h", "hr": "h", "minute": "min", "second": "s",
    "sec": "s", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l", "square": "sq",
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """An exact number with what was written beside it; ``decimals`` is None for fractions and whole numbers."""

    value: Fraction
    percent: bool = False
    scale: int = 1
    unit: str = ""
    decimals: int | None = None


def tidy(text: str) -> str:
    """LaTeX and Markdown dressing removed, so that equal answers are more often equal strings."""
    text = text.replace("−", "-").replace("–", "-").replace("％", "%").replace(r"\%", "%").replace("\u00a0", " ")
    text = re.sub(r"\\([dtc]frac)(?![a-z])", r"\\frac", text.replace("**", "").replace("{,}", ","))
    text = re.sub(r",\\! *", ",", text)
    text = re.sub(r"\\\\\s*\[[\d.]+(?:pt|ex|em|mm|cm)\]", r"\\\\", text)  # \\[4pt] between the rows of a matrix
    text = re.sub(r"(?<!\\)\\[\[\]()]|(?<!\\)\$\$", " ", text)
    while (bare := _WRAPPER.sub(r" \1 ", text)) != text:
        text = bare
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-z])|\\deg\b", "°", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", ",", text)  # 12\,000
    text = _SPACING.sub(" ", text.replace(r"\$", "$").replace(r"\{", "\0").replace(r"\}", "\1"))
    text = text.replace("\0", r"\{").replace("\1", r"\}")
    text = re.sub(r"^\$(.*[^\d\s].*|[^$]*)\$$", r"\1", text.strip(), flags=re.S)
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;:").strip()


def quantity(tidied: str) -> Quantity | None:
    """Read a ``tidy`` string as one quantity, or None where it is anything else, "18 hours and 48 minutes" included."""
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=[-+$\d.\\])", "", tidied)  # x = 5
    if clock := _CLOCK.fullmatch(text):
        return Quantity(Fraction(int(clock[1] or clock[3])), unit=f"{clock[2].lower()}m" if clock[2] else "")
    match = _NUMBER.fullmatch(text)
    if match is None or len(text) > 200:
        return None
    rest = _UNIT.fullmatch(match["unit"].strip().rstrip("."))
    glued = match["unit"][:1].isalpha() and match.group()[: match.start("unit") - match.start()][-1:] != " "
    if rest is None or (glued and len(match["unit"]) < 2):  # "5x" is algebra
        return None
    value = _value(match)
    if value is None:
        return None
    words = (rest["name"] or "").lower().split()
    scale = SCALES.get(words[0].removesuffix("s"), 1) if words else 1
    unit = " ".join(_unit_word(word) for word in (words[1:] if scale != 1 else words))
    if match["currency"]:
        unit = match["currency"] if unit in ("", "$") else f"{match['currency']} {unit}"
    written = match["decimal"] or ""
    decimals = len(written.partition(".")[2]) if "." in written else None
    return Quantity(
        value * (-1 if "-" in (match["sign"], match["sign2"]) else 1), bool(rest["percent"]), scale, unit, decimals
    )


def _value(match: re.Match[str]) -> Fraction | None:
    def number(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))

    if match["decimal"]:
        return number(match["decimal"])
    top, bottom = match["n"] or match["n1"] or match["top"], match["d"] or match["d1"] or match["bottom"]
    if int(bottom) == 0:
        return None
    fraction = number(top.removeprefix("+")) / int(bottom)
    return number(match["whole"]) + fraction if match["whole"] else fraction


def _unit_word(word: str) -> str:
    word = word.strip(".,;:()^")
    singular = word.removesuffix("s") if len(word) > 2 else word
    return _ALIASES.get(singular, singular)


# Units that are written one behind the other, the smaller as a share of the larger.
_PARTS = {("h", "min"): 60, ("min", "s"): 60, ("day", "h"): 24, ("ft", "in"): 12, ("lb", "oz"): 16, ("$", "¢"): 100}


def compound(tidied: str) -> list[Quantity]:
    """ "18 hours and 48 minutes" in its smaller and in its larger unit; [] for anything else."""
    parts = re.split(r",? and |, | (?=\d)", tidied)
    if len(parts) != 2:
        return []
    large, small = (quantity(part) for part in parts)
    if large is None or small is None:
        return []
    size = _PARTS.get((large.unit, small.unit))
    if not size or small.value >= size:
        return []
    total = large.value * size + small.value
    return [Quantity(total, unit=small.unit), Quantity(total / size, unit=large.unit)]


def equal(reference: Quantity, answer: Quantity) -> bool | None:
    """Whether the two say the same; None where only the unit or the scale keeps it open.

    Percent signs are taken or left: 20% equals 20 and 0.2. A decimal of at least four digits may be a rounded fraction.
    """
    if _same_number(reference, answer):
        ours, theirs = (q.unit or "%" * q.percent for q in (reference, answer))
        return None if ours and theirs and ours != theirs else True
    if reference.scale != answer.scale and reference.value == answer.value:
        return None
    return False


def _same_number(reference: Quantity, answer: Quantity) -> bool:
    a, b = reference.value * reference.scale, answer.value * answer.scale
    if reference.percent != answer.percent:
        plain, percent = (b, a) if reference.percent else (a, b)
        return plain in (percent, percent / 100)
    return a == b or _rounds_to(a, b, answer.decimals) or _rounds_to(b, a, reference.decimals)


def _rounds_to(exact: Fraction, written: Fraction, decimals: int | None) -> bool:
    """Whether ``written`` is a fraction without a finite decimal form, rounded to at least four significant digits."""
    if not decimals or abs(written) * 10**decimals < 1000 or _finite(exact):
        return False
    return round(exact, decimals) == written


def _finite(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
