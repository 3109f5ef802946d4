"""The prompts stage: questions with a stable id, each once, none that a benchmark also asks."""

from __future__ import annotations

import hashlib
import json
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.sources import FileSource, HubSource, ReasoningGymSource, Source, records, title

if TYPE_CHECKING:
    from r1distill.data.decontaminate import HeldOut

Prompt = dict[str, Any]

_GENERATED = "reasoning-gym"  # the rows' source
_CONTAMINATED = {"same question": "asked by a benchmark", "reworded": "rewords a benchmark's question"}


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
        yield (None, record) if isinstance(record, str) else prompt_of(source, index, record)


def prompt_of(source: FileSource | HubSource, index: int, record: dict[str, Any]) -> tuple[Prompt | None, str]:
    """The prompt row of a source's record, or (None, the reason why it is none)."""
    question = record.get("question", record.get("prompt"))
    if not isinstance(question, str) or not question.strip():
        return None, "no question"
    reference = record.get("reference_answer")
    arguments = _arguments(source, record.get("verifier_args"))
    if arguments is None:
        return None, "verifier_args is no JSON object"
    source_id = str(record.get("source_id", record.get("id", index)))
    columns = {name: record.get(name) or getattr(source, name) for name in ("verifier", "domain", "license")}
    if wrong := [name for name, value in columns.items() if not isinstance(value, str)]:
        return None, f"{wrong[0]} is {type(columns[wrong[0]]).__name__}, expected text"
    if isinstance(reference, list | dict):
        return None, f"reference_answer is {type(reference).__name__}, expected text or a number"
    if not is_unicode(f"{question}{reference}{arguments}{source_id}{''.join(columns.values())}"):
        return None, "unreadable: not Unicode"
    if reference is not None:
        reference = str(reference).rpartition("####")[2].strip()  # GSM8K: the answer follows its working
    return _prompt(source, question, reference or None, arguments, source_id=source_id, **columns), ""


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written; half a surrogate pair, which JSON can hold, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _generated(source: ReasoningGymSource) -> Iterator[tuple[Prompt, str]]:
    import reasoning_gym

    from r1distill.data.verify import gym

    scored = source.verifier == "reasoning_gym"
    for task, settings in source.tasks.items():
        dataset = reasoning_gym.create_dataset(task, size=settings.count, seed=source.seed, **settings.config)
        for index, item in enumerate(dataset):
            row = _prompt(
                source,
                item["question"],
                None if item["answer"] is None else str(item["answer"]),
                gym.arguments(task, item) if scored else json.dumps(source.verifier_args, sort_keys=True),
                verifier=source.verifier,
                domain=source.domain,
                source_id=f"{task}/{source.seed}/{index}",
                license=source.license,
            )
            yield row, ""


def _arguments(source: Source, own: Any) -> str | None:
    """The source's ``verifier_args`` and over them the row's own (an object, or JSON of one); None if it is neither."""
    try:
        own = json.loads(own) if isinstance(own, str) else own or {}
        return json.dumps({**source.verifier_args, **own}, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return None


def _prompt(source: Source, question: str, reference: str | None, arguments: str, **columns: str) -> Prompt:
    return {
        "prompt_id": prompt_id(question),
        "question": question.strip(),
        "reference_answer": reference,
        "verifier_args": arguments,
        "source": title(source),
        **columns,
    }


def build(settings: PromptSet, benchmarks: Sequence[Benchmark], out: Path) -> Result:
    """Write the PROMPT table: each question once, none that ``benchmarks`` ask too; REJECTED_PROMPT in ``rejected``.

    Memory: the ids that were seen, about 100 bytes a prompt, the benchmarks' index, and what ``near_duplicates`` says.
    """
    from r1distill.data.benchmarks import questions
    from r1distill.data.decontaminate import HeldOut, Question

    asked = [
        Question(benchmark.name, row["source_id"], row["question"])
        for benchmark in benchmarks
        for row in questions(benchmark)
    ]
    apart = settings.decontaminate
    held_out = HeldOut(asked, apart.ngram, apart.reworded if apart.ngram else None)
    counts = _Counts()
    near = settings.near_duplicates
    distinct = out / "distinct" if near else out
    with schema.writing(out / "rejected", schema.REJECTED_PROMPT) as rejected:
        with schema.writing(distinct, schema.PROMPT) as table:
            for row in _apart(_once(settings.sources, counts, rejected), held_out, counts, rejected):
                table.append(row)
                counts.domains[row["domain"]] += 1
        if near:
            _drop_near_duplicates(distinct, near.threshold, out, counts, rejected)
            shutil.rmtree(distinct)
    kept = counts.domains.total()
    if not kept:
        reasons = dict(counts.rejected) or "no row was read"
        raise R1DistillError(f"the prompts '{settings.name}' came out empty: {reasons}.")
    metrics = {
        "domains": dict(counts.domains),
        "held_out_questions": len(asked),
        "contaminated": {name: dict(methods) for name, methods in counts.contaminated.items()},
    }
    return Result(counts.read, kept, dict(counts.rejected), metrics)


@dataclass
class _Counts:
    """Where the rows went."""

    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)  # of those kept
    contaminated: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # benchmark: method


def _once(sources: Sequence[Source], counts: _Counts, rejected: schema.TableWriter) -> Iterator[Prompt]:
    """The sources' prompts, each question once."""
    seen: set[str] = set()
    for source in sources:
        for row, reason in read_source(source):
            counts.read += 1
            if row is None:
                counts.rejected[reason] += 1
            elif row["prompt_id"] in seen:
                counts.rejected["duplicate"] += 1
                rejected.append(_rejection(row, "duplicate", "prompts", row["prompt_id"], row["question"], 1.0))
            else:
                seen.add(row["prompt_id"])
                yield row


def _apart(
    rows: Iterable[Prompt], held_out: HeldOut, counts: _Counts, rejected: schema.TableWriter
) -> Iterator[Prompt]:
    """Those that no benchmark asks."""
    from r1distill.data.words import batches

    for batch in batches(rows, size=lambda row: len(row["question"])):
        for row, match in zip(batch, held_out.matches([row["question"] for row in batch]), strict=True):
            if match is None:
                yield row
                continue
            reason = _CONTAMINATED.get(match.method, f"shares a {match.method} with a benchmark")
            counts.rejected[reason] += 1
            counts.contaminated[match.benchmark][match.method] += 1
            rejected.append(_rejection(row, reason, match.benchmark, match.question_id, match.text, match.score))


def _drop_near_duplicates(
    distinct: Path, threshold: float, out: Path, counts: _Counts, rejected: schema.TableWriter
) -> None:
    """Copy the table in ``distinct`` to ``out`` without near-duplicates.

    Generated questions come from templates, and their seed makes them different: they are never near-duplicates.
    """
    from r1distill.data.dedup import near_duplicates

    prompts = schema.read(distinct, schema.PROMPT)
    texts = (
        "" if row["source"] == _GENERATED else row["question"] for row in schema.rows(prompts, ["source", "question"])
    )
    _, pairs = near_duplicates(texts, threshold, scratch=out)
    like = {pair.text: pair for pair in pairs}
    with schema.writing(out, schema.PROMPT) as table:
        for place, row in enumerate(schema.rows(prompts)):
            pair = like.get(place)
            if pair is None:
                table.append(row)
                continue
            kept_id, kept_question = (prompts[name][pair.kept].as_py() for name in ("prompt_id", "question"))
            counts.rejected["near duplicate"] += 1
            counts.domains[row["domain"]] -= 1
            rejected.append(_rejection(row, "near duplicate", "prompts", kept_id, kept_question, pair.similarity))


def _rejection(row: Prompt, reason: str, against: str, matched_id: str, matched_text: str, score: float) -> Prompt:
    return {
        **{column: row[column] for column in ("prompt_id", "question", "source", "source_id")},
        "reason": reason,
        "against": against,
        "matched_id": matched_id,
        "matched_text": matched_text,
        "score": score,
    }
