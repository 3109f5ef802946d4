"""A fast model: a chat-completions server in this process that answers at once, and counts what it is asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class FastModel:
    """``answers(question, number)`` gives the text of the number-th answer to a question, or (text, finish_reason)."""

    def __init__(self, answers: Callable[[str, int], str | tuple[str, str]]):
        self.answers, self.bodies = answers, []
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                raw = json.dumps(outer.answer(body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

        self._http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, body: dict) -> dict:
        question = body["messages"][-1]["content"]
        with self._lock:
            number = self._counts.get(question, 0)
            self._counts[question] = number + 1
            self.bodies.append(body)
        found = self.answers(question, number)
        text, finish_reason = (found, "stop") if isinstance(found, str) else found
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        usage = {"prompt_tokens": 10, "completion_tokens": len(text.split())}
        return {"model": "fast", "choices": [choice], "usage": usage}

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def fast_model():
    """Start one: ``fast_model(answers)``."""
    started = []

    def start(answers: Callable[[str, int], str | tuple[str, str]]) -> FastModel:
        started.append(FastModel(answers))
        return started[-1]

    yield start
    for one in started:
        one.close()
