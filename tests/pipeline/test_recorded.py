"""Real R1 output goes in through a configuration that maps columns, and comes out as verdicts and a training set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.data.config import ROOT

TRACES = ROOT / ".." / "shared" / "data" / "traces" / "mip_deepseek_r1.jsonl.gz"


@pytest.mark.skipif(not TRACES.is_file(), reason=f"real R1 traces are not part of the project: {TRACES} is absent")
def test_recorded_r1_traces_become_a_training_set(tmp_path):
    arguments = ["--teacher", "recorded", "--until", "packs", "--set", "student.packs.context_tokens=4096", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "r1distill.pipeline.cli", "distill", *arguments],
        cwd=ROOT,
        env={**os.environ, "R1DISTILL_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout.strip().splitlines()[-1])["stages"]
    assert stages["traces"]["read"] == 634
    assert stages["verdicts"]["read"] == 634
    assert stages["dataset"]["kept"] >= 590
    for name, stage in stages.items():
        assert stage["read"] == stage["kept"] + sum(stage["rejected"].values()), name

    from datasets import load_from_disk

    dataset = load_from_disk(stages["dataset"]["path"])
    assert set(dataset) == {"train", "validation"}
    assert sum(len(split) for split in dataset.values()) == stages["dataset"]["kept"]
    questions = [{row["messages"][0]["content"] for row in split} for split in dataset.values()]
    assert not questions[0] & questions[1], "a question stands in two splits"
    row = next(schema.rows(schema.read(Path(stages["dataset"]["path"]) / "train", schema.TRAINING_ROW)))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert len(row["messages"][1]["thinking"]) > 200

    packs = schema.read(Path(stages["packs"]["path"]) / "train", schema.PACK)
    members = [tuple(member.values()) for pack in packs["members"].to_pylist() for member in pack]
    assert len(members) == len(set(members))
    assert all(sum(pack["seq_lengths"]) == len(pack["input_ids"]) for pack in packs.to_pylist())
