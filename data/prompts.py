"""The prompts stage: questions with a stable id, each once, none that a benchmark also asks."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.sources import ReasoningGymSource, Source, records, title

Prompt = dict[str, Any]


def normalise(question: str) -> str:
    """The question as its identity sees it: NFKC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", question).lower().split())


def prompt_id(question: str) -> str:
    """16 hex digits of the normalised question's sha256."""
    return hashlib.sha256(normalise(question).encode()).hexdigest()[:16]


def user_message(row: Prompt, instruction: str | dict[str, str]) -> str:
    """What the model is told: the question, a blank line, and its domain's instruction, if there is one."""
    text = instruction if isinstance(instruction, str) else instruction.get(row["domain"], "")
    return f"{row['question']}\n\n{text}" if text else str(row["question"])


def read_source(source: Source) -> Iterator[tuple[Prompt | None, str]]:
    """Prompt rows of a source, or (None, the reason why a row is none)."""
    if isinstance(source, ReasoningGymSource):
        yield from _generated(source)
        return
    for index, record in enumerate(records(source)):
        if isinstance(record, str):
            yield None, record
            continue
        question = record.get("question", record.get("prompt"))
        if not isinstance(question, str) or not question.strip():
            yield None, "no question"
            continue
        reference = record.get("reference_answer")
        if reference is not None:
            reference = str(reference).rpartition("####")[2].strip()  # GSM8K: the answer follows its working
        yield (
            _prompt(
                source,
                question,
                reference or None,
                verifier=record.get("verifier") or source.verifier,
                domain=record.get("domain") or source.domain,
                source_id=str(record.get("source_id", record.get("id", index))),
                license=record.get("license") or source.license,
            ),
            "",
        )


def _generated(source: ReasoningGymSource) -> Iterator[tuple[Prompt, str]]:
    import reasoning_gym

    for task, settings in source.tasks.items():
        dataset = reasoning_gym.create_dataset(task, size=settings.count, seed=source.seed, **settings.config)
        for index, item in enumerate(dataset):
            row = _prompt(
                source,
                item["question"],
                str(item["answer"]),
                verifier=source.verifier,
                domain=source.domain,
                source_id=f"{task}/{source.seed}/{index}",
                license=source.license,
            )
            yield row, ""


def _prompt(source: Source, question: str, reference: str | None, **columns: str) -> Prompt:
    return {
        "prompt_id": prompt_id(question),
        "question": question.strip(),
        "reference_answer": reference,
        "verifier_args": json.dumps(source.verifier_args, sort_keys=True),
        "source": title(source),
        **columns,
    }


def ngrams(question: str, size: int) -> Iterator[int]:
    """Hashes of the word n-grams of a question."""
    words = re.findall(r"\w+", normalise(question))
    for start in range(len(words) - size + 1):
        yield hash(tuple(words[start : start + size]))


def build(settings: PromptSet, benchmarks: Sequence[Benchmark], out: Path) -> Result:
    """Write the PROMPT table: each question once, and none that shares its id or an n-gram with ``benchmarks``."""
    from r1distill.data.benchmarks import questions

    size = settings.decontaminate.ngram
    held_out = [row["question"] for benchmark in benchmarks for row in questions(benchmark)]
    held_out_ids = {prompt_id(question) for question in held_out}
    held_out_ngrams = {gram for question in held_out for gram in ngrams(question, size)} if size else set()
    seen: set[str] = set()
    rejected: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    read = 0
    with schema.writing(out, schema.PROMPT) as table:
        for source in settings.sources:
            for row, reason in read_source(source):
                read += 1
                if row is None:
                    rejected[reason] += 1
                elif row["prompt_id"] in seen:
                    rejected["duplicate"] += 1
                elif row["prompt_id"] in held_out_ids or (
                    size and not held_out_ngrams.isdisjoint(ngrams(row["question"], size))
                ):
                    rejected["asked by a benchmark"] += 1
                else:
                    seen.add(row["prompt_id"])
                    domains[row["domain"]] += 1
                    table.append(row)
    if not seen:
        raise R1DistillError(f"the prompts '{settings.name}' came out empty: {dict(rejected) or 'no row was read'}.")
    return Result(read, len(seen), dict(rejected), {"domains": dict(domains), "held_out_questions": len(held_out_ids)})
