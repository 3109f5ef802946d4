"""A gated repository without access is found out before anything starts, and named by the planner, from a Hub of ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from r1distill.data import hub as the_hub

FILES = {"config.json": b"{}", "LICENSE": b"the terms", "model.safetensors": b"weights"}
WANTED = [("model", "org/gated"), ("model", "org/missing"), ("dataset", "org/open")]

SCRIPT = """
import sys
from pathlib import Path
from r1distill.data import models
from r1distill.pipeline import cli

if {open}:
    model = models.HubModel(kind="hub", repo="{repository}")
    print(models.revision(model))
    folder = models.materialise(model, Path("home"), files=["LICENSE*", "*.json"])
    print(sorted(file.name for file in folder.iterdir()), (folder / "LICENSE").read_text())
    sys.exit(0)
sys.argv = ["r1distill", "distill", "--set", "student.base={{kind: hub, repo: {repository}}}"]
cli.main()
"""


@pytest.fixture(autouse=True)
def repositories(hub):
    hub.add("models", "org/open", FILES)
    hub.add("datasets", "org/open", FILES)
    hub.add("models", "org/gated", FILES, gated="manual")


@pytest.mark.parametrize(
    ("repository", "code", "words"),
    [
        ("org/gated", 2, ["org/gated is gated", "HF_TOKEN"]),
        ("org/missing", 2, ["there is no model org/missing"]),
        ("org/open", 0, ["['LICENSE', 'config.json'] the terms"]),
    ],
)
def test_access_is_checked_before_anything_starts(hub, tmp_path, repository, code, words):
    script = SCRIPT.format(open=code == 0, repository=repository)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "R1DISTILL_HOME": str(tmp_path / "runs"),
             "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stdout + done.stderr
    if code == 0:
        assert hub.repos["models", repository].id() in done.stdout
        assert not hub.count("resolve/.*/model.safetensors")
    assert not (tmp_path / "runs").exists()


def test_the_planner_names_what_this_account_may_not_have(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert the_hub.access(WANTED) == {"org/gated": "gated", "org/missing": "missing", "org/open": "granted"}


def test_a_granted_account_is_told_so_and_its_token_goes_to_the_hub_alone(hub, monkeypatch):
    hub.tokens = {"hf_ours": "read"}
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert the_hub.access([("model", "org/gated")]) == {"org/gated": "granted"}
    assert hub.authorizations == ["Bearer hf_ours"] * 2


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}]
)
def test_without_a_network_nothing_is_claimed(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert set(the_hub.access(WANTED).values()) == {"not checked"}
