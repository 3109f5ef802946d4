"""Scores: every model served in the runtime its users have, sampled alike, judged by the same verifiers.

Accuracy is the mean over k samples a question, with a bootstrap 95% interval over questions. A truncated, refused or
unreadable answer is wrong, and counted as what it is. The ledger keeps every answer, so a killed evaluation asks
nothing twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1distill.data import models, verdicts
from r1distill.data.benchmarks import questions
from r1distill.data.prompts import user_message
from r1distill.data.result import Result
from r1distill.data.settings import Benchmark
from r1distill.pipeline.gates import held, variant
from r1distill.pipeline.run import Run
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.serve import LlamaSpec, VllmSpec, in_turn, spec_of
from r1distill.teacher.settings import Client, EndpointTeacher, RecordedTeacher, Sampling

BOOTSTRAPS = 2000
PLAIN_TEMPLATE = "{{ messages[-1]['content'] }}\n"  # for base models that have no chat template

ANSWER = pa.schema(
    [
        ("model", pa.string()),
        ("benchmark", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int64()),
        ("completion", pa.string()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("completion_tokens", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Contender:
    """A model to be scored: how to serve it, which revision it is, and how many questions it gets (None: all)."""

    name: str
    spec: VllmSpec | LlamaSpec | EndpointTeacher
    revision: str
    size_bytes: int | None
    opens_thinking: bool
    limit: int | None = None

    @property
    def runtime(self) -> str:
        return {VllmSpec: "vllm", LlamaSpec: "llama.cpp", EndpointTeacher: "endpoint"}[type(self.spec)]


def build(run: Run, checkpoint: Path, variants: Path, out: Path) -> Result:
    """Serve and judge base, teacher, student and every variant; write scores.json and answers.parquet.

    Counts are of answers: read = asked for, kept = correct, the others by what was wrong with them.
    """
    everyone = list(contenders(run, checkpoint, variants))
    answers = list(_answers(run, everyone))
    benchmarks: dict[str, Any] = {}
    for bench in run.benchmarks:
        found = [row for row in answers if row["benchmark"] == bench.name]
        models = {
            one.name: {
                **summary([row for row in found if row["model"] == one.name]),
                "size_bytes": one.size_bytes,
                "runtime": one.runtime,
            }
            for one in everyone
        }
        benchmarks[bench.name] = {"title": bench.title, "models": models}
    verdicts_of_gates = gates(run, answers)
    scores = {"benchmarks": benchmarks, "gates": verdicts_of_gates}
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    pq.write_table(pa.Table.from_pylist(answers, schema=ANSWER), out / "answers.parquet", compression="zstd")
    wrong = Counter(row["reason"] for row in answers if not row["correct"])
    correct = len(answers) - wrong.total()
    failed = [gate["model"] for gate in verdicts_of_gates if not gate["passed"]]
    return Result(len(answers), correct, dict(wrong), {"scores": scores}, failed, unit="answers")


def contenders(run: Run, checkpoint: Path, variants: Path) -> Iterator[Contender]:
    """Base, teacher, student, then the variants, in the order of the report."""
    student = run.student
    base = models.materialise(student.base, run.home)
    yield Contender(
        "base", _vllm(run, base, "base"), f"{models.title(student.base)}@{run.base_revision}", _size(base), False
    )
    if run.scores_teacher:
        assert not isinstance(run.teacher, RecordedTeacher)
        spec = spec_of(run.teacher, run.home, ray_address=run.hardware.ray_address)
        size = _size(Path(spec.model)) if isinstance(spec, VllmSpec) and Path(spec.model).is_dir() else None
        opens = getattr(run.teacher, "opens_thinking", False)
        yield Contender("teacher", spec, run.teacher_revision, size, opens)
    mark = checkpoint.name
    yield Contender("student", _vllm(run, checkpoint, student.name), mark, _size(checkpoint), True)
    for name, settings in student.variants.items():
        folder, few = variants / name, student.variant_questions
        if settings.kind == "gguf":
            file = next(folder.glob("*.gguf"))
            llama = LlamaSpec(gguf=file, served_name=name, context_tokens=_context(run), slots=4)
            yield Contender(name, llama, f"{mark}/{name}", file.stat().st_size, True, few)
        else:
            yield Contender(name, _vllm(run, folder, name), f"{mark}/{name}", _size(folder), True, few)


def _answers(run: Run, everyone: list[Contender]) -> Iterator[dict[str, Any]]:
    """Rows of ANSWER of all contenders: everybody is asked first, then everything is judged."""
    with Ledger(run.home / "ledger") as ledger:
        asked = [_Asked(bench, one) for one in everyone for bench in run.benchmarks]
        _ask(run, [one for one in asked if pending(one.order, ledger)], ledger)
        traces = [(one, trace) for one in asked for trace in rows(one.order, ledger)]
    items = [verdicts.item(one.questions[trace["prompt_id"]], trace) for one, trace in traces]
    for (one, trace), judged in zip(traces, verdicts.judge(run.prompts.verdicts, items), strict=True):
        yield {
            "model": one.contender.name,
            "benchmark": one.benchmark,
            "prompt_id": judged.item.prompt_id,
            "sample": judged.item.sample,
            "completion": judged.item.completion,
            **_correct(judged),
            "completion_tokens": trace["completion_tokens"] or 0,
        }


def _ask(run: Run, wanted: list[_Asked], ledger: Ledger) -> None:
    """Serve each contender once and ask it for all of its benchmarks."""
    by_contender: dict[str, list[_Asked]] = {}
    for one in wanted:
        by_contender.setdefault(one.contender.name, []).append(one)
    specs = [orders[0].contender.spec for orders in by_contender.values()]
    with closing(in_turn(specs, run.home / "logs")) as endpoints:
        for endpoint, orders in zip(endpoints, by_contender.values(), strict=True):
            for one in orders:
                ask(one.order, endpoint, ledger, Client(), f"{one.contender.name} on {one.benchmark}")


class _Asked:
    """A benchmark's questions and what a contender is asked of them."""

    def __init__(self, benchmark: Benchmark, contender: Contender):
        self.benchmark, self.contender = benchmark.name, contender
        everything = questions(benchmark)
        few = contender.limit or len(everything)  # spread over the whole benchmark, whose order may be by task
        spread = everything[:: max(1, len(everything) // few)][:few]
        self.questions = {row["prompt_id"]: row for row in spread}
        requests = [
            Request(key, number, [{"role": "user", "content": user_message(row, benchmark.instruction)}])
            for key, row in self.questions.items()
            for number in range(benchmark.k)
        ]
        sampling = Sampling(
            temperature=benchmark.temperature,
            top_p=benchmark.top_p,
            max_tokens=benchmark.max_tokens,
            samples=benchmark.k,
            seed=benchmark.seed,
        )
        identity = {"purpose": "scores", "model": contender.name, "revision": contender.revision}
        self.order = Order(requests, sampling, identity, contender.opens_thinking)


def _correct(judged: verdicts.Judged) -> dict[str, Any]:
    """An answer counts when it ended by itself and its final answer is right, whatever its form."""
    if judged.item.state != "done":
        return {"correct": False, "reason": judged.item.state}
    verdict = next(row for row in judged.verdicts if row["check"] == "correctness")
    right = verdict["outcome"] == "pass"
    return {"correct": right, "reason": None if right else f"correctness: {verdict['reason']}"}


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy with its bootstrap 95% interval over questions, truncation rate and mean tokens of ANSWER rows."""
    means = _question_means(answers)
    low, high = interval(list(means.values()))
    return {
        "accuracy": sum(means.values()) / len(means),
        "low": low,
        "high": high,
        "questions": len(means),
        "k": len(answers) // len(means),
        "truncated": sum(row["reason"] == "truncated" for row in answers) / len(answers),
        "mean_tokens": sum(row["completion_tokens"] for row in answers) / len(answers),
    }


def _question_means(answers: list[dict[str, Any]]) -> dict[str, float]:
    by_question: dict[str, list[bool]] = {}
    for row in answers:
        by_question.setdefault(row["prompt_id"], []).append(row["correct"])
    return {key: sum(values) / len(values) for key, values in by_question.items()}


def interval(means: list[float], seed: int = 0) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of the mean when questions are drawn with replacement."""
    import numpy as np

    values = np.asarray(means)
    draws = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def gates(run: Run, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The checkpoint against base and teacher, each variant against the checkpoint on the same questions."""
    found: list[dict[str, Any]] = []
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        by_model.setdefault(row["model"], []).append(row)
    student = by_model["student"]
    accuracy = {name: summary(rows)["accuracy"] for name, rows in by_model.items()}
    wanted = run.student.gate
    if wanted.min_gain is not None:
        gain = accuracy["student"] - accuracy["base"]
        found.append(held("checkpoint", "gain over base", gain, wanted.min_gain))
    if wanted.min_share_of_teacher is not None and accuracy.get("teacher"):
        share = accuracy["student"] / accuracy["teacher"]
        found.append(held("checkpoint", "share of teacher", share, wanted.min_share_of_teacher))
    for name, settings in run.student.variants.items():
        keys = {(row["benchmark"], row["prompt_id"]) for row in by_model[name]}
        same = summary([row for row in student if (row["benchmark"], row["prompt_id"]) in keys])
        found += variant(name, settings.gate, summary(by_model[name]), same)
    return found


def _vllm(run: Run, folder: Path, name: str) -> VllmSpec:
    """Serve a local folder with this machine's GPUs, or on the CPU."""
    options: dict[str, Any] = {"max-model-len": _context(run), **run.student.serve_options}
    if not _has_template(folder):
        template = run.home / "plain_template.jinja"
        template.write_text(PLAIN_TEMPLATE)
        options["chat-template"] = str(template)
    return VllmSpec(model=str(folder), served_name=name, options=options)


def _context(run: Run) -> int:
    """Room for the longest answer and 2,048 tokens of question (256 where answers are short)."""
    longest = max(bench.max_tokens for bench in run.benchmarks)
    return longest + (2048 if longest > 2048 else 256)


def _has_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and "chat_template" in json.loads(config.read_text(encoding="utf-8"))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != "manifest.json")
