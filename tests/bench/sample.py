"""The client beside the `openai` package's: requests a second, and slots kept busy on R1's length distribution.

The server is a small asyncio one in a process of its own: it answers at once with 30 kB, or after a time in proportion
to a number of tokens. The lengths are lognormal, cut at 32,768 tokens: the mean is the published 5,355
(arXiv:2501.12948), the spread that of the real R1 traces of MiP-Overthinking (median 1,347, p95 6,039).
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

ROUNDS = 3
REQUESTS, IN_FLIGHT, BODY_BYTES = 768, 256, 30_000
SLOTS, BATCH, BATCHES_A_GROUP, ANSWERS_A_SLOT = 512, 64, 3, 5
MEAN_TOKENS, SIGMA, MOST_TOKENS, BYTES_A_TOKEN = 5355, 0.91, 32_768, 5
SECONDS_A_TOKEN = 1.0 / MEAN_TOKENS  # an answer of mean length takes a second


def measure() -> Iterator[dict[str, Any]]:
    """Yield the comparisons; see the module's docstring."""
    with _Server() as server, tempfile.TemporaryDirectory() as folder:  # what both import is not measured
        _ask(server, Path(folder), ["0 0"], 1)
        asyncio.run(_in_slots(server, ["0 0"], 1))
    with tempfile.TemporaryDirectory() as folder:
        yield _throughput(Path(folder))
        yield from _busy(Path(folder))


def _throughput(folder: Path) -> dict[str, Any]:
    questions = [f"0 {number}" for number in range(REQUESTS)]
    ours, peers = [], []
    for round_ in range(ROUNDS):
        with _Server() as server:
            ours.append(REQUESTS / _ask(server, folder / f"fast-{round_}", questions, IN_FLIGHT))
            began = time.perf_counter()
            asyncio.run(_in_slots(server, questions, IN_FLIGHT))
            peers.append(REQUESTS / (time.perf_counter() - began))
    return {
        "what": f"requests at a fast server, {IN_FLIGHT} in flight, {BODY_BYTES // 1000} kB each; ours all durable",
        "ours": statistics.median(ours),
        "peer": statistics.median(peers),
        "unit": "requests/s",
        "peer_name": "openai.AsyncOpenAI, storing nothing",
        "goal": 3.0,
        "note": f"median of {ROUNDS} rounds of {REQUESTS:,} requests; every answer read back from the ledger",
    }


def _busy(folder: Path) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    mu = math.log(MEAN_TOKENS) - SIGMA**2 / 2
    tokens = [min(MOST_TOKENS, round(draw.lognormvariate(mu, SIGMA))) for _ in range(SLOTS * ANSWERS_A_SLOT)]
    questions = [f"{length} {number}" for number, length in enumerate(tokens)]
    ours, peers = [], []
    for round_ in range(ROUNDS):
        with _Server() as server:
            _ask(server, folder / f"slow-{round_}", questions, SLOTS)
            ours.append(_load(server.log()))
            asyncio.run(_in_batches(server, questions[: SLOTS * BATCHES_A_GROUP]))
            peers.append(_load(server.log()))
    note = (
        f"{SLOTS} slots, from the first request to the last one handed out; peer: {SLOTS // BATCH} batches of {BATCH} "
        f"at a time, each waited for as a whole, over the first {SLOTS * BATCHES_A_GROUP:,} questions; lengths lognormal "
        "with the paper's mean"
    )
    names = {"peer_name": f"batches of {BATCH} gathered with openai.AsyncOpenAI", "note": note}
    busy = [statistics.median(one[0] for one in side) for side in (ours, peers)]
    speed = [statistics.median(one[1] for one in side) for side in (ours, peers)]
    # The goal of the first is 95% of all slots, here as a multiple of what the peer keeps busy.
    yield {
        "what": "slots kept busy",
        "ours": busy[0],
        "peer": busy[1],
        "unit": "share",
        "goal": 0.95 / busy[1],
        **names,
    }
    yield {"what": "tokens", "ours": speed[0], "peer": speed[1], "unit": "tokens/s", "goal": 3.0, **names}


def _load(log: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Busy share of the slots and tokens a second, until the last request was handed out."""
    begin, end = min(one[0] for one in log), max(one[0] for one in log)
    busy = sum(min(stop, end) - start for start, stop, _ in log)
    tokens = sum(length * (min(stop, end) - start) / (stop - start) for start, stop, length in log)
    return busy / (SLOTS * (end - begin)), tokens / (end - begin)


def _ask(server: _Server, folder: Path, questions: list[str], in_flight: int) -> float:
    """Ours, and proof that everything was kept; returns the seconds without the proof."""
    from r1distill.teacher.ledger import Ledger
    from r1distill.teacher.sample import Order, Request, ask, rows
    from r1distill.teacher.serve import Endpoint
    from r1distill.teacher.settings import Client, Sampling

    requests = [Request(question, 0, [{"role": "user", "content": question}]) for question in questions]
    order = Order(requests, Sampling(max_tokens=MOST_TOKENS), {"model": "bench"})
    began = time.perf_counter()
    with Ledger(folder) as ledger:
        ask(order, Endpoint(server.url, "bench"), ledger, Client(in_flight=in_flight))
    seconds = time.perf_counter() - began
    with Ledger(folder) as ledger:
        kept = sum(row["state"] == "done" for row in rows(order, ledger))
    if kept != len(questions):
        raise RuntimeError(f"{len(questions):,} answers asked for, {kept:,} kept")
    return seconds


def _in_slots(server: _Server, questions: list[str], in_flight: int) -> Coroutine[Any, Any, None]:
    """The peer at its best: as many workers as slots."""

    async def run(one: Callable[[str], Awaitable[None]]) -> None:
        todo = iter(questions)

        async def slot() -> None:
            for question in todo:
                await one(question)

        await asyncio.gather(*[slot() for _ in range(in_flight)])

    return _with_openai(server, run)


def _in_batches(server: _Server, questions: list[str]) -> Coroutine[Any, Any, None]:
    """The peer as it is used: batches that are waited for as a whole, as many at a time as fill the slots."""

    async def run(one: Callable[[str], Awaitable[None]]) -> None:
        batches = iter([questions[start : start + BATCH] for start in range(0, len(questions), BATCH)])

        async def group() -> None:
            for batch in batches:
                await asyncio.gather(*map(one, batch))

        await asyncio.gather(*[group() for _ in range(SLOTS // BATCH)])

    return _with_openai(server, run)


async def _with_openai(server: _Server, run: Callable[[Callable[[str], Awaitable[None]]], Awaitable[None]]) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=600) as client:

        async def one(question: str) -> None:
            done = await client.chat.completions.create(
                model="bench",
                messages=[{"role": "user", "content": question}],
                temperature=0.6,
                top_p=0.95,
                max_tokens=MOST_TOKENS,
            )
            assert done.choices[0].finish_reason == "stop"

        await run(one)


class _Server:
    """The server's process, for as long as the block lasts."""

    def __enter__(self) -> _Server:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def log(self) -> list[tuple[float, float, int]]:
        """(start, end, tokens) of the requests since the last call."""
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.url}/log") as answer:
            return [(start, end, tokens) for start, end, tokens in json.load(answer)]


class _Answering(asyncio.Protocol):
    """One connection. A question is a number of tokens (0: the fixed length, at once) and a number of its own."""

    log: list[tuple[float, float, int]] = []
    words = " ".join(random.Random(0).choices([f"{n:x}thought" for n in range(3000)], k=MOST_TOKENS))
    fast = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            if head.startswith(b"get"):
                self.send(json.dumps(self.log).encode())
                self.log.clear()
                continue
            tokens = int(json.loads(body)["messages"][0]["content"].split()[0])
            if not tokens:
                self.send(self.fast)
                continue
            began, loop = time.monotonic(), asyncio.get_running_loop()
            loop.call_later(tokens * SECONDS_A_TOKEN, self.answer, tokens, began)

    def answer(self, tokens: int, began: float) -> None:
        self.send(_completion(self.words[: tokens * BYTES_A_TOKEN], tokens))
        self.log.append((began, time.monotonic(), tokens))

    def send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)  # type: ignore[attr-defined]


def _completion(text: str, tokens: int) -> bytes:
    message = {"role": "assistant", "content": f"<think>\n{text}\n</think>\n\n42"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": tokens + 10}
    whole = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "bench",
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(whole).encode()


async def _serve() -> None:
    _Answering.fast = _completion(_Answering.words[:BODY_BYTES], BODY_BYTES // BYTES_A_TOKEN)
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve())
