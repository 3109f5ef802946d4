"""Evaluation: models served in the runtime their users have, asked a benchmark's questions alike, and judged alike.

The same client, ledger and verifiers as everywhere else: the ledger keeps every answer and the findings every verdict,
so a killed evaluation asks and judges nothing twice.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1distill.data import benchmarks, verdicts
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import Benchmark, CheckName, VerdictSettings
from r1distill.data.verify import sandbox, votes
from r1distill.data.verify.check import Finding
from r1distill.data.verify.sandbox import SandboxSettings
from r1distill.data.verify.verifiers import Item
from r1distill.pipeline.rendering import Renderings
from r1distill.pipeline.variants import tokens_per_second
from r1distill.students.template import ASSISTANT, TEMPLATES
from r1distill.teacher import recorded
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask, pending, rows
from r1distill.teacher.serve import LlamaSpec, VllmSpec, in_turn, on_cpu
from r1distill.teacher.settings import Client, EndpointTeacher, RecordedTeacher, Sampling

CHECKS: tuple[CheckName, ...] = ("correctness", "repetition")
# The same for every score, whatever a prompts file says of traces. LiveCodeBench runs all tests of a problem.
RULES = VerdictSettings(code=SandboxSettings(total_seconds=600, memory_bytes=4 << 30))
PLAIN_TEMPLATE = "{{ messages[-1]['content'] }}\n"  # for base models that have no chat template
MOST_FAILED_SHARE = 0.01  # of the answers: requests that failed say nothing about a model
IN_FLIGHT_ON_GPU = 256
# For one answer: on a CPU 32,768 tokens take hours; on GPUs it may wait for others to give back their cache.
LLAMA_SECONDS, VLLM_SECONDS = 24 * 3600, 2 * 3600

ANSWER = pa.schema(
    [
        ("model", pa.string()),
        ("benchmark", pa.string()),
        ("prompt_id", pa.string()),
        ("difficulty", pa.string()),  # in the source's own words
        ("sample", pa.int64()),
        ("completion", pa.string()),  # null where the benchmark is private
        ("answer", pa.string()),  # as the verifier reads it; null where there is none
        ("vote", pa.int64()),  # answers to one question with the same number say the same
        ("correct", pa.bool_()),
        ("reason", pa.string()),  # why it is not
        ("loops", pa.bool_()),
        ("completion_tokens", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Contender:
    """A model to be scored: how to serve it, which revision it is, and where it is asked less than others.

    ``limit`` is how many questions of a benchmark it gets, ``samples`` how often each (None: all, and as often as the
    benchmark says).
    """

    name: str
    spec: VllmSpec | LlamaSpec | EndpointTeacher | RecordedTeacher
    revision: str
    size_bytes: int | None
    opens_thinking: bool
    limit: int | None = None
    samples: int | None = None

    @property
    def ours(self) -> bool:
        """The student and its variants, which have its template and are served here."""
        return self.name not in ("base", "teacher", "twin") and isinstance(self.spec, VllmSpec | LlamaSpec)

    @property
    def runtime(self) -> str:
        names = {VllmSpec: "vllm", LlamaSpec: "llama.cpp", EndpointTeacher: "endpoint", RecordedTeacher: "recorded"}
        return names[type(self.spec)]


def asked(wanted: Sequence[Benchmark], everyone: Sequence[Contender]) -> list[Asked]:
    """Every benchmark beside every contender; the questions are read once."""
    found = {bench.name: benchmarks.asked(bench) for bench in wanted}
    return [Asked(bench, found[bench.name], one) for one in everyone for bench in wanted]


def answers(
    asked: Sequence[Asked],
    home: Path,
    out: Path,
    workers: int | None = None,
    renderings: Renderings | None = None,
) -> list[dict[str, Any]]:
    """Ask every contender what the ledger lacks, then judge; rows of ANSWER, but for the completions: those are in
    ``out/answers.parquet``. With ``renderings``, those that have the student's template are first asked to tokenise.

    Raises R1DistillError where over 1% of a contender's answers to a benchmark failed, RequestError where programs are
    to be run and there is no sandbox, or a recorded run lacks answers.
    """
    if any(question.row["verifier"] == "code" for one in asked for question in one.questions.values()):
        sandbox.require()
    settings = RULES.model_copy(update={"workers": workers})
    kept: list[dict[str, Any]] = []
    with (
        Ledger(home / "ledger") as ledger,
        pq.ParquetWriter(out / "answers.parquet", ANSWER, compression="zstd") as file,
    ):
        ours = {one.contender.name: one.contender.revision for one in asked if one.contender.ours}
        unread = {name for name, revision in ours.items() if renderings and renderings.of(revision) is None}
        unasked = (one for one in asked if one.recorded is None)
        _ask(
            [one for one in unasked if one.contender.name in unread or pending(one.order, ledger)],
            home,
            ledger,
            renderings,
        )

        def items() -> Iterator[Item]:
            return (verdicts.item(one.questions[t["prompt_id"]].row, t) for one in asked for t in one.traces(ledger))

        judged = verdicts.examine(settings, CHECKS, items, sum(map(len, asked)), home)
        with closing(judged):
            for one in asked:
                some = _judged(one, islice(judged, len(one)), verdicts.workers(settings))
                file.write_table(pa.Table.from_pylist(some, schema=ANSWER))
                kept += [{**row, "completion": None} for row in some]
    return kept


class Asked:
    """A benchmark's questions and what a contender is asked of them, or was."""

    def __init__(self, benchmark: Benchmark, everything: list[benchmarks.Question], contender: Contender):
        self.benchmark, self.contender = benchmark, contender
        few = contender.limit or len(everything)  # spread over the whole benchmark, whose order may be by task
        spread = everything[:: max(1, len(everything) // few)][:few]
        self.questions = {one.row["prompt_id"]: one for one in spread}
        k = min(benchmark.k, contender.samples or benchmark.k)
        requests = [
            Request(key, number, [{"role": "user", "content": one.message}])
            for key, one in self.questions.items()
            for number in range(k)
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
        self.recorded = self._recorded(contender.spec) if isinstance(contender.spec, RecordedTeacher) else None
        self.asked_now = 0  # the others were in the ledger

    def __len__(self) -> int:
        return len(self.order.requests if self.recorded is None else self.recorded)

    def traces(self, ledger: Ledger) -> Iterable[dict[str, Any]]:
        return rows(self.order, ledger) if self.recorded is None else self.recorded

    def _recorded(self, teacher: RecordedTeacher) -> list[dict[str, Any]]:
        """The recorded answers, the first k to each question."""
        found = [row for row in recorded.rows(teacher, self.questions) if not isinstance(row, str)]
        if missing := len(self.questions.keys() - {row["prompt_id"] for row in found}):
            raise RequestError(
                f"the recorded run of {teacher.model} has no answer to {missing} of the {len(self.questions)} "
                f"questions of {self.benchmark.name}. Its column 'question' has to hold them as the benchmark does."
            )
        return [row for row in found if row["sample"] < self.benchmark.k]


def speeds(asked: Sequence[Asked], home: Path) -> dict[str, float | None]:
    """Tokens a second of each contender that was asked here, by name."""
    with Ledger(home / "ledger") as ledger:
        return {
            name: tokens_per_second(trace for one in each for trace in one.traces(ledger))
            for name, each in _by_contender(asked).items()
        }


def _by_contender(asked: Iterable[Asked]) -> dict[str, list[Asked]]:
    found: dict[str, list[Asked]] = {}
    for one in asked:
        found.setdefault(one.contender.name, []).append(one)
    return found


def _ask(wanted: list[Asked], home: Path, ledger: Ledger, renderings: Renderings | None) -> None:
    """Serve each contender once, see how it reads a conversation, and ask it for all of its benchmarks."""
    by_contender = _by_contender(wanted)
    specs = [orders[0].contender.spec for orders in by_contender.values()]
    servable = [spec for spec in specs if not isinstance(spec, RecordedTeacher)]
    with closing(in_turn(servable, home / "logs")) as endpoints:
        for endpoint, orders in zip(endpoints, by_contender.values(), strict=True):
            contender = orders[0].contender
            if renderings and contender.ours:
                renderings.look(endpoint, contender.runtime, contender.revision)
            for one in orders:
                client = _client(one.contender.spec)
                title = f"{one.contender.name} on {one.benchmark.name}"
                one.asked_now = ask(one.order, endpoint, ledger, client, title)["asked"]


def _client(spec: VllmSpec | LlamaSpec | EndpointTeacher | RecordedTeacher) -> Client:
    if isinstance(spec, EndpointTeacher):
        return spec.client
    if isinstance(spec, LlamaSpec):  # more would wait for a slot, and their time would run
        return Client(in_flight=spec.slots, timeout_seconds=LLAMA_SECONDS)
    if isinstance(spec, VllmSpec) and not on_cpu():
        in_flight = IN_FLIGHT_ON_GPU * int(spec.options.get("data-parallel-size", 1))
        return Client(in_flight=in_flight, timeout_seconds=VLLM_SECONDS)
    return Client()


def _judged(one: Asked, found: Iterable[verdicts.Found], workers: int) -> list[dict[str, Any]]:
    """Rows of ANSWER of one contender on one benchmark."""
    made, states = [], Counter[str]()
    hidden = one.benchmark.private
    for item, findings in found:
        states[item.state] += 1
        answer = votes.answer(item)
        made.append(
            {
                "model": one.contender.name,
                "benchmark": one.benchmark.name,
                "prompt_id": item.prompt_id,
                "difficulty": one.questions[item.prompt_id].difficulty,
                "sample": item.sample,
                "completion": None if hidden else item.completion,
                "answer": answer,
                "vote": None,
                **_correct(item, findings["correctness"]),
                "loops": findings["repetition"].outcome == "fail",
                "completion_tokens": item.completion_tokens,
            }
        )
    if states["failed"] > MOST_FAILED_SHARE * len(made):
        raise R1DistillError(
            f"{states['failed']} of {len(made)} requests of {one.contender.name} on {one.benchmark.name} failed: such "
            "scores would say more about the server. Look into its log, and run again: only these are asked again."
        )
    _vote(made, {key: each.row["verifier"] for key, each in one.questions.items()}, workers)
    for row in made:
        if hidden and one.questions[row["prompt_id"]].row["verifier"] != "choice":
            row["answer"] = None
    return made


def _correct(item: Item, finding: Finding) -> dict[str, Any]:
    """An answer counts when it ended by itself and its final answer is right, whatever its form."""
    if item.state != "done":
        return {"correct": False, "reason": item.state}
    right = finding.outcome == "pass"
    return {"correct": right, "reason": None if right else f"correctness: {finding.reason}"}


def _vote(made: list[dict[str, Any]], verifiers: dict[str, str], workers: int) -> None:
    """Give the answers to each question that say the same one number."""
    texts: dict[str, list[str]] = {}
    for row in made:
        if row["answer"] is not None:
            texts.setdefault(row["prompt_id"], []).append(row["answer"])
    ballots = [(verifiers[key], tuple(dict.fromkeys(each))) for key, each in texts.items()]
    numbers = {
        key: dict(zip(ballot[1], places, strict=True))
        for key, ballot, places in zip(texts, ballots, votes.groups(ballots, workers), strict=True)
    }
    for row in made:
        if row["answer"] is not None:
            row["vote"] = numbers[row["prompt_id"]][row["answer"]]


def folder_spec(
    folder: Path, name: str, wanted: Sequence[Benchmark], options: dict[str, Any], home: Path
) -> tuple[VllmSpec, bool]:
    """How vLLM serves a folder, and whether the answer is made to begin in the thinking, as DeepSeek's settings want.

    A template of R1's family from before February 2025 does not open the thinking: ours is put in its place.
    """
    template, other = chat_template(folder), None
    opens = template is not None and opens_thinking(template)
    if template is None:
        other = PLAIN_TEMPLATE
    elif ASSISTANT in template and not opens:
        other, opens = TEMPLATES["r1"].chat_template(), True
    settings: dict[str, Any] = {"max-model-len": context_tokens(wanted), **options}
    if other is not None:
        file = home / f"{'thinking' if opens else 'plain'}_template.jinja"
        ours = file.with_suffix(f".{os.getpid()}")
        ours.write_text(other, encoding="utf-8")
        ours.rename(file)  # never half-written for another run's server
        settings["chat-template"] = str(file)
    return VllmSpec(model=str(folder), served_name=name, options=settings), opens


def context_tokens(wanted: Sequence[Benchmark]) -> int:
    """Room for the longest answer and 2,048 tokens of question (256 where answers are short)."""
    longest = max(bench.max_tokens for bench in wanted)
    return longest + (2048 if longest > 2048 else 256)


def chat_template(folder: Path) -> str | None:
    """The chat template of a model's folder, or None."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    if not (file := folder / "tokenizer_config.json").is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(found, list):  # several by name
        found = next((one["template"] for one in found if one.get("name") == "default"), None)
    return found


def opens_thinking(template: str) -> bool:
    """Whether a chat template's generation prompt ends in ``<think>`` and a new line."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        messages = [{"role": "user", "content": "?"}]
        return made.render(messages=messages, add_generation_prompt=True, bos_token="").endswith("<think>\n")
    except (TemplateError, TypeError):  # it wants more than a question; then it is none of R1's
        return False
