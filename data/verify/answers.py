"""The final answer of a response: what is boxed, else what the closing sentence states.

Where a response leaves open which of several numbers it means, there is no answer: a guess could accept a wrong one.
"""

from __future__ import annotations

import re

from r1distill.data.verify.quantities import NUMBERS_IN_WORDS, compound, is_unit, quantity, tidy

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_MOST_NESTED = 50
_MARKER = re.compile(
    r"(?:^[\W_]{0,20}(?:(?:the|my|original)\s+)?(?:final\s+)?answer(?:\s*\([^)\n]*\))?[\s*_]*[:：][\s*_]*|^\s*#{3,4}\s+(?=[-$\d]))"
    r"|\b(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)\s+is\b[\s*_]*[:：]?[\s*_]*"
    r"|(?:答案[\s*_]*(?:[是为选]|[:：])|故选|^[\W_]{0,20}答\s*[:：])[\s*_]*[:：]?[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
TAGGED = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.S | re.I)
_ASSIGNED = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?:_\{?\w+\}?)?\s*=\s*[^=,;≈]+?(?=\s*(?:,|;|$|\b(?:and|or)\b))", re.M)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?:\*\*)?\s+(?=[A-Z*\\$(])")
# The last of several items is not the answer, unless it says so.
_ITEMS = re.compile(r"^[ \t]*(?:[-*•]|\d+[.)])\s.*\n\s*(?:[-*•]|\d+[.)])\s(?!.*(?:\*\*|\btotal\b|=)).*\Z", re.M | re.I)
_CONNECTIVE = re.compile(
    r"[.!?]\s|\n\s*\n|\b(?:therefore|thus|hence|so|final|finally|which (?:is|means|gives))\b", re.I
)
# A sentence that says so has no answer to offer, whatever numbers it mentions.
_HEDGE = re.compile(
    r"\b(?:cannot|can['’]t|can not|could not|insufficient|not provide|not enough|impossible|unanswerable|speculat\w*|"
    r"undetermined|indeterminate|unclear|not (?:sure|certain)|might|perhaps|assum\w+|(?:isn|doesn)['’]t|missing|"
    r"incomplete|"
    r"lacks? (?:sufficient|enough|necessary|relevant|the|any|information|context|data))\b",
    re.I,
)
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_QUANTITY = re.compile(
    rf"(?<![a-zA-Z0-9.^_{{/√])(?<!\{{[-−–])[-−–]?\s?(?P<currency>\\?\$|[€£¥₹])?\s?[-−]?(?:{_NUMBER})"
    r"(?:\s?[×*]\s?10(?:\^\{?[-−]?\d+\}?|[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?"
    rf"(?:\s?/\s?(?:{_NUMBER})(?![a-zA-Z0-9_]))?(?:\s?\\?%|\s(?:percent|hundred|thousand|million|billion|trillion|dozen)\b)?"
    r"(?![\d^_π√⁻⁰¹²³⁴⁵⁶⁷⁸⁹]|\s[π√]|[xyzn](?![a-z]))"  # 2π and 5x are more than a number
)
_INLINE = re.compile(
    r"\\\((?P<a>[^\n]+?)\\\)|\\\[(?P<b>.+?)\\\]|\$\$(?P<c>[^$]+)\$\$|(?<![\\\w])\$(?P<d>(?:\\[^\n]|[^$\\\n])+?)\$", re.S
)
_BRACE = re.compile(r"\\.|[{}]", re.S)
_BOLD = re.compile(r"\*\*(?P<bold>[^*\n]+)\*\*")
_OPTION = re.compile(r"\(?[A-J]\)?[).:]\s*\S")  # (B) 42
_COLON = re.compile(r"\D*?(?<![-−–])(?<![-−–]\()(?P<pair>\d+\s?:\s?\d+(?:\s?[ap]\.?m\b\.?)?)\D*", re.I)  # 2:15 PM, 3:5
_NUMERIC = re.compile(rf"\d|\\|^(?:{'|'.join(NUMBERS_IN_WORDS)})$", re.I)
# An equation in letters is the answer; of a calculation it is what stands last.
_WORDS_IN_FORMULA = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}|\\(?!theta|alpha|beta|phi)[A-Za-z]+")
_ONE_EQUATION = r"[^=≈,]*[A-Za-z][^=≈,]*=[^=≈,]*"
_EQUATION = re.compile(rf"[^=≈]*[A-Za-z][^=≈]*=[^=≈]*|{_ONE_EQUATION}(?:(?:,|and|or){_ONE_EQUATION})+")
_IN_FORMULAS = {"and", "or", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi", "mod", "to"}
_LAST_WORDS = re.compile(r"(?<=[\dπ)²³])\s*(?!and\b|or\b|to\b)[A-Za-z]{2,}(?:[ /][A-Za-z]+)*(?:[²³]|\^[23])?$")
_EXPRESSION = re.compile(r"[<>≤≥]|(?:\b[A-Za-z]|[)²³⁴π])\s?[-−+*/^]\s?\d")  # x² − 4
_DASH = re.compile(r"(\b[A-Za-z]{2,}) [-−–] (?=\d)")  # a number behind a dash is not below zero
_GLUE = re.compile(r"(?:\\?(?:times|cdot|div)\b|[=≈+×÷*])")


def final_answer(response: str, question: str = "") -> str | None:
    """The text of the final answer in ``response`` (what follows the thinking), or None where it states none clearly.

    The last box counts; boxes that stand together ("$\\boxed{3}$ or $\\boxed{5}$") count together, joined by commas.
    Without a box it is the sentence after "Answer:", else the closing sentence. Numbers of the ``question`` that are
    repeated in that sentence are not taken for the answer when another number stands there.
    """
    if tagged := TAGGED.findall(response):
        response = f"**Answer:** {tagged[-1].strip()}"
    if (boxes := _boxes(response)) and not _is_cut(response):
        return _joined(response, boxes)
    if _BOX.search(response):  # empty or cut off
        return None
    markers = list(_MARKER.finditer(response))
    ending = response[markers[-1].end() :] if markers else _last_line(response)
    if _HEDGE.search(ending) or (not markers and _ITEMS.search(response)):
        return None
    sentences = _SENTENCE_END.split(re.split(r"\n\s*\n", ending.strip(), maxsplit=1)[0])
    return _stated(sentences[0 if markers else -1].strip(), question)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every complete outermost box; a nested box stands for its inner content."""
    first = _BOX.search(text)
    closings = _closings(text, first.start()) if first else {}
    found = []
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if not text.startswith("{", position):
            if token := re.match(r"-?\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z])", text[position : position + 99]):  # \boxed 5
                found.append((match.start(), position + token.end(), token.group()))
            continue
        if (end := closings.get(position)) is None:
            continue
        content = text[position + 1 : end].strip()
        inner = _boxes(content) if content.count("\\boxed") < _MOST_NESTED else []
        if content:
            found.append((match.start(), end + 1, ", ".join(box[2] for box in inner) or content))
        position = end + 1
    return found


def _is_cut(text: str) -> bool:
    """Whether the text ends within its last box."""
    start = [match.end() for match in _BOX.finditer(text)][-1]
    return start == len(text) or (text[start] == "{" and start not in _closings(text, start))


def _closings(text: str, start: int) -> dict[int, int]:
    """Where each brace from ``start`` on is closed, by where it opens; ``\\{`` and ``\\}`` are text."""
    opened: list[int] = []
    found = {}
    for match in _BRACE.finditer(text, start):
        place = match.start()
        if text[place] == "{":
            opened.append(place)
        elif opened and text[place] == "}":
            found[opened.pop()] = place
    return found


def _joined(text: str, boxes: list[tuple[int, int, str]]) -> str:
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : group[0][0]]
        if len(between) > 80 or _CONNECTIVE.search(between):
            break
        group.insert(0, box)
    return ", ".join(dict.fromkeys(content for _, _, content in group))


def _last_line(response: str) -> str:
    """The last line, or the whole of a last paragraph that is one displayed formula."""
    paragraph = re.split(r"\n\s*\n", response.strip())[-1]
    displayed = paragraph.startswith((r"\[", "$$")) and paragraph.endswith((r"\]", "$$"))
    return paragraph if displayed else paragraph.splitlines()[-1] if paragraph else ""


def _stated(sentence: str, question: str) -> str | None:
    """The one quantity or formula that a sentence states, or None where there are several to choose from."""
    if len(sentence) > 600:
        return None
    bold = list(dict.fromkeys(m["bold"].strip(" .:") for m in _BOLD.finditer(sentence) if _NUMERIC.search(m["bold"])))
    if len(bold) == 1 and "=" not in bold[0]:
        sentence = bold[0]
    if _OPTION.match(sentence) and len(sentence) < 80:
        return sentence.strip(" *.")
    if colon := _COLON.fullmatch(sentence):
        return colon["pair"]
    if whole := _whole(sentence):
        return whole
    if (formula := _only_formula(sentence)) and _EQUATION.fullmatch(_WORDS_IN_FORMULA.sub("", formula)):
        return formula
    if several := _assigned(sentence):
        return several
    if "=" in sentence or "≈" in sentence:
        sentence = re.split(r"=|≈|\\approx", sentence)[-1]
    if formula := _only_formula(sentence):
        return formula
    if _EXPRESSION.search(re.sub(r"</?[a-z]+>", "", sentence)):
        return None
    sentence = _DASH.sub(r"\1 ", sentence)
    numbers = {m.group().strip(): m for m in _QUANTITY.finditer(sentence)}
    if not numbers:
        if (words := sentence.strip(" .。*_$()[]")).startswith("\\"):
            return sentence.strip(" .*_$")
        if len(said := [m["bold"] for m in _BOLD.finditer(sentence)]) == 1:
            words = said[0].strip(" .。:")
        return words if 0 < len(words.split()) <= 4 and not _GLUE.search(words) else None
    if len(numbers) == 1:
        return next(iter(numbers))
    if _GLUE.search(sentence):  # a calculation whose result is not stated
        return None
    asked = {re.sub(r"[^\d.]", "", m.group()) for m in _QUANTITY.finditer(question)}
    new = [text for text in numbers if re.sub(r"[^\d.]", "", text) not in asked]
    return new[0] if len(new) == 1 else None


def _assigned(sentence: str) -> str | None:
    """The values in "The solutions are x = 2 and x = 3", where the sentence says nothing else."""
    text = _INLINE.sub(lambda formula: f" {next(group for group in formula.groups() if group)} ", sentence).strip(" *.")
    found = [match.group() for match in _ASSIGNED.finditer(text)]
    return ", ".join(found) if len(found) > 1 and not re.search(r"[\d=≈]", _ASSIGNED.sub("", text)) else None


def _whole(text: str) -> str | None:
    """A short text that is nothing but a quantity with its unit, or a formula without dollars around it."""
    text = text.strip(" *_.")
    if len(text) > 100 or not re.search(r"[\d√π\\]", text) or _INLINE.search(text):
        return None
    tidied = tidy(text)
    if (one := quantity(tidied)) or compound(tidied):
        return text if one is None or one.unit.measures or not one.unit.name else None
    body = _LAST_WORDS.sub("", text)
    words = re.findall(r"[^\W\d_π⁰¹²³⁴⁵⁶⁷⁸⁹₀-₉]{2,}", re.sub(r"\\[A-Za-z]+", "", body))
    if any(word not in _IN_FORMULAS for word in words) or (body != text and not is_unit(text[len(body) :].strip())):
        return None  # words
    return text if _EQUATION.fullmatch(text) or not re.search(r"[=≈]|\bor\b", text) else None


def _only_formula(sentence: str) -> str | None:
    """The content of the only formula, where it says more than a number does and no number stands outside of it."""
    formulas = [next(group for group in match.groups() if group) for match in _INLINE.finditer(sentence)]
    outside = _INLINE.sub(" ", sentence)
    if len(formulas) == 1 and not re.search(r"\d", outside) and len(formulas[0].split()) < 25:
        return formulas[0].strip(" ,;").rstrip(" .,;")
    return None
