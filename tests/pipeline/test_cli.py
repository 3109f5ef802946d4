"""What a user meets at the command line: clear messages, the right exit code, nothing heavy on the quick paths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.pipeline import runner
from r1distill.pipeline.run import Run


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
        (["distill", "--until", "packs", "--to", "hub"], ["--to hub uploads the publication", "leave out --until"]),
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


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one MiB; making it needs the right to mount, so what uses it runs where tests run as root."""
    home = tmp_path / "tiny"
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield home
    subprocess.run(["umount", str(home)], check=False)


def test_a_disk_that_is_too_small_is_said_before_anything_starts(tmp_path, tiny_disk):
    done = r1distill("distill", home=tmp_path, R1DISTILL_HOME=str(tiny_disk))
    assert done.returncode == 2
    assert "disk:" in done.stderr
    assert not list(tiny_disk.iterdir())


def test_a_disk_that_is_full_when_a_stage_starts_is_said_and_nothing_is_sealed(tiny_disk, monkeypatch):
    monkeypatch.setenv("R1DISTILL_HOME", str(tiny_disk))
    run = Run.load("smollm2-135m")
    with pytest.raises(R1DistillError, match="free disk"):
        list(runner.execute(runner.chain(run, until="prompts")))
    assert not list(tiny_disk.glob("*/*/manifest.json"))


def test_a_disk_that_fills_up_within_a_stage_is_said_and_nothing_is_sealed(tiny_disk, monkeypatch):
    monkeypatch.setenv("R1DISTILL_HOME", str(tiny_disk))
    monkeypatch.setattr(runner, "LEAST_MIB", 0)
    many = ["prompts.sources.0.tasks.leg_counting.count=9000"]
    run = Run.load("smollm2-135m", overrides=many)
    with pytest.raises(R1DistillError, match="No space left.*Nothing was sealed"):
        list(runner.execute(runner.chain(run, until="prompts")))
    assert not list(tiny_disk.glob("*/*/manifest.json"))
