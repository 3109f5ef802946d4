"""Correctness of multiple choice: the letter that a response settles on, or the choice whose text it gives instead.

GPQA asks for a last line "ANSWER: C"; others box a letter or say "The answer is (B)". A response that settles on
several letters has settled on none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from r1distill.data.verify.answers import TAGGED
from r1distill.data.verify.check import Finding, failed, passed, unverifiable

VERSION = "choice 2"
LETTERS = "ABCDEFGHIJ"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER_LINE = re.compile(
    r"^[\W_]{0,20}(?:(?:the|my|so|therefore|thus|hence)[ ,]+)*(?:final |correct |best |right )*"
    r"(?:answer|choice|option)[\s*_]*[:：](?P<said>.*)$",
    re.I | re.M,
)
_SAYS = r"\b(?:answer|choice|option)s?(?: here| to (?:the|this) question)? (?:is|are|(?:would|should|must) be)\b"
_SENTENCE = re.compile(
    rf"{_SAYS}[\s*_]*[:：]?(?P<said>(?:(?!{_SAYS})[^\n])*)"
    r"|\b(?:i|we) (?:would )?(?:choose|pick|select)(?P<picked>[^\n]*)"
    r"|(?:^|[.,;:!] +)(?P<subject>[*_]{0,3}(?:option|choice|answer)? ?\(?[*_]{0,3}[A-J][*_]{0,3}\)?[*_]{0,3}) is "
    r"(?:the )?(?:correct|right|best)\b"
    r"|(?:(?:答案|选项)[ *]*(?:应?[是为选]|[:：])|(?<![不未能])(?:故选|应选|因此选|所以选|，选))[ :：*]*"
    r"(?P<chosen>[^\n]*)",
    re.I | re.M,
)
_SEVERAL = re.compile(r"A?B?C?D?E?F?G?H?I?J?")  # "ACD"
_BOLD = re.compile(r"\*\*(?P<said>[^*\n]+)\*\*")
_WORD = r"(?:(?:option|choice|answer|letter)s?\s*)?"
# A letter, and behind it what can follow one: nothing, punctuation, a reason. "A force of 5 N" names no choice.
_NAMED = re.compile(
    rf"{_WORD}(?:[(\[](?P<round>[A-J])[)\]](?P<after>.*)|(?P<bare>[A-J])(?P<rest>$|\s?[).:].*|[,;—–-].*|"
    r"\s+(?:because|since|as|which|with|and|or|\(|[—–-]|&).*|\s*[=→].*))",
    re.I | re.S,
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_LATEX = re.compile(r"\\[ ,;:!()\[\]]|[~$]")
_BARE = re.compile(rf"{_WORD}[(\[]?[A-J][)\]]?", re.I)
_BARE_START = re.compile(r"^[(\[]?[A-J][)\].:]+\s*")
# A further letter; in lower case it stands at the end, where it is no article.
_MORE = re.compile(
    rf"^[\s;)]*,?\s*(?:and|or|&|,|/)\s*{_WORD}\(?(?:((?-i:[A-J]))\)?(?=$|[\s,.;)&/])|([a-j])\)?$)(?! is\b)", re.I
)
_LISTED = re.compile(r"^[ \t]*\(?(?P<letter>[A-J])[).:][ \t]+(?P<text>\S[^\n]*)$", re.M)


def examine(response: str, reference: str, question: str = "", choices: Sequence[str] | None = None) -> Finding:
    """Judge the choice that ``response`` (what follows the thinking) names against ``reference``: a letter, several, or
    the text of a choice. ``choices`` are their texts in order; without them they are looked for in the ``question``."""
    if not response.strip():
        return failed("no response after the thinking")
    texts = _texts(question, choices)
    wanted = _letters(_clean(reference), texts)
    if not wanted:
        return unverifiable("the reference names no choice", _short(reference))
    said = _statements(response, texts)
    found = [letters for one in said if (letters := _letters(_clean(one), texts))]
    if not found:
        return unverifiable("the answer names no choice", _short(said[-1]) if said else "")
    detail = f"answer {' / '.join(dict.fromkeys(map(_joined, found)))}, reference {_joined(wanted)}"
    if any(letters != found[0] for letters in found):
        return unverifiable("the response settles on several choices", detail)
    if found[0] == wanted:
        return passed(detail)
    if len(wanted) == 1 < len(found[0]):
        return unverifiable("the response settles on several choices", detail)
    return failed("wrong answer", detail)


def letters_of(response: str, question: str = "", choices: Sequence[str] | None = None) -> str | None:
    """The letters that a response settles on ("B", "A, C"); None where it settles on none, or on several."""
    texts = _texts(question, choices)
    found = {letters for one in _statements(response, texts) if (letters := _letters(_clean(one), texts))}
    return _joined(found.pop()) if len(found) == 1 else None


def _texts(question: str, choices: Sequence[str] | None) -> list[str]:
    """The choices' texts as they are compared: those given, or those that the question lists."""
    return [_plain(text) for text in (choices if choices is not None else _choices_in(question))][: len(LETTERS)]


def _statements(response: str, texts: list[str]) -> list[str]:
    """What the response says its answer is, from the strongest way of saying it that it uses: boxes and answer lines,
    else sentences such as "The answer is (B)", else a choice alone, in bold in its last paragraph or as its last line.
    """
    boxes = [content for match in _BOX.finditer(response) if (content := _until_brace(response, match.end())).strip()]
    lines = [match["said"] for match in _ANSWER_LINE.finditer(response) if not _BOX.search(match["said"])]
    if strong := [*boxes, *TAGGED.findall(response), *(line for line in lines if _clean(line))]:
        return strong
    if sentences := [
        match["said"] or match["picked"] or match["subject"] or match["chosen"] or ""
        for match in _SENTENCE.finditer(response)
    ]:
        return sentences
    paragraph = re.split(r"\n\s*\n", response.strip())[-1]
    for bare in ([match["said"] for match in _BOLD.finditer(paragraph)], paragraph.splitlines()[-1:]):
        if named := [
            one for one in bare if _BARE.fullmatch(_clean(one)) or _plain(_BARE_START.sub("", _clean(one))) in texts
        ]:
            return named
    return []


def _letters(said: str, texts: list[str]) -> frozenset[str]:
    """The letters that a statement names, by themselves or by a choice's text; empty where it names none."""
    place = [number for number, text in enumerate(texts) if text and text == _plain(said)]
    if len(place) == 1 and not re.fullmatch(r"[A-Ja-j]", said):
        return frozenset(LETTERS[place[0]])
    if len(said) > 1 and _SEVERAL.fullmatch(said):
        return frozenset(said)
    match = _NAMED.fullmatch(said)
    if match is None:
        return frozenset()
    letters = {match["round"] or match["bare"]}
    rest = match["after"] if match["round"] else match["rest"].lstrip(").")
    while more := _MORE.match(rest):
        letters.add(more[1] or more[2])
        rest = rest[more.end() :]
    return frozenset(letter.upper() for letter in letters)


def _clean(text: str) -> str:
    """A statement without its dressing: Markdown, LaTeX, quotes, the full stop."""
    text = _LATEX.sub(" ", _WRAPPED.sub(r" \1 ", re.sub(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}", "", text)))
    return re.sub(r"\s+", " ", text).strip("\"'“”‘’ ").rstrip(".!。 ")


def _plain(text: str) -> str:
    """A choice's text as it is compared."""
    return _clean(str(text)).casefold()


def _choices_in(question: str) -> list[str]:
    """The texts of the choices that a question lists line by line, from A on; [] where it lists none."""
    texts: list[str] = []
    for match in _LISTED.finditer(question):
        if match["letter"] == "A":
            texts = []
        if match["letter"] == LETTERS[len(texts) : len(texts) + 1]:
            texts.append(match["text"])
    return texts if len(texts) > 1 else []


def _until_brace(text: str, start: int) -> str:
    """What stands between the brace before ``start`` and the one that closes it; "" where none does."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start : match.start()]
    return ""


def _joined(letters: frozenset[str]) -> str:
    return ", ".join(sorted(letters))


def _short(text: str, limit: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[:limit]}…"
