"""The filters of form: what makes a trace unfit for training whatever its answer.

The R1 paper (arXiv 2501.12948) drops thinking with mixed languages, long paragraphs or code blocks and publishes no
thresholds; the defaults here were chosen on 1,036 recorded R1 outputs. Every check runs in time linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

from r1distill.data.config import Settings
from r1distill.data.thinking import CLOSE, OPEN
from r1distill.data.verify.check import Finding, failed, passed

VERSION = "filters 1"


class FilterSettings(Settings):
    """Thresholds of the filters."""

    code_in_thinking: bool = False  # a fenced block in the thinking is allowed in the code domain alone
    max_paragraph_characters: int = 8000  # the longest of 1,036 recorded ones has under 3,000
    max_repeated_share: float = 0.4  # of the 16-grams in any window of 512 words; the recorded ones reach 0.2
    max_foreign_words: int = 0  # words of a script that neither the question nor mathematics uses
    min_target_share: float = 0.5  # of the thinking's words that are in the question's script


_ERROR_TEXT = re.compile(
    r"\W*(?:error (?:after \d+|code|\d{3})|api error|error\W+message|internal server error|bad gateway|"
    r"gateway time-?out|service unavailable|too many requests|rate limit|request timed out|"
    r"connection (?:error|reset|refused)|traceback \(most recent|<!doctype html|<html|"
    r"upstream (?:connect|request)|expecting value: line \d+)",
    re.I,
)
_REFUSAL = re.compile(
    r"\W*(?:(?:i['’]m |i am )?(?:very |really |so )?sorry\b.{0,40}?\b(?:can['’]?t|cannot|can not|unable|not able|"
    r"beyond my)|i (?:can['’]t|cannot|can not|won['’]t|am unable to|am not able to|['’]m (?:unable|not able) to) "
    r"(?:help|assist|answer|provide|comply|fulfill|continue|discuss|engage|do that)|"
    r"as an ai\b.{0,60}\b(?:can['’]t|cannot|unable))",
    re.I | re.S,
)
_LONGEST_REFUSAL_CHARACTERS = 600


def form(completion: str, reasoning: str | None, response: str, domain: str, settings: FilterSettings) -> Finding:
    """Thinking, closed once, then a response, and neither of them an error or a refusal.

    ``reasoning`` is None where no thinking was found. The opening tag may be missing: R1's prompt ends with it.
    """
    if _ERROR_TEXT.match(completion[:400]) or _ERROR_TEXT.match(response[:400]):
        return failed("an API error instead of an answer", (response or completion)[:100])
    if reasoning is None or _unclosed(completion, reasoning, response):
        return failed("no </think>")
    body = completion.lstrip().removeprefix(OPEN)
    if OPEN in reasoning + response or OPEN in body or CLOSE in reasoning + response or body.count(CLOSE) > 1:
        return failed("a <think> or </think> too many")
    if not reasoning.strip():
        return failed("the thinking is empty")
    if not response.strip():
        return failed("the response is empty")
    if len(response) <= _LONGEST_REFUSAL_CHARACTERS and _REFUSAL.match(response):
        return failed("a refusal", response[:100])
    if "```" in reasoning and not (settings.code_in_thinking or domain == "code"):
        return failed("a code block in the thinking")
    if len(reasoning) > settings.max_paragraph_characters:
        longest = max(len(paragraph) for paragraph in re.split(r"\n\s*\n", reasoning))
        if longest > settings.max_paragraph_characters:
            return failed("a paragraph of the thinking is too long", f"{longest} characters")
    return passed()


def _unclosed(completion: str, reasoning: str, response: str) -> bool:
    """Raw text holds the tag; a server's reasoning parser takes it out and gives the two parts."""
    return CLOSE not in completion and not (response and reasoning and completion.strip() != reasoning.strip())


def truncation(completion: str, reasoning: str | None, response: str, finish_reason: str | None, state: str) -> Finding:
    """Whether the text ended by itself: by the server's word where there is one, else by what is missing."""
    if state == "truncated" or finish_reason == "length":
        return failed("the token limit was reached")
    if finish_reason not in (None, "", "stop", "eos", "end_turn"):
        return failed("the server cut the text off", finish_reason or "")
    if reasoning is None or (CLOSE not in completion and not response.strip()):
        return failed("the thinking never ends")
    if not response.strip():
        return failed("nothing follows the thinking")
    if not finish_reason and (where := _open_end(response)):
        return failed("the response breaks off", where)
    return passed()


def _open_end(response: str) -> str:
    """What is still open at the end of a response, or "": a display formula, a box, a code fence."""
    if response.count("```") % 2:
        return "inside a code block"
    tail = response[-2000:]
    if tail.rfind(r"\[") > tail.rfind(r"\]") or tail.rfind(r"\(") > tail.rfind(r"\)"):
        return "inside a formula"
    box = tail.rfind(r"\boxed{")
    return "inside a box" if box >= 0 and tail.count("{", box) > tail.count("}", box) else ""


_WINDOW_WORDS, _GRAM_WORDS, _FEWEST_GRAMS = 512, 16, 64


def repetition(text: str, settings: FilterSettings) -> Finding:
    """The largest share of 16-grams that occurred before, over windows of 512 words (half a window apart).

    A word is a run of letters, digits and underscores, or any other mark.
    """
    import numpy as np

    from r1distill.data import words

    grams = words.grams(words.tokens(text), _GRAM_WORDS)
    ordered = np.sort(grams)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    before = np.full(len(grams), -1)  # where each 16-gram stood last
    if len(again):
        places = np.flatnonzero(np.isin(grams, again))
        places = places[np.argsort(grams[places], kind="stable")]
        same = grams[places[1:]] == grams[places[:-1]]
        before[places[1:][same]] = places[:-1][same]
    share, where = 0.0, 0
    last = max(1, len(grams) + _GRAM_WORDS - 1 - _WINDOW_WORDS // 2) if len(again) else 0
    for start in range(0, last, _WINDOW_WORDS // 2):
        window = before[start : start + _WINDOW_WORDS - _GRAM_WORDS + 1]
        if len(window) <= _FEWEST_GRAMS:
            continue
        found = 1 - np.count_nonzero(window < start) / len(window)
        if found > share:
            share, where = found, start
    detail = f"{share:.0%} of the 16-grams after word {where}"
    return failed("it repeats itself", detail) if share > settings.max_repeated_share else passed(detail)


# Scripts of prose. Greek and letter-like symbols are mathematics in any language.
_SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "HEBREW", "THAI", "DEVANAGARI")
_EAST_ASIAN = {"CJK": "han", "HIRAGANA": "kana", "KATAKANA": "kana"}
_LATEX = re.compile(r"\\[A-Za-z]+|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.S)
_WORD = re.compile(r"[^\W\d_]+")
_ASCII = re.compile(r"[\x00-\x7f]+")
_PLAIN = re.compile(r"[^\\$]*?[A-Za-z]{2}")  # a word that stands before any LaTeX


def language(question: str, text: str, settings: FilterSettings) -> Finding:
    """The paper's language score: words of the question's script over all words; and any word of a third script.

    Each Han or Kana letter counts as a word, of other scripts a run of two letters or more. A script that the question
    itself uses is at home; so is Latin everywhere, up to the share that is left to it.
    """
    asked, said = _scripts(question), _scripts(text)
    if not said:
        return passed("no words")
    target = max(asked, key=lambda script: asked[script]) if asked else max(said, key=lambda script: said[script])
    home = {target, "latin", *asked} | ({"han", "kana"} if "kana" in asked else set())
    foreign = {script: count for script, count in said.items() if script not in home}
    share = sum(said[script] for script in home - ({"latin"} - {target})) / said.total()
    detail = f"{share:.1%} in the question's script ({target})"
    if sum(foreign.values()) > settings.max_foreign_words:
        return failed("mixed languages", f"{detail}; {', '.join(f'{n} {script}' for script, n in foreign.items())}")
    if share < settings.min_target_share:
        return failed("another language than the question's", detail)
    return passed(detail)


def _scripts(text: str) -> Counter[str]:
    """How many words of each script a text has; of Latin 1 where no other is there, as then the count says nothing."""
    others = {_script(letter) for letter in set(_ASCII.sub("", text))} - {None, "latin"}
    if not others and _PLAIN.match(text):
        return Counter(latin=1)
    counts: Counter[str] = Counter()
    for word in _WORD.findall(_LATEX.sub(" ", text)):
        if word.isascii():
            counts["latin"] += len(word) > 1
            continue
        kinds = Counter(kind for letter in word if (kind := _script(letter)))
        for kind, letters in kinds.items():
            counts[kind] += letters if kind in ("han", "kana") else letters > 1
    return +counts


@lru_cache(maxsize=4096)
def _script(letter: str) -> str | None:
    name = unicodedata.name(letter, "").split(" ", 1)[0]
    return _EAST_ASIAN.get(name, name.lower()) if name in _SCRIPTS else None
