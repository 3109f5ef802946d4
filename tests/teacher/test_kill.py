"""SIGKILL of the client, of the server, of both: nothing that was kept is lost or asked again."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from r1distill.teacher.ledger import Ledger

IN_FLIGHT = 24

# Writes a line for each question as it comes. What it answers depends on the question alone; some answers take long.
SERVER = """
import asyncio, json, os, random, sys
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\\r\\n")[0]))
            number = int(json.loads(body)["messages"][0]["content"])
            os.write(log, b"%d\\n" % number)
            await asyncio.sleep(min(1.0, random.lognormvariate(-4, 1)))
            finish = {3: "length", 5: "content_filter"}.get(number % 10, "stop")
            message = {"role": "assistant", "content": "<think>so</think>" + str(number) * 500}
            answer = {"model": "m", "choices": [{"message": message, "finish_reason": finish}], "usage": {}}
            status = b"400 no" if number % 50 == 7 else b"200 OK"
            raw = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 %s\\r\\ncontent-length: %d\\r\\n\\r\\n%s" % (status, len(raw), raw))
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""

CLIENT = """
import sys
from pathlib import Path
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask, rows
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Sampling

def order_of(count):
    requests = [Request(str(n), 0, [{"role": "user", "content": str(n)}]) for n in range(count)]
    return Order(requests, Sampling(max_tokens=100), {"model": "m"})

def run(folder, url, count):
    client = Client(in_flight=24, attempts=20, backoff_seconds=0.02, timeout_seconds=20, down_seconds=60)
    with Ledger(folder) as ledger:
        ask(order_of(count), Endpoint(url, "m"), ledger, client)
        return {row["prompt_id"]: row["state"] for row in rows(order_of(count), ledger)}

if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""
OURS: dict[str, Any] = {"__name__": "ours"}
exec(CLIENT, OURS)
run, order_of = OURS["run"], OURS["order_of"]


class Processes:
    """The client's and the server's, started again where they are dead."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.log, self.count = folder, folder / "log", count
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.commands = {
            "server": ["-c", SERVER, str(self.port), str(self.log)],
            "client": ["-c", CLIENT, str(folder / "killed"), self.url, str(count)],
        }
        self.alive: dict[str, subprocess.Popen] = {}

    def ensure(self) -> None:
        for name, command in self.commands.items():
            if name not in self.alive or self.alive[name].poll() is not None:
                told = (self.folder / f"{name}.err").open("w")
                self.alive[name] = subprocess.Popen([sys.executable, *command], stderr=told)
                told.close()

    def kill(self, names: list[str]) -> None:
        """SIGKILL, at once; what had ended by itself had ended well."""
        for name in names:
            self.alive[name].kill()
        for name in names:
            assert self.alive[name].wait() in (-signal.SIGKILL, 0), (self.folder / f"{name}.err").read_text()[-2000:]

    def asked(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []

    def kept(self) -> set[str]:
        """The prompts that have an answer."""
        order = order_of(self.count)
        with Ledger(self.folder / "killed") as ledger:
            return {r.prompt_id for r in order.requests if ledger.settled(order.key(r))}


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_kills_at_random_moments_lose_nothing_and_repeat_nothing(tmp_path, kills):
    draw = random.Random(kills)
    processes = Processes(tmp_path, kills * 100)
    seen: list[tuple[set[str], int]] = []  # what was kept at a moment, and how many questions had come by then
    killed = 0
    try:
        for number in range(kills):
            processes.ensure()
            before, deadline = len(processes.asked()), time.monotonic() + draw.choice([0, 20, 20])
            while len(processes.asked()) < before + 10 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.2))
            names = [["server"], ["client"], ["server"], ["client", "server"]][number % 4]
            killed += processes.alive["client"].poll() is None
            processes.kill(names)
            kept = processes.kept()
            seen.append((kept, len(processes.asked())))
        processes.ensure()
        assert processes.alive["client"].wait(60) == 0
        finished = run(tmp_path / "killed", processes.url, processes.count)
        asked = processes.asked()
        uninterrupted = run(tmp_path / "whole", processes.url, processes.count)
    finally:
        processes.kill([name for name, one in processes.alive.items() if one.poll() is None])
    assert killed > kills / 2, "most of the kills came too late: there was nothing left to do"
    assert finished == uninterrupted
    assert set(finished.values()) == {"done", "truncated", "refused", "failed"}
    for kept, position in seen:
        assert not kept & set(asked[position:])
    failed = sum(state == "failed" for state in finished.values())
    assert len(asked) <= processes.count + kills * (IN_FLIGHT + failed)
