"""Times of day and dates: "2:30 p.m.", "14:30", "noon", "July 4th, 2021", "4 July"."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HALF_DAY = 12 * 60
_CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d{2}))?(?::(\d{2}))?\s*(?:([ap])\.?\s?m\b\.?)?", re.I)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?P<month>jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(?:,?\s+(?P<year>\d{4}))?"
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:the\s+)?"
_DATES = [
    re.compile(f"{_WEEKDAY}{_MONTH}\\s+(?:the\\s+)?{_DAY}{_YEAR}", re.I),
    re.compile(f"{_WEEKDAY}{_DAY}\\s+(?:of\\s+)?{_MONTH}{_YEAR}", re.I),
]


@dataclass(frozen=True)
class Clock:
    """Seconds after midnight, or after twelve where nothing says before or after noon (``sure`` is False)."""

    seconds: int
    sure: bool
    colon: bool


@dataclass(frozen=True)
class Date:
    month: int
    day: int
    year: int | None


def clock(tidied: str) -> Clock | None:
    """Read a time of day; a bare number is none."""
    text = tidied.lower()
    if text in ("noon", "midnight", "12 noon", "12 midnight"):
        return Clock(_HALF_DAY * 60 if "noon" in text else 0, True, False)
    match = _CLOCK.fullmatch(text)
    if match is None or not (match[2] or match[4]):
        return None
    hour, minute, second = int(match[1]), int(match[2] or 0), int(match[3] or 0)
    if hour > (12 if match[4] else 24) or minute > 59 or second > 59:
        return None
    if match[4]:
        hour = hour % 12 + 12 * (match[4] == "p")
    sure = bool(match[4]) or hour > 12 or hour == 0
    return Clock(hour * 3600 + minute * 60 + second, sure, ":" in text)


def date(tidied: str) -> Date | None:
    for pattern in _DATES:
        if match := pattern.fullmatch(tidied.strip()):
            month = _MONTHS.index(match["month"][:3].lower()) + 1
            return Date(month, int(match["day"]), int(match["year"]) if match["year"] else None)
    return None


def compared(wanted: str, found: str) -> bool | str | None:
    """Whether two tidy answers are the same moment, or why that stays open; None where they are not both moments."""
    day, other = date(wanted), date(found)
    if day and other:
        if (day.month, day.day) != (other.month, other.day):
            return False
        return "the answer gives no year" if day.year and not other.year else day.year in (None, other.year)
    time, answer = clock(wanted), clock(found)
    if time and answer:
        if time.sure and answer.sure:
            return time.seconds == answer.seconds
        same = (time.seconds - answer.seconds) % (_HALF_DAY * 60) == 0
        if not same and time.colon and answer.colon and not (time.sure or answer.sure):
            return None  # 2:30 and 1:15 may be ratios
        return same
    return None
