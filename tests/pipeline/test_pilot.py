"""The pilot: intervals that cover the truth, and a run that asks for nothing the pilot has paid for."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from r1distill.data.errors import RequestError
from r1distill.pipeline.artifact import alone
from r1distill.pipeline.pilot import forecast, run_pilot
from r1distill.pipeline.run import Run


def test_the_interval_covers_the_whole_about_as_often_as_it_says():
    draw = random.Random(3)
    population = [draw.lognormvariate(7, 0.8) for _ in range(3000)]
    truth, covered = sum(population), 0
    for _ in range(300):
        found = forecast("tokens", draw.sample(population, 200), len(population))
        covered += found.low <= truth <= found.high
    assert 0.89 <= covered / 300 <= 0.99


def test_a_pilot_of_everything_is_exact():
    found = forecast("tokens", [1.0, 2.0, 6.0], 3)
    assert (found.pilot, found.whole, found.low, found.high) == (9, 9, 9, 9)


def test_one_value_among_equals_has_no_spread_and_no_negative_end():
    assert forecast("x", [0.0, 0.0, 30.0], 300).low == 0
    assert forecast("x", [5.0] * 10, 100) == forecast("x", [5.0] * 10, 100)
    assert forecast("x", [5.0] * 10, 100).high == pytest.approx(500)


class Answers(BaseHTTPRequestHandler):
    """Answers every question at once, with its number's double: right for the even ones."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        told = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
        self.asked.append(told)
        number = int(told.split()[2])
        text = f"Let me see.\n</think>\n\n\\boxed{{{2 * number + number % 2}}}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 20 + number}
        body = json.dumps({"model": "m", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A prompts file of 60 questions and an endpoint that answers them; R1DISTILL_HOME is in the folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = [{"question": f"What is {number} times two?", "reference_answer": str(2 * number)} for number in range(60)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "file", "path": str(tmp_path / "questions.jsonl"), "license": "mit"}
    (tmp_path / "doubles.yaml").write_text(json.dumps({"sources": [source]}))
    teacher = {
        "kind": "endpoint",
        "prompts": str(tmp_path / "doubles.yaml"),
        "base_url": f"http://127.0.0.1:{server.server_port}/v1",
        "model": "m",
        "opens_thinking": True,
        "price_usd_per_million": {"input": "1", "output": "10"},
        "sampling": {"max_tokens": 100},
    }
    (tmp_path / "teacher.yaml").write_text(json.dumps(teacher))
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path / "home"))
    Answers.asked.clear()
    yield tmp_path
    server.shutdown()


def distill(folder: Path, *more: str) -> dict:
    command = [sys.executable, "-m", "r1distill.pipeline.cli", "distill", "--teacher", str(folder / "teacher.yaml")]
    ended = subprocess.run([*command, "--json", *more], capture_output=True, text=True, timeout=120, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_two_pilots_at_once_do_not_spoil_each_other(workplace):
    run = Run.load("smollm2-135m", teacher=str(workplace / "teacher.yaml"))
    prompts = run.home / "prompts" / "doubles-12345678"
    with alone(run.home / "pilot" / prompts.name), pytest.raises(RequestError, match="another run is building .*pilot"):
        run_pilot(run, prompts, 5)


def test_what_a_pilot_paid_for_counts_towards_the_run(workplace):
    found = distill(workplace, "--pilot", "30")
    assert (found["prompts"], found["all_prompts"], found["states"]) == (30, 60, {"done": 30})
    by_name = {one["name"]: one for one in found["forecasts"]}
    truth = {"completion tokens": sum(20 + n for n in range(60)), "traces that pass": 30}
    truth["US dollars"] = (60 * 10 * 1 + truth["completion tokens"] * 10) / 1e6
    for name, value in truth.items():
        assert by_name[name]["low"] <= value <= by_name[name]["high"], name
    assert len(Answers.asked) == 30
    distill(workplace, "--pilot", "30")
    assert len(Answers.asked) == 30
    stages = distill(workplace, "--until", "verdicts")["stages"]
    assert len(Answers.asked) == len(set(Answers.asked)) == 60
    assert (stages["traces"]["kept"], stages["verdicts"]["kept"]) == (60, 30)
