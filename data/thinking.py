"""Where a completion's thinking ends and its response begins."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def split_thinking(completion: str, *, opened: bool = False) -> tuple[str | None, str]:
    """Split a completion into (thinking, response) at the first ``</think>``.

    The opening tag may be missing: since February 2025 R1's own generation prompt ends with it (``opened``). A thinking
    that was opened and never closed leaves no response: (thinking, ""). With neither tag it is all response:
    (None, completion).
    """
    head, closed, tail = completion.partition(CLOSE)
    head = head.lstrip()
    opened = opened or head.startswith(OPEN)
    thinking = head.removeprefix(OPEN).strip()
    if closed:
        return thinking, tail.strip()
    return (thinking, "") if opened else (None, completion.strip())
