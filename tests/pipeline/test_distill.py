"""The whole chain on real parts, killed in every stage: it finishes, pays for nothing twice, and its counts add up."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.pipeline import calibration
from r1distill.pipeline.stages import STAGES
from r1distill.students.catalogue import Student

NAMES = [stage.name for stage in STAGES if stage.name not in ("logits", "beyond")]  # it learns from text alone
TASK = "chain_sum: { count: %d, config: { min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1 } }"

BENCHMARK = f"""
title: A few sums
source: {{ kind: reasoning_gym, seed: 99, tasks: {{ {TASK % 4} }} }}
instruction: "Please reason step by step, and put your final answer within \\\\boxed{{}}."
k: 1
top_p: 1.0
max_tokens: 48
"""

PROMPTS = f"""
extends: arithmetic
sources: [{{ kind: reasoning_gym, seed: 3, tasks: {{ {TASK % 24} }} }}]
decontaminate: {{ against: [BENCHMARK], ngram: null }}
dataset: {{ validation_share: 0.2 }}
"""

STUDENT = """
extends: smollm2-135m
sft: { epochs: 1, batch_traces: 4, save_steps: 1 }
gate: { min_gain: null, min_share_of_teacher: null }
benchmarks: [BENCHMARK]
variant_questions: 2
score_teacher: false
"""


# No gates: what so small a run scores means nothing.
VARIANTS = (
    "{ q4_k_m: { importance: false, calibration_traces: 2, calibration_tokens: 64, kl_tokens: 16, "
    "gate: { min_recovered: 0.0, max_truncation_rise: 1.0, max_loop_rise: 1.0, max_kl: null } } }"
)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    (folder / "sums.yaml").write_text(BENCHMARK)
    benchmark = str(folder / "sums.yaml")
    (folder / "few.yaml").write_text(PROMPTS.replace("BENCHMARK", benchmark))
    (folder / "small.yaml").write_text(STUDENT.replace("BENCHMARK", benchmark))
    return folder


def command(folder: Path, *more: str) -> list[str]:
    names = ["--student", str(folder / "small.yaml"), "--prompts", str(folder / "few.yaml")]
    settings = ["--set", "teacher.sampling.max_tokens=48", "--set", f"student.variants={VARIANTS}"]
    return [sys.executable, "-m", "r1distill.pipeline.cli", "distill", *names, *settings, *more]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *more),
        cwd=folder,
        env={**os.environ, "R1DISTILL_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def answers(home: Path) -> dict[str, str]:
    """What the ledger holds and need not be asked again: {key: when it was answered}."""
    file = home / "ledger" / "ledger.sqlite"
    if not file.is_file():
        return {}
    with contextlib.closing(sqlite3.connect(file, timeout=60)) as ledger:
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'exchanges'").fetchone():
            return {}  # it is being made
        return dict(ledger.execute("SELECT key, created_at FROM exchanges WHERE state != 'failed'"))


def running(folder: Path) -> list[str]:
    """Command lines of live processes that mention the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder) in line and int(process.name) != os.getpid():
                found.append(line)
    return found


def under_way(home: Path, stage: str, answered: int) -> bool:
    """Whether a stage is in the middle of its work: some answers have come, a checkpoint is whole, a worker runs."""
    work = next((partial / ".work" for partial in (home / stage).glob(".*.partial")), None)
    if work is None or stage in ("traces", "scores"):
        return work is not None and len(answers(home)) > answered
    if stage == "checkpoint":
        return any(work.glob("checkpoints/checkpoint-*/GOOD"))
    return stage != "variants" or (work / "quantise.log").is_file()


def kill_in(folder: Path, stage: str) -> bool:
    """Start the chain and SIGKILL it alone in the middle of a stage; False where the stage was over before."""
    process, home = start(folder), folder / "home"
    answered = len(answers(home))
    while process.poll() is None and not any((home / stage).glob("*/manifest.json")):
        if under_way(home, stage, answered):
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return not any((home / stage).glob("*/manifest.json"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_every_stage_the_chain_finishes_and_asks_nothing_twice(workplace):
    home = workplace / "home"
    kept: dict[str, str] = {}
    caught = []
    for stage in NAMES:
        if kill_in(workplace, stage):
            caught.append(stage)
        now = answers(home)
        assert {key: now.get(key) for key in kept} == kept, f"killed in {stage}: an answer was lost or asked again"
        kept = now
    assert {"traces", "checkpoint", "variants", "scores"} <= set(caught)
    deadline = time.monotonic() + 60
    while (left := running(workplace)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, "servers or workers outlived the run that had started them"

    process = start(workplace, "--json")
    output, _ = process.communicate()
    assert process.returncode in (0, 3), output
    report = json.loads(output.strip().splitlines()[-1])
    assert list(report["stages"]) == NAMES
    for name, stage in report["stages"].items():
        assert stage["read"] == stage["kept"] + sum(stage["rejected"].values()), name
        assert Path(stage["path"]).is_dir()
    final = answers(home)
    assert {key: final.get(key) for key in kept} == kept
    traces = schema.read(Path(report["stages"]["traces"]["path"]), schema.TRACE)
    keys = list(zip(traces["prompt_id"].to_pylist(), traces["sample"].to_pylist(), strict=True))
    assert len(keys) == len(set(keys)) == report["stages"]["traces"]["read"]
    assert not list(home.rglob("*.partial"))
    measured = {one.stage: one for one in calibration.read(home)}
    assert not {"variants", "scores"} & set(measured)  # they resumed: their seconds are not those of the whole
    assert measured["checkpoint"].gib > 0.3 and measured["checkpoint"].tokens_per_second > 0

    bench = report["scores"]["benchmarks"]["sums"]["models"]
    assert set(bench) == {"base", "student", "q4_k_m"}
    assert {row["runtime"] for row in bench.values()} == {"vllm", "llama.cpp"}
    publication = Path(report["stages"]["publication"]["path"])
    assert (publication / "model" / "README.md").is_file()
    assert (publication / "model" / "model.safetensors").is_file()
    assert (publication / "dataset" / "README.md").is_file()


@pytest.mark.slow
def test_the_same_command_again_builds_nothing(workplace):
    if not (workplace / "home" / "publication").is_dir():
        pytest.skip("the chain above did not finish")
    before = answers(workplace / "home")
    process = start(workplace, "--json")
    output, _ = process.communicate(timeout=120)
    report = json.loads(output.strip().splitlines()[-1])
    assert not [name for name, stage in report["stages"].items() if stage["built"]]
    assert answers(workplace / "home") == before


def test_held_out_questions_share_none_with_the_training_prompts(tmp_path):
    """The real prompts of `make distill` against the real benchmark, through the real stage."""
    from r1distill.data import prompts
    from r1distill.data.benchmarks import questions
    from r1distill.data.config import load
    from r1distill.data.settings import Benchmark, PromptSet

    student = load("students", "smollm2-135m", Student)
    held_out = [load("benchmarks", name, Benchmark) for name in student.benchmarks]
    for name in ("arithmetic", "worked-tasks"):
        settings = load("prompts", name, PromptSet)
        result = prompts.build(settings, held_out, tmp_path / name)
        result.check("prompts")
        trained_on = set(schema.read(tmp_path / name, schema.PROMPT)["question"].to_pylist())
        asked = {row["question"] for bench in held_out for row in questions(bench)}
        assert len(asked) >= 40
        assert trained_on
        assert not trained_on & asked
        assert not {prompts.normalise(q) for q in trained_on} & {prompts.normalise(q) for q in asked}
