"""Answers as exact quantities: "\\$1,450.50", "016", "3\\frac{1}{2} \\text{ feet}", "70\\%", "1.5 million"."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from r1distill.data.verify.units import DOLLARS, NONE, Unit, known, unit

SCALES = {
    "dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip

_QUOTIENT = re.compile(r"\\frac\s*" + 2 * r"\{\s*\\(?:text|mathrm)\s*\{([^{}]*)\}\s*\}\s*")  # of units
_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
_WRAPPER = re.compile(
    r"\\(?:text|text(?:bf|it|rm|sf|tt)|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|operatorname|underline)\s*" + _BRACED
)
_ELSEWHERE = {"tg": "tan", "ctg": "cot", "arctg": "arctan", "arcctg": "arccot", "cosec": "csc", "sh": "sinh",
              "ch": "cosh"}  # fmt: skip
_FUNCTION = re.compile(
    r"\\(?:(?:operatorname|mathrm|text|textrm)\s*\{\s*((?:arc)?(?:sin|cos|tan|cot|sec|csc|cosec|tg|ctg)h?|ln|log|lg|exp"
    r"|[sc]h|gcd|lcm|max|min|det)\s*\}|((?:arc)?c?tg|cosec)(?![a-z]))\s*"
)
_DOTTED = re.compile(r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?|(?<=\.)(\d*)\((\d+)\)$")
_GOING_ON = re.compile(r"(\d\.\d*?)(\d{1,3}?)\2{2,}\s*\\dots")  # 0.333...
_BRACED_LIST = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}")
_RUPEES = re.compile(r"\b(?:Rs\.?|INR)\s*(?=\d)")
_FULL_WIDTH = {0xFEE0 + code: code for code in range(0x21, 0x7F)} | str.maketrans("、。　\u00a0−–", ",.  --")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_ROOT = re.compile(r"([√∛])\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
# Units of one capital letter: once their \\text is gone, they look like variables.
_SYMBOLS = {"N": "newton", "J": "joule", "K": "kelvin", "W": "watt", "V": "volt", "T": "tesla", "L": "liter"}
_SYMBOL = re.compile(
    r"([\d}](?:\s|\\[,;: !]|~)*)\\(?:text|mathrm|textrm)\s*"
    r"\{(?:\s|~|\\[,;: ])*([NJKWVTL])(?![A-Za-z])([^{}]*)\}(?!\s*_)"
)
_BARE_SYMBOL = re.compile(r"(?<=\d) ?([NJKWVTL])(?![A-Za-z_^({])")
_PLAIN = re.compile(r"(?:(?!Rs|INR|\.\.)[A-Za-z0-9\s,.:;=+/'<>-])*")  # nothing in it is dressing
_SPACING = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad\b|qquad\b|displaystyle\b|left(?![a-z])|right(?![a-z]))|~")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
_FRACTION = r"\\frac\s*(?:\{\s*(?P<n>[-+]?\d+)\s*\}|(?P<n1>\d))\s*(?:\{\s*(?P<d>\d+)\s*\}|(?P<d1>\d+))"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<sign2>[-+]?)\s*"
    rf"(?:(?P<whole>{_DIGITS})?\s*{_FRACTION}|(?P<whole2>\d+) (?P<n2>\d+)/(?P<d2>\d+)"
    rf"|(?P<top>{_DIGITS})\s*/\s*(?P<bottom>\d+)|(?P<fixed>\d*\.\d*)\s*\\(?:overline|bar)\s*\{{?\s*(?P<repeated>\d+)\s*\}}?"
    rf"|(?P<decimal>{_DIGITS})(?:\s*(?:\\times|\\cdot|[×·*])\s*10\s*\^\s*\{{?\s*(?P<power>[-+]?\d{{1,3}})\s*\}}?"
    rf"|[eE](?P<power2>[-+]?\d{{1,3}}))?)"
    rf"\s*(?P<unit>.*)",
    re.S,
)
_UNIT = re.compile(
    r"(?P<percent>%|percent\b|percentage points?\b)?\s*"
    r"(?P<name>[^\W\d_](?:[^\d\\{}=<>+*|^]|\\cdot(?= ?[A-Za-z])|\^ ?\{? ?-?[1-4] ?\}?)*|° ?[CF]?|[²³¢€£])?"
)
# Words behind a number that are no unit of it: they change what is said.
_NO_UNIT = re.compile(
    r"\b(?:or|not|to|than|if|unless|when|plus|minus|times|but|is|are|choose|factorial|must|mod|half|below zero)\b"
    r"|^(?:squared|cubed|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?)\b",
    re.I,
)  # fmt: skip
_SHORT = {"hz", "pa", "kn", "kj", "kw", "mw", "ev", "db", "ph", "kb", "mb", "gb", "tb", "ly", "au", "pc",
          "sq", "cu", "of"}  # fmt: skip
_LETTERS_IN_A_ROW = {"abcdefghijklmnopqrstuvwxyz"[place : place + 3] for place in range(24)}
_CLOCK = re.compile(r"(\d{1,2})(?::00)? ?([ap])\.? ?m\.?|(\d{1,2}):00", re.I)
_VULGAR = {"½": "1}{2", "⅓": "1}{3", "⅔": "2}{3", "¼": "1}{4", "¾": "3}{4", "⅕": "1}{5", "⅖": "2}{5", "⅗": "3}{5",
           "⅘": "4}{5", "⅙": "1}{6", "⅚": "5}{6", "⅛": "1}{8", "⅜": "3}{8", "⅝": "5}{8", "⅞": "7}{8"}  # fmt: skip
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS_IN_WORDS = (*_ONES, *_TENS)
_IN_WORDS = re.compile(
    rf"(?P<minus>(?:negative|minus) )?"
    rf"(?:(?P<tens>{'|'.join(_TENS)})[- ]?)?(?P<ones>{'|'.join(reversed(_ONES))})?(?P<rest>\s.*)?",
    re.I,
)


_PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10,
}  # fmt: skip
_PART = re.compile(rf"(?:(an?|{'|'.join(_ONES[1:10])})[ -])?({'|'.join(_PARTS)})s?", re.I)


@dataclass(frozen=True)
class Quantity:
    """An exact number with what was written beside it; ``decimals`` is None for fractions and whole numbers."""

    value: Fraction
    percent: bool = False
    scale: int = 1
    unit: Unit = NONE
    decimals: int | None = None


def tidy(text: str) -> str:
    """LaTeX and Markdown dressing removed, so that equal answers are more often equal strings."""
    return _trimmed(text if _PLAIN.fullmatch(text) else _undressed(text))


def _trimmed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(".,;:").strip()


def _undressed(text: str) -> str:
    text = (text if text.isascii() else _in_latex(text)).replace(r"\%", "%")
    text = re.sub(r"\\([dtc]frac)(?![a-z])", r"\\frac", text.replace("**", "").replace("{,}", ",").replace("{:}", ":"))
    text = re.sub(r"(?<!\\)\\!", "", re.sub(r",\\! *", ",", text))
    text = re.sub(r"\\\\\s*\[[\d.]+(?:pt|ex|em|mm|cm)\]", r"\\\\", text)  # \\[4pt] between the rows of a matrix
    text = re.sub(r"(?<!\\)\\[\[\]()]|(?<!\\)\$\$", " ", text)
    text = re.sub(r"\\(?:text)?color\s*\{\s*\w+\s*\}", "", text)
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-z])|\\deg\b", "°", text)
    text = re.sub(r"\\(?:ldots|cdots|dotsc)(?![a-z])|…|(?<!\.)\.\.\.(?!\.)", r"\\dots ", text)
    text = _FUNCTION.sub(lambda name: f"\\{_ELSEWHERE.get(name[1] or name[2], name[1] or name[2])} ", text)
    text = _BRACED_LIST.sub(r"\\\1(\2)", _GOING_ON.sub(r"\1\\overline{\2}", text))
    text = _RUPEES.sub("₹", _DOTTED.sub(_repeating, text))
    text = _QUOTIENT.sub(r" \1/\2 ", text)
    text = _SYMBOL.sub(lambda symbol: f"{symbol[1]} {_SYMBOLS[symbol[2]]}{symbol[3]} ", text)
    while (bare := _WRAPPER.sub(r" \1 ", text)) != text:
        text = bare
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", ",", text)  # 12\,000
    text = _SPACING.sub(" ", text.replace(r"\$", "$").replace(r"\{", "\0").replace(r"\}", "\1"))
    text = text.replace("\0", r"\{").replace("\1", r"\}")
    return re.sub(r"^\$(.*[^\d\s].*|[^$]*)\$$", r"\1", text.strip(), flags=re.S)


def _repeating(match: re.Match[str]) -> str:
    """0.1\\dot{6} and 0.1(6) as 0.1\\overline{6}."""
    if match[5]:
        return rf"{match[4]}\overline{{{match[5]}}}"
    return rf"\overline{{{match[1]}{match[2] or ''}{match[3] or ''}}}"


def _in_latex(text: str) -> str:
    """Full-width characters, roots, powers and fractions of one character in ASCII and LaTeX."""
    text = text.translate(_FULL_WIDTH).replace("π", r"\pi ").replace("·", r"\cdot ")
    text = re.sub("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]", lambda vulgar: rf"\frac{{{_VULGAR[vulgar[0]]}}}", text)
    text = re.sub(r"(?<=[\w)}])[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda power: f"^{{{power[0].translate(_RAISED)}}}", text)
    index = {"√": "", "∛": "[3]"}
    return _ROOT.sub(lambda root: rf"\sqrt{index[root[1]]}{{{root[2] or root[3] or root[4]}}}", text)


def quantity(tidied: str) -> Quantity | None:
    """Read a ``tidy`` string as one quantity, or None where it is anything else, "18 hours and 48 minutes" included."""
    text = re.sub(r"^[A-Za-z]\s*=\s*(?=[-+$\d.\\])", "", tidied)  # x = 5
    if clock := _CLOCK.fullmatch(text):
        return Quantity(Fraction(int(clock[1] or clock[3])), unit=Unit(f"{clock[2].lower()}m" if clock[2] else ""))
    if part := _PART.fullmatch(text):
        ones = _ONES.index(part[1].lower()) if part[1] and part[1].lower() in _ONES else 1
        return Quantity(Fraction(ones, _PARTS[part[2].lower().rstrip("s")]))
    match = _NUMBER.fullmatch(_in_digits(text))
    if match is None or len(text) > 200:
        return None
    rest = _UNIT.fullmatch(match["unit"].strip().rstrip("."))
    value = _value(match)
    if rest is None or value is None or not _is_unit(match, rest["name"] or ""):
        return None
    words = (rest["name"] or "").split()
    scale = SCALES.get(words[0].lower().removesuffix("s"), 1) if words else 1
    name = " ".join(words[1:] if scale != 1 else words)
    if match["currency"]:
        money = unit(match["currency"])
        named = money if not name or unit(name).measures == money.measures else Unit(f"{match['currency']} {name}")
    else:
        named = unit(name)
    written = match["decimal"] or ""
    exact = "." not in written or match["power"] or match["power2"]
    sign = -1 if "-" in (match["sign"], match["sign2"]) else 1
    decimals = None if exact else len(written.partition(".")[2])
    return Quantity(value * sign, bool(rest["percent"]), scale, named, decimals)


def written(text: str, other: str) -> str:
    """ "10 N" as "10 newton" where the ``other`` answer's unit is the newton: a bare letter may be a variable."""
    match = _BARE_SYMBOL.search(text)
    if match is None or (name := _SYMBOLS[match[1]]) not in other:
        return text
    return f"{text[: match.start()]} {name}{text[match.end() :]}"


def _is_unit(match: re.Match[str], name: str) -> bool:
    """Whether what stands behind a number is its unit: "5x" and "5 x" are algebra, "12 or more" says something else."""
    glued = (
        name[:1].isascii() and name[:1].isalpha() and match.group()[: match.start("unit") - match.start()][-1:] != " "
    )
    return not (glued and len(name) < 2) and (not name or is_unit(name))


def is_unit(name: str) -> bool:
    """Whether a name behind a number can be its unit: not "x", "ab" or "xyz", nor "or more" or "squared", which change
    what the number says."""
    first = re.split(r"[^A-Za-z]", name)[0].lower()
    letters = len(first) < 3 or first in _LETTERS_IN_A_ROW
    return not _NO_UNIT.search(name) and (not first or not letters or known(first) or known(name) or first in _SHORT)


def _in_digits(text: str) -> str:
    """ "twelve apples" as "12 apples"; any other text as it is."""
    match = _IN_WORDS.fullmatch(text)
    if match is None or not (match["tens"] or match["ones"]):
        return text
    minus = "-" if match["minus"] else ""
    tens = 10 * (_TENS.index(match["tens"].lower()) + 2) if match["tens"] else 0
    ones = _ONES.index(match["ones"].lower()) if match["ones"] else 0
    return text if tens and match["ones"] and not 0 < ones < 10 else f"{minus}{tens + ones}{match['rest'] or ''}"


def _value(match: re.Match[str]) -> Fraction | None:
    def number(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", "").rstrip(".") or "0")

    if match["decimal"]:
        return number(match["decimal"]) * Fraction(10) ** int(match["power"] or match["power2"] or 0)
    if match["repeated"]:
        places = len(match["fixed"].partition(".")[2])
        period = Fraction(int(match["repeated"]), 10 ** len(match["repeated"]) - 1)
        return number(match["fixed"].removesuffix(".")) + period / 10**places
    top = match["n"] or match["n1"] or match["n2"] or match["top"]
    bottom = match["d"] or match["d1"] or match["d2"] or match["bottom"]
    if int(bottom) == 0:
        return None
    fraction = number(top.removeprefix("+")) / int(bottom)
    whole = match["whole"] or match["whole2"]
    if match["whole2"] and fraction >= 1:
        return None
    return number(whole) + fraction if whole else fraction


def compound(tidied: str) -> list[Quantity]:
    """ "18 hours and 48 minutes" in its smaller and in its larger unit; [] for anything else."""
    parts = re.split(r",? and |, | (?=\d)", tidied)
    if len(parts) != 2:
        return []
    large, small = (quantity(part) for part in parts)
    if large is None or small is None or not large.unit.measures or large.unit.measures != small.unit.measures:
        return []
    if small.value * small.unit.size >= large.unit.size or large.value.denominator != 1:
        return []
    total = large.value * (large.unit.size / small.unit.size) + small.value
    return [Quantity(total, unit=small.unit), Quantity(total * small.unit.size / large.unit.size, unit=large.unit)]


def equal(reference: Quantity, answer: Quantity) -> bool | None:
    """Whether the two say the same; None where only an unknown unit or the scale keeps it open.

    A unit may be missing on one side; two units are converted, and two that measure different things are unequal.
    Percent signs are taken or left: 20% equals 20 and 0.2. A decimal of at least four digits may be a rounded fraction.
    """
    ours, theirs = reference.unit, answer.unit
    cents = theirs.measures == DOLLARS.measures and theirs.size != DOLLARS.size
    if cents and not ours.name and reference.decimals and not _same_number(reference, answer):
        answer = replace(answer, value=answer.value * theirs.size, unit=DOLLARS)  # 0.50 is 50 cents
    if ours.measures and theirs.measures and (ours.measures, ours.size) != (theirs.measures, theirs.size):
        sizes = (q.value * q.scale * q.unit.size for q in (reference, answer))
        return ours.measures == theirs.measures and len(set(sizes)) == 1
    if _same_number(reference, answer):
        names = [_name(quantity) for quantity in (reference, answer)]
        return None if all(names) and names[0] != names[1] else True
    if reference.scale != answer.scale and reference.value == answer.value:
        return None
    return False


def _name(quantity: Quantity) -> str:
    """What names a unit: its measure and size where they are known."""
    unit = quantity.unit
    return (
        f"{unit.measures} {unit.size}"
        if unit.measures
        else re.sub(r"(?:\\cdot|[\s·*-])+", " ", unit.name.partition(" of ")[0]) or "%" * quantity.percent
    )


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
