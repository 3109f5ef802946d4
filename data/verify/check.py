"""What every check returns."""

from __future__ import annotations

from typing import Literal, NamedTuple

Outcome = Literal["pass", "fail", "unverifiable"]


class Finding(NamedTuple):
    """The outcome of one check. ``reason`` is one of a few fixed phrases, so that reasons can be counted;
    ``detail`` holds what differs from trace to trace."""

    outcome: Outcome
    reason: str = ""
    detail: str = ""


def passed(detail: str = "") -> Finding:
    return Finding("pass", "", detail)


def failed(reason: str, detail: str = "") -> Finding:
    return Finding("fail", reason, detail)


def unverifiable(reason: str, detail: str = "") -> Finding:
    return Finding("unverifiable", reason, detail)
