"""A chat-completions server that misbehaves on purpose, and counts what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Sampling


def chat(content: str | None = "<think>\n2 + 2 = 4\n</think>\n\nIt is 4.", **changes: Any) -> dict[str, Any]:
    """A chat completion's body; ``changes`` go into its message, but for finish_reason, model and usage."""
    finish_reason = changes.pop("finish_reason", "stop")
    model = changes.pop("model", "fake-1")
    usage = changes.pop("usage", {"prompt_tokens": 10, "completion_tokens": 20})
    message = {"role": "assistant", "content": content, **changes}
    return {
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": usage,
    }


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Misbehaving:
    """``scripts`` maps a question to what happens to it, one step for each time it is asked, then all is well.

    A step: a status, (status, headers), (status, headers, body), a body, "cut" (no answer), "half" (half a body),
    "garbage", "noise" (no HTTP), "sleep 0.5" (seconds), "until 61" (that many have been asked). ``always`` is the step where a question has
    no script of its own; ``draw`` gives the seconds that an answer takes.
    """

    def __init__(self, port: int = 0) -> None:
        self.scripts: dict[str, list[Any]] = {}
        self.always: Any = None
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: dict[str, list[float]] = {}
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.draw: Callable[[], float] = lambda: self.delay
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def endpoint(self, **changes: Any) -> Endpoint:
        return Endpoint(self.url, "fake", **changes)

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with self._lock:
            self.asked[question] += 1
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.times.setdefault(question, []).append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            steps = self.scripts.get(question, [])
            step = steps.pop(0) if steps else self.always
        try:
            time.sleep(self.draw())
            self._do(handler, step)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self._lock:
                self.in_flight -= 1

    def _do(self, handler: BaseHTTPRequestHandler, step: Any) -> None:
        word, _, value = step.partition(" ") if isinstance(step, str) else ("", "", "")
        if word == "sleep":
            time.sleep(float(value))
        while word == "until" and self.asked.total() < int(value):
            time.sleep(0.01)
        if step == "cut":
            handler.close_connection = True
            return
        if step == "noise":
            handler.wfile.write(b"\x16\x03 what is HTTP?\r\n\r\n")
            handler.close_connection = True
            return
        status, headers, body = 200, {}, chat()
        if isinstance(step, int):
            status, body = step, {"error": {"message": "as scripted"}}
        elif isinstance(step, tuple):
            status, headers, body = (*step, {"error": {"message": "as scripted"}})[:3]
        elif isinstance(step, dict):
            body = step
        raw = b"<html>Bad" if step == "garbage" else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(raw)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if step == "half":
            handler.wfile.write(raw[: len(raw) // 2])
            handler.wfile.flush()
            handler.close_connection = True
            return
        handler.wfile.write(raw)


@pytest.fixture
def fake():
    server = Misbehaving()
    yield server
    server.close()


@pytest.fixture
def another():
    """Start one more such server, on a port: ``another(port=0)``."""
    servers = []

    def start(port: int = 0) -> Misbehaving:
        servers.append(Misbehaving(port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger") as opened:
        yield opened


@pytest.fixture
def order():
    """Make an order of questions: ``order(["a", "b"], max_tokens=8)``."""

    def make(questions: list[str], *, samples: int = 1, opens_thinking: bool = False, **sampling: Any) -> Order:
        requests = [Request(q, n, [{"role": "user", "content": q}]) for q in questions for n in range(samples)]
        settings = Sampling(**{"max_tokens": 100, "samples": samples, **sampling})
        return Order(requests, settings, {"model": "fake", "revision": "abc"}, opens_thinking)

    return make


@pytest.fixture
def client():
    """Client settings that don't keep a test waiting."""
    return Client(in_flight=8, attempts=4, backoff_seconds=0.01, timeout_seconds=20)


@pytest.fixture(scope="session")
def session():
    """The live processes of the session that a pid leads: ``session(leader)`` gives {pid: name}."""

    def members(leader: int) -> dict[int, str]:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                head, _, tail = (folder / "stat").read_text().rpartition(")")
            except OSError:
                continue
            state, _, _, its = tail.split()[:4]
            if int(its) == leader and state != "Z":
                found[int(folder.name)] = head.partition("(")[2]
        return found

    return members


@pytest.fixture(scope="session")
def gone(session):
    """Wait for the end of a session; false where something of it lives on."""

    def wait(leader: int, seconds: float = 30) -> bool:
        deadline = time.monotonic() + seconds
        while session(leader) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not session(leader)

    return wait


@pytest.fixture(name="chat")
def chat_fixture():
    return chat
