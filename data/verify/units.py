"""Units of measure and of money: what they measure, and how many of the base unit each is, exactly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_INCH, _POUND = Fraction("0.0254"), Fraction("453.59237")
_GALLON = 231 * _INCH**3  # the US gallon
# name: (what it measures, how many base units it is). A volume is a length cubed; months and years are not days.
_UNITS: dict[str, tuple[dict[str, int], Fraction | int]] = {
    "m": ({"length": 1}, 1), "mm": ({"length": 1}, Fraction(1, 1000)), "cm": ({"length": 1}, Fraction(1, 100)),
    "dm": ({"length": 1}, Fraction(1, 10)), "km": ({"length": 1}, 1000),
    "in": ({"length": 1}, _INCH), "ft": ({"length": 1}, 12 * _INCH),
    "yd": ({"length": 1}, 36 * _INCH), "mi": ({"length": 1}, 63360 * _INCH),
    "s": ({"time": 1}, 1), "min": ({"time": 1}, 60), "h": ({"time": 1}, 3600), "day": ({"time": 1}, 86400),
    "week": ({"time": 1}, 7 * 86400), "month": ({"month": 1}, 1), "year": ({"month": 1}, 12),
    "mg": ({"mass": 1}, Fraction(1, 1000)), "g": ({"mass": 1}, 1), "kg": ({"mass": 1}, 1000),
    "lb": ({"mass": 1}, _POUND), "oz": ({"mass": 1}, _POUND / 16),
    "ml": ({"length": 3}, Fraction(1, 10**6)), "l": ({"length": 3}, Fraction(1, 1000)),
    "gal": ({"length": 3}, _GALLON), "qt": ({"length": 3}, _GALLON / 4), "pt": ({"length": 3}, _GALLON / 8),
    "$": ({"dollar": 1}, 1), "¢": ({"dollar": 1}, Fraction(1, 100)), "€": ({"euro": 1}, 1), "£": ({"sterling": 1}, 1),
    "¥": ({"yen": 1}, 1), "₹": ({"rupee": 1}, 1), "°": ({"angle": 1}, 1), "°c": ({"celsius": 1}, 1),
    "°f": ({"fahrenheit": 1}, 1),
}  # fmt: skip
_ALIASES = {
    "degree": "°", "deg": "°", "dollar": "$", "usd": "$", "buck": "$", "cent": "¢", "penny": "¢", "pennie": "¢",
    "euro": "€", "eur": "€", "yen": "¥", "yuan": "¥",
    "rmb": "¥", "rupee": "₹", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft",
    "yard": "yd", "mile": "mi", "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm",
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "hour": "h", "hr": "h", "minute": "min",
    "second": "s", "sec": "s", "milligram": "mg", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz",
    "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml", "gallon": "gal", "quart": "qt", "pint": "pt",
    "yr": "year", "mo": "month", "wk": "week",
}  # fmt: skip
_IN_CHINESE = {
    "平方": "square ", "立方": "cubic ", "千米": "km", "公里": "km", "厘米": "cm", "毫米": "mm", "分米": "dm",
    "米": "m", "千克": "kg", "公斤": "kg", "克": "g", "小时": "h", "分钟": "min", "秒": "s", "天": "day", "毫升": "ml",
    "升": "l", "元": "¥", "度": "°",
}  # fmt: skip
_CHINESE = re.compile("|".join(_IN_CHINESE))
_SHORT = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3, "²": 2, "³": 3}
_TOKEN = re.compile(r"/|\^ ?\{? ?(?P<power>-?[1-4]) ?\}?|[²³]|° ?[cf]?\b|[$¢€£¥₹°]|[a-z]+\.?|[·*-]")


@dataclass(frozen=True)
class Unit:
    """``measures`` is the dimension, as sorted (what, power); ``size`` is in base units. Without a dimension it is a
    thing counted ("apples") or a unit that is not in the table, known by its ``name`` alone."""

    name: str = ""
    measures: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)


NONE = Unit()


@lru_cache(maxsize=4096)
def unit(text: str) -> Unit:
    """The unit that a phrase names: "cm^2", "square inches", "miles per hour", "km/h", "$"."""
    text = text if text.isascii() else _CHINESE.sub(lambda name: _IN_CHINESE[name[0]], text)
    words = " ".join(_singular(word) if word.isalpha() else word for word in text.lower().split())
    if not words:
        return NONE
    power, sign, pending = 0, 1, 1  # of the last unit; 1 above the stroke, -1 below; a "square" that waits
    measures: dict[str, int] = {}
    size = Fraction(1)
    last: tuple[dict[str, int], Fraction | int] | None = None

    def close() -> None:
        nonlocal size
        if last is not None:
            for what, exponent in last[0].items():
                measures[what] = measures.get(what, 0) + exponent * power * sign
            size *= Fraction(last[1]) ** (power * sign)

    position = 0
    phrase = re.sub(r"\bper\b", "/", _SHORT.get(words, words).replace("\\cdot", "·"))
    for match in _TOKEN.finditer(phrase):
        if phrase[position : match.start()].strip():
            return Unit(words)
        position = match.end()
        token = match.group().rstrip(".").replace("° ", "°")
        exponent = int(match["power"]) if match["power"] else _POWERS.get(token)
        if exponent and (token in ("square", "sq", "cubic", "cu")):
            pending = exponent
        elif exponent:
            power *= exponent
        elif token == "/":
            close()
            last, sign = None, -1
        elif token not in "·*-":
            known = _UNITS.get(_ALIASES.get(_singular(token), _singular(token)))
            if known is None:
                return Unit(words)
            close()
            last, power, pending = known, pending, 1
    if phrase[position:].strip() or last is None:
        return Unit(words)
    close()
    return Unit(words, tuple(sorted((what, n) for what, n in measures.items() if n)), size)


def _singular(word: str) -> str:
    word = word.strip(".,;:()")
    return word.removesuffix("s") if len(word) > 2 and not word.endswith("ss") else word


DOLLARS = unit("$")


def known(text: str) -> bool:
    """Whether the phrase is a unit of the table."""
    return bool(unit(text).measures)
