"""Sampling by clients on a Ray cluster of two nodes, one of them killed: every answer once, nothing asked twice."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.teacher import traces
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.settings import EndpointTeacher

pytest.importorskip("ray", reason="ray is not installed")

QUESTIONS = [f"What is {number}?" for number in range(400)]


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def kill_a_client(fake, killed: list[int], stop: threading.Event) -> None:
    """SIGKILL one of Ray's workers once a quarter of the questions has been asked."""
    while not stop.is_set():
        if fake.asked.total() < len(QUESTIONS) // 4:
            time.sleep(0.01)
            continue
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"ray::_ask_share" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))
                    return


@pytest.mark.timeout(300)
def test_a_client_that_is_killed_costs_no_answer(address, fake, tmp_path):
    fake.delay = 0.1
    rest = {"verifier": "math", "verifier_args": "{}", "source": "s", "license": "mit", "reference_answer": "4"}
    rows = [
        {"prompt_id": f"{n:x}", "question": q, "domain": "math", "source_id": q, **rest}
        for n, q in enumerate(QUESTIONS)
    ]
    schema.write(tmp_path / "prompts", schema.PROMPT, rows)
    teacher = EndpointTeacher.model_validate(
        {
            "kind": "endpoint", "name": "t", "prompts": "p", "base_url": fake.url, "model": "fake",
            "client": {"in_flight": 8, "backoff_seconds": 0.01}, "sampling": {"max_tokens": 50},
        }
    )  # fmt: skip
    inputs = teacher, tmp_path / "prompts", tmp_path / "out", tmp_path / "home", ""
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_a_client, args=(fake, killed, stop))
    killer.start()
    try:
        result = traces.build(*inputs, ray_address=address)
    finally:
        stop.set()
        killer.join()
    assert killed
    assert (result.read, result.kept) == (len(QUESTIONS), len(QUESTIONS))
    found = schema.read(tmp_path / "out", schema.TRACE)
    assert found["prompt_id"].to_pylist() == [f"{n:x}" for n in range(len(QUESTIONS))]
    again = fake.asked.total() - len(QUESTIONS)
    assert 0 <= again <= teacher.client.in_flight  # what was in flight at the killed client alone
    assert [file.name for file in (tmp_path / "home" / "ledger").glob("*.sqlite")] == ["ledger.sqlite"]
    with Ledger(tmp_path / "home" / "ledger") as ledger:
        assert not ledger.spent_usd("x")
    alone = traces.build(*inputs)
    assert fake.asked.total() == len(QUESTIONS) + again
    assert (alone.read, alone.kept, alone.metrics["asked_now"]) == (len(QUESTIONS), len(QUESTIONS), 0)
