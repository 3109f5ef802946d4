"""What a user meets at the command line: clear messages, the right exit code, nothing heavy on the quick paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def r1distill(*arguments: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1distill.pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env={**os.environ, "R1DISTILL_HOME": str(home / "runs"), "HF_HUB_OFFLINE": "1", **variables},
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distill", "--student", "qwen14b"], ["there is no student 'qwen14b'", "Did you mean 'qwen-14b'"]),
        (["distill", "--teacher", "embeded"], ["Did you mean 'embedded'"]),
        (["distill", "--prompts", "arithmetics"], ["Did you mean 'arithmetic'"]),
        (["distill", "--hardware", "8xh10"], ["Did you mean '8xh100'"]),
        (["distill", "--until", "trace"], ["there is no stage 'trace'", "Did you mean 'traces'"]),
        (["distill", "--set", "student.sft.epoch=3"], ["--set sft.epoch", "Did you mean 'epochs'"]),
        (["distill", "--set", "student.sft.epochs=many"], ["sft.epochs", "found 'many'"]),
        (["distill", "--set", "students.sft.epochs=1"], ["there is no section 'students'", "Did you mean 'student'"]),
        (["distill", "--teacher", "recorded", "--set", "teacher.source.path=nowhere.jsonl",
          "--set", "prompts.sources.0.path=nowhere.jsonl"], ["there is no file nowhere.jsonl"]),
        (["verify", "nowhere.jsonl", "--out", "x"], ["nowhere.jsonl"]),
        (["serve", "--teacher", "recorded"], ["nothing to serve"]),
        (["inspect"], ["no traces artifact"]),
        (["publish"], ["no publication"]),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_one_clear_message_and_exit_code_2(tmp_path, arguments, words):
    done = r1distill(*arguments, home=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not list((tmp_path / "runs").glob("*/*")) if (tmp_path / "runs").exists() else True


def test_a_student_that_this_machine_cannot_carry_is_refused_before_anything_starts(tmp_path):
    # A cluster of this shape is nowhere: even on a machine with GPUs the laptop's configuration can't hold 14B.
    done = r1distill("distill", "--student", "qwen-14b", "--hardware", "laptop", home=tmp_path)
    assert done.returncode == 2, done.stdout
    for word in ("GPU", "r1distill plan", "HARDWARE", "TEACHER=recorded"):
        assert word in done.stderr
    assert not (tmp_path / "runs").exists()


def test_plan_answers_as_json_and_exits_2_where_it_does_not_fit(tmp_path):
    fits = r1distill("plan", "--student", "smollm2-135m", "--hardware", "laptop", "--json", home=tmp_path)
    assert fits.returncode == 0, fits.stderr
    assert json.loads(fits.stdout)["fits"] is True
    too_big = r1distill("plan", "--student", "qwen-32b", "--hardware", "8xh100", "--json", home=tmp_path)
    assert too_big.returncode == 2
    assert json.loads(too_big.stdout)["fits"] is False


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "--hardware", "laptop"], ["status"], ["distill", "--dry-run"], ["distill", "--help"]],
)
def test_quick_commands_import_neither_torch_nor_vllm(tmp_path, arguments):
    code = (
        "import sys\nfrom r1distill.pipeline import cli\nsys.argv = ['r1distill', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'vllm', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        env={**os.environ, "R1DISTILL_HOME": str(tmp_path / "runs")},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_dry_run_names_every_stage_and_builds_nothing(tmp_path):
    done = r1distill("distill", "--dry-run", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["stage"] for row in rows] == (
        ["prompts", "traces", "verdicts", "dataset", "packs", "checkpoint", "variants", "scores", "publication"]
    )
    assert {row["state"] for row in rows} == {"missing"}
    assert not (tmp_path / "runs").exists()


def test_a_changed_setting_rebuilds_from_its_stage_on_and_nothing_before_it(tmp_path):
    def paths(*more: str) -> dict[str, str]:
        done = r1distill("distill", "--dry-run", "--json", *more, home=tmp_path)
        return {row["stage"]: row["path"] for row in json.loads(done.stdout)}

    plain, tuned = paths(), paths("--set", "student.sft.learning_rate=0.001")
    same = [stage for stage in plain if plain[stage] == tuned[stage]]
    assert same == ["prompts", "traces", "verdicts", "dataset", "packs"]
    assert plain == paths("--set", "student.sft.save_steps=3", "--set", "teacher.client.in_flight=5")


def test_a_full_disk_is_said_and_leaves_nothing_sealed(tmp_path):
    """A home on a file system of one MiB; needs the right to mount, so it runs where tests run as root."""
    home = tmp_path / "tiny"
    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        done = r1distill("distill", "--until", "prompts", home=tmp_path, R1DISTILL_HOME=str(home))
        assert done.returncode == 1
        assert "free disk" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(home.glob("*/*/manifest.json"))
    finally:
        subprocess.run(["umount", str(home)], check=False)
