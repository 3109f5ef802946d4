"""Agreement: whether the thinking ends on the answer that the response gives.

Only a clear contradiction fails: most thinking states no answer that could be read without doubt.
"""

from __future__ import annotations

import re

from r1distill.data.verify import math
from r1distill.data.verify.answers import final_answer
from r1distill.data.verify.check import Finding, failed, passed

VERSION = f"agreement 1, {math.VERSION}"
_TAIL_CHARACTERS = 400
_BOXED_CHARACTERS = 4000
_SAID = re.compile(
    r"\banswer\s*(?:is|should be|would be|must be|:|=)[\s*]*(\\?\$?-?\d[\d,]*(?:\.\d+)?(?:/\d+)?)(?![\w^])", re.I
)


def examine(reasoning: str | None, response: str, question: str = "") -> Finding:
    """Hold the thinking's last box, or else a last "the answer is NUMBER" near its end, against the final answer.

    May hang, as ``math.examine`` may.
    """
    thought = _last_answer(reasoning or "", question)
    if thought is None:
        return passed("the thinking states no answer")
    finding = math.examine(response, thought, question)
    if finding.outcome == "fail" and finding.reason == "wrong answer":
        return failed("the thinking ends on another answer", finding.detail.replace("reference", "thinking"))
    return passed(finding.reason or finding.detail)


def _last_answer(reasoning: str, question: str) -> str | None:
    if "\\boxed" in reasoning:
        return (
            final_answer(reasoning[-_BOXED_CHARACTERS:], question)
            if "\\boxed" in reasoning[-_BOXED_CHARACTERS:]
            else None
        )
    said = _SAID.findall(reasoning[-_TAIL_CHARACTERS:])
    return said[-1] if said else None
