"""Scoring answers beside lm-evaluation-harness: the same server, questions, settings and number of requests in flight.

The questions are GSM8K's, the answers as long as R1's real ones there and right nine times in ten. Both sides read the
questions, ask, judge, and give an accuracy with its error; ours keeps every answer on the disk, looks for loops, and
compares answers as mathematics, the peer takes the last number (its gsm8k task's flexible-extract).
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1distill.data.config import ROOT

FILE = ROOT.parent / "shared" / "data" / "eval" / "gsm8k_test.jsonl.gz"
ROUNDS = 3
IN_FLIGHT = 64
FEW = 64  # questions
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
WORDS = 1000  # of an answer's thinking: R1's median on grade-school problems is 1,347 tokens

TASK = """
task: bench_gsm8k
dataset_path: json
dataset_kwargs: {{ data_files: {{ test: {file} }} }}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\n\\nPlease reason step by step, and put your final answer within \\\\boxed{{}}."
doc_to_target: "{{{{answer.split('### ')[-1].rstrip()}}}}"
generation_kwargs: {{ until: [], do_sample: true, temperature: 0.6, top_p: 0.95, max_gen_toks: 32768 }}
num_fewshot: 0
filter_list:
  - name: flexible-extract
    filter:
      - {{ function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)" }}
      - {{ function: take_first }}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
"""


def measure() -> Iterator[dict[str, Any]]:
    if not FILE.is_file():
        print(f"evaluate: nothing to measure, {FILE} is not there", file=sys.stderr)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _questions(folder)
        with _Server(folder / "answers.json") as server:
            _ours(server, folder, "warm-up", FEW)  # what both import, and the peer's cache of the questions
            _theirs(server, folder, FEW)
            found = [_round(server, folder, number) for number in range(ROUNDS)]
    accuracies = {accuracy for ours, theirs in found for _, accuracy in (ours, theirs)}
    if max(accuracies) - min(accuracies) > 1e-9:
        raise RuntimeError(f"the two harnesses give other accuracies: {accuracies}")
    more, accuracy = rows - FEW, accuracies.pop()
    yield {
        "what": "answers asked for and scored at a fast server",
        "ours": statistics.median(more / ours[0] for ours, _ in found),
        "peer": statistics.median(more / theirs[0] for _, theirs in found),
        "unit": "answers/s",
        "peer_name": "lm-evaluation-harness, local-chat-completions",
        "goal": 1.0,
        "note": f"median of {ROUNDS} rounds of {rows:,} answers, {IN_FLIGHT} in flight, less the time of {FEW}, so that "
        f"no start is counted; both find {accuracy:.1%} right",
    }


def _round(server: _Server, folder: Path, number: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """(seconds, accuracy) of ours and theirs on everything, less the seconds of a few questions."""
    ours, theirs = _ours(server, folder, f"all-{number}"), _theirs(server, folder)
    few = _ours(server, folder, f"few-{number}", FEW), _theirs(server, folder, FEW)
    return (ours[0] - few[0][0], ours[1]), (theirs[0] - few[1][0], theirs[1])


def _questions(folder: Path) -> int:
    """Write the questions, and the server's answer to each; returns how many there are."""
    draw = random.Random(0)
    vocabulary = [f"step{n:x}" for n in range(3000)]
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    answers = {}
    for row in rows:
        right = row["answer"].rpartition("#### ")[2].replace(",", "")
        given = right if draw.random() < 0.9 else f"{int(right) + 1}"
        thinking = " ".join(draw.choices(vocabulary, k=WORDS))
        answers[row["question"].strip()] = f"{thinking}\n</think>\n\nAdding it all up, the answer is \\boxed{{{given}}}"
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(file=folder / "questions.jsonl"), encoding="utf-8")
    return len(rows)


def _ours(server: _Server, folder: Path, name: str, limit: int | None = None) -> tuple[float, float]:
    """Seconds and accuracy."""
    from r1distill.data.settings import Benchmark
    from r1distill.data.sources import FileSource
    from r1distill.pipeline.evaluation import Contender, answers, asked
    from r1distill.pipeline.metrics import summary
    from r1distill.teacher.settings import Client, EndpointTeacher, Sampling

    columns = {"question": "question", "reference_answer": "answer"}
    source = FileSource(kind="file", path=str(folder / "questions.jsonl"), columns=columns, license="mit")
    bench = Benchmark(name="gsm8k", title="GSM8K", source=source, instruction=INSTRUCTION, k=1, limit=limit)
    client = Client(in_flight=IN_FLIGHT)
    teacher = EndpointTeacher(
        kind="endpoint",
        name="m",
        prompts="",
        base_url=server.url,
        model="m",
        sampling=Sampling(max_tokens=1),
        client=client,
    )
    home = folder / name
    home.mkdir()
    began = time.perf_counter()
    order = asked([bench], [Contender("model", teacher, "1", None, True)])
    row = summary(answers(order, home, home))
    return time.perf_counter() - began, row["accuracy"]


def _theirs(server: _Server, folder: Path, limit: int | None = None) -> tuple[float, float]:
    from lm_eval import simple_evaluate

    logging.disable(logging.WARNING)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = simple_evaluate(
            model="local-chat-completions",
            model_args={
                "model": "m",
                "base_url": f"{server.url}/chat/completions",
                "num_concurrent": IN_FLIGHT,
                "tokenizer_backend": None,
                "tokenized_requests": False,
                "max_length": 65536,
            },
            tasks=[str(folder / "task.yaml")],
            apply_chat_template=True,
            limit=limit,
        )
    seconds = time.perf_counter() - began
    logging.disable(logging.NOTSET)
    return seconds, found["results"]["bench_gsm8k"]["exact_match,flexible-extract"]


class _Server:
    """The server's process, for as long as the block lasts."""

    def __init__(self, answers: Path):
        self._answers = answers

    def __enter__(self) -> _Server:
        command = [sys.executable, __file__, str(self._answers)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Answering(asyncio.Protocol):
    """One connection: a question's body at once."""

    bodies: dict[str, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            length = int(self.buffer[:end].lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            asked = json.loads(body)["messages"][-1]["content"]
            text = asked if isinstance(asked, str) else asked[0]["text"]
            answer = self.bodies[text.removesuffix(INSTRUCTION).strip()]
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(answer)
            self.transport.write(head + answer)  # type: ignore[attr-defined]


async def _serve(answers: Path) -> None:
    for question, text in json.loads(answers.read_text(encoding="utf-8")).items():
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": WORDS, "total_tokens": WORDS + 100}
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        _Answering.bodies[question] = json.dumps(body).encode()
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
