"""Traces that exist already, as rows of the traces table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from r1distill.data import schema, sources
from r1distill.data.errors import R1DistillError
from r1distill.data.prompts import is_unicode, prompt_id
from r1distill.data.result import Result
from r1distill.data.thinking import CLOSE, OPEN, split_thinking
from r1distill.teacher.reply import STATES
from r1distill.teacher.settings import RecordedTeacher


def build(teacher: RecordedTeacher, prompts: Path, out: Path) -> Result:
    """Write the TRACE table: the recorded rows whose question is among the prompts, several answers to one numbered.

    Counts are of recorded rows: kept are those that ended by themselves. Raises R1DistillError where none is of use.
    """
    wanted = set(schema.read(prompts, schema.PROMPT)["prompt_id"].to_pylist())
    answers: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    kept = 0
    with schema.writing(out, schema.TRACE) as table:
        for row in rows(teacher, wanted):
            if isinstance(row, str):
                rejected[row] += 1
                continue
            answers[row["prompt_id"]] += 1
            kept += row["state"] == "done"
            rejected[row["state"]] += row["state"] != "done"
            table.append(row)
    if not answers:
        raise R1DistillError(
            f"{sources.title(teacher.source)} answers none of these prompts: {dict(rejected) or 'it has no rows'}. "
            "Expected columns question or prompt, and completion or reasoning and response; see 'source.columns'."
        )
    metrics = {"prompts_without_a_trace": len(wanted) - len(answers), "completion_tokens": None}
    return Result(kept + rejected.total(), kept, dict(+rejected), metrics)


def rows(teacher: RecordedTeacher, wanted: Collection[str]) -> Iterator[dict[str, Any] | str]:
    """TRACE rows of the recorded answers to the ``wanted`` prompt ids, numbered; or why a recorded row gives none."""
    revision = teacher.revision or sources.revision(teacher.source)
    answers: Counter[str] = Counter()
    for record in sources.records(teacher.source):
        if isinstance(record, str):
            yield record
            continue
        question: Any = record.get("question", record.get("prompt"))
        if reason := _damage(record, question):
            yield reason
            continue
        key = prompt_id(question)
        if key not in wanted:
            yield "its question is not among the prompts"
            continue
        yield _row(teacher, revision, key, answers[key], question, record)
        answers[key] += 1


def _damage(record: dict[str, Any], question: Any) -> str:
    """Why a recorded row can't be used, or ""."""
    if not isinstance(question, str) or not question.strip():
        return "no question"
    texts = [record.get(name) for name in ("prompt", "completion", "reasoning", "response", "finish_reason")]
    if wrong := [text for text in texts if not isinstance(text, str | None)]:
        return f"{type(wrong[0]).__name__} where text belongs"
    return "" if all(is_unicode(text) for text in (question, *texts) if text) else "unreadable: not Unicode"


def _row(
    teacher: RecordedTeacher, revision: str, key: str, sample: int, question: str, record: dict[str, Any]
) -> dict[str, Any]:
    completion, reasoning, response = _parts(record, teacher.opens_thinking)
    finish_reason = record.get("finish_reason")
    state = STATES.get(finish_reason or "stop", "failed") if completion else "failed"
    counts = {name: record.get(name) for name in ("prompt_tokens", "reasoning_tokens", "completion_tokens")}
    return {
        "prompt_id": key,
        "sample": sample,
        "teacher": teacher.model,
        "teacher_revision": revision,
        "sampling": json.dumps({}),
        "request_text": json.dumps([{"role": "user", "content": record.get("prompt") or question}], ensure_ascii=False),
        "completion": completion or None,
        "reasoning": reasoning,
        "response": response,
        "finish_reason": finish_reason,
        "state": state,
        "error": None if state != "failed" else "an empty completion" if not completion else f"ended: {finish_reason}",
        **{name: count if type(count) is int and 0 <= count < 2**63 else None for name, count in counts.items()},
        "seconds": None,
        "cost_usd": None,
        "created_at": None,
    }


def _parts(record: dict[str, Any], opens_thinking: bool) -> tuple[str, str | None, str]:
    """Completion, reasoning and response: recorded in one piece, or apart."""

    completion, reasoning, response = (record.get(name) or "" for name in ("completion", "reasoning", "response"))
    if completion:
        return completion, *split_thinking(completion, opened=opens_thinking)
    if reasoning:
        return f"{OPEN}{reasoning}{CLOSE}{response}", reasoning.strip(), response.strip()
    return response, *split_thinking(response, opened=opens_thinking)
