"""Benchmarks: their held-out questions, and what a model is asked of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1distill.data.config import nearest
from r1distill.data.errors import RequestError
from r1distill.data.prompts import normalise, prompt_of, read_source, user_message
from r1distill.data.settings import Benchmark, Choices, LiveCodeBench
from r1distill.data.sources import HubSource, ReasoningGymSource, records, title
from r1distill.data.verify.choice import LETTERS

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A question as a row of the prompts table, the message that asks it, and how hard its source calls it."""

    row: Row
    message: str
    difficulty: str | None


def questions(benchmark: Benchmark) -> list[Row]:
    """The benchmark's questions as prompt rows, each once, in the source's order; raises where there is none."""
    return [one.row for one in asked(benchmark)]


def asked(benchmark: Benchmark) -> list[Question]:
    """The benchmark's questions and how they are put; raises RequestError where there is none to be read."""
    found: dict[str, Question] = {}
    unread: Counter[str] = Counter()
    for one in _read(benchmark):
        if isinstance(one, str):
            unread[one] += 1
        else:
            found.setdefault(one.row["prompt_id"], one)
    if not found:
        why = ", ".join(f"{count} rows: {reason}" for reason, count in unread.most_common(3)) or "it has no row"
        raise RequestError(
            f"the benchmark '{benchmark.name}' has no readable question ({why}). Check its 'source' and 'layout'."
        )
    return list(found.values())[: benchmark.limit]


def _read(benchmark: Benchmark) -> Iterator[Question | str]:
    """Questions, or why a row of the source is none."""
    source, layout = benchmark.source, benchmark.layout
    if isinstance(source, ReasoningGymSource):
        for row, reason in read_source(source):
            if row is None:
                yield reason
            else:
                task = row["source_id"].partition("/")[0]
                yield Question(row, user_message(row, benchmark.instruction), task)
        return
    if isinstance(layout, LiveCodeBench) and isinstance(source, HubSource) and not source.files:
        source = source.model_copy(update={"files": tuple(release_files(layout.release))})
    for index, record in enumerate(records(source)):
        if isinstance(record, str):
            yield record
            continue
        laid_out: tuple[Row, str] | str = record, ""
        if isinstance(layout, Choices):
            laid_out = _choices(layout, record, title(source))
        elif isinstance(layout, LiveCodeBench):
            laid_out = _problem(layout, record)
        if isinstance(laid_out, str):
            yield laid_out
            continue
        row, reason = prompt_of(source, index, laid_out[0])
        hard = record.get(benchmark.difficulty) if benchmark.difficulty else None
        message = row and (laid_out[1] or user_message(row, benchmark.instruction))
        yield Question(row, message, None if hard is None else str(hard)) if row and message else reason


def _choices(layout: Choices, record: Row, source: str) -> tuple[Row, str] | str:
    """The record with its letter as reference, and the prompt.

    The order is that of sha256 over seed, question and choice: it depends on nothing else, whatever Python draws.
    """
    columns = (layout.right, *layout.wrong)
    if missing := [name for name in columns if name not in record]:
        raise RequestError(f"{source} has no column '{missing[0]}'.{nearest(missing[0], list(record))}")
    texts = [record[name] for name in columns]
    question = record.get("question")
    if not isinstance(question, str) or not all(isinstance(text, str) and text.strip() for text in texts):
        return "a choice or the question is empty"
    texts = [text.strip() for text in texts]

    def place(number: int) -> str:
        return hashlib.sha256(f"{layout.seed}\0{normalise(question)}\0{texts[number]}".encode()).hexdigest()

    order = sorted(range(len(texts)), key=place)
    shuffled = [texts[number] for number in order]
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, shuffled, strict=False))
    prompt = _filled(layout.prompt, question=question.strip(), choices=listed)
    answer = {"reference_answer": LETTERS[order.index(0)], "verifier": "choice"}
    return {**record, **answer, "verifier_args": {"choices": shuffled}}, prompt


def release_files(release: int) -> list[str]:
    """The files of a release, each of which adds to the one before."""
    return ["test.jsonl", *(f"test{number}.jsonl" for number in range(2, release + 1))]


def _problem(layout: LiveCodeBench, record: Row) -> tuple[Row, str] | str:
    """The record with its tests as the code verifier takes them, and the prompt. The tests stay packed until they are
    run: those of a window would fill a machine's memory."""
    try:
        day, question = str(record["contest_date"])[:10], record["question"].strip()
        function = json.loads(record.get("metadata") or "{}").get("func_name")
        tests = {"public": record["public_test_cases"], "private": record["private_test_cases"]}
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        return f"not a row of LiveCodeBench ({type(error).__name__})"
    if not layout.first <= day <= layout.last:
        return "outside the window of contest dates"
    starter = (record.get("starter_code") or "").rstrip()
    prompt = _filled(layout.starter if starter else layout.stdin, question=question, starter=starter)
    arguments = {"kind": "livecodebench", "function": function, **tests}
    return {**record, "verifier": "code", "verifier_args": arguments}, prompt


def _filled(template: str, **texts: str) -> str:
    """The template with its {names} replaced once; braces in the texts stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda match: texts.get(match[1], match[0]), template).strip()
