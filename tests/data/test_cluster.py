"""Verdicts over a Ray cluster of two nodes: the same artifact as one process makes, also where a worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from r1distill.data import cluster, schema, verdicts
from r1distill.data.errors import RequestError
from r1distill.data.settings import VerdictSettings

pytest.importorskip("ray", reason="ray is not installed")

TRACES = 1200


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def write_inputs(folder: Path) -> list[Path]:
    about = {"domain": "math", "verifier": "math", "verifier_args": "{}", "source": "test", "license": "mit"}
    prompts = [
        {**about, "prompt_id": f"p{n}", "question": f"What is {n}?", "reference_answer": str(n), "source_id": str(n)}
        for n in range(TRACES)
    ]
    empty = dict.fromkeys(schema.TRACE.names)
    traces = []
    for n in range(TRACES):
        response = f"It is \\boxed{{{n + (n % 4 == 0)}}}."
        text = {"completion": f"So.</think>{response}", "reasoning": "So.", "response": response}
        traces.append({**empty, **text, "prompt_id": f"p{n}", "sample": 0, "finish_reason": "stop", "state": "done"})
    schema.write(folder / "prompts", schema.PROMPT, prompts)
    schema.write(folder / "traces", schema.TRACE, traces)
    return [folder / "prompts", folder / "traces"]


def kill_a_worker_at_work(killed: list[int], stop: threading.Event) -> None:
    """SIGKILL the first of Ray's workers that is seen examining a batch."""
    while not (killed or stop.is_set()):
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"ray::_examine_batch" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed.append(int(process.name))
                    return
        time.sleep(0.01)


@pytest.mark.timeout(300)
def test_a_cluster_that_loses_a_worker_makes_the_same_verdicts(address, tmp_path):
    inputs, settings = write_inputs(tmp_path), VerdictSettings()
    alone = verdicts.build(settings, *inputs, tmp_path / "alone", tmp_path / "home-1")
    killed: list[int] = []
    stop = threading.Event()
    killer = threading.Thread(target=kill_a_worker_at_work, args=(killed, stop))
    killer.start()
    try:
        spread = verdicts.build(settings, *inputs, tmp_path / "spread", tmp_path / "home-2", ray_address=address)
    finally:
        stop.set()
        killer.join()
    assert killed
    assert spread == alone
    assert (spread.read, spread.kept) == (TRACES, TRACES * 3 // 4)
    tables = [schema.read(tmp_path / name, schema.VERDICT) for name in ("alone", "spread")]
    assert tables[0].equals(tables[1])


def test_a_cluster_that_is_not_there_is_named():
    with (
        pytest.raises(RequestError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"),
        cluster.connected("127.0.0.1:1"),
    ):
        pass
