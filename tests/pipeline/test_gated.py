"""A gated repository without access is found out before anything starts, and named by the planner, from a Hub of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1distill.data import hub as the_hub

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Knows one open repository and one gated one; answers as the Hub does."""

    def do_GET(self) -> None:
        name = "/".join(self.path.split("?")[0].split("/")[3:5])
        if "auth-check" in self.path and name == "org/gated":
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif name in ("org/gated", "org/open"):
            gated = "manual" if name == "org/gated" else False
            self._answer(200, {"id": name, "sha": COMMIT, "gated": gated, "private": False, "siblings": []})
        else:
            self._answer(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: dict, headers: dict | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": len(content),
            **(headers or {}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("repository", "code", "words"),
    [
        ("org/gated", 2, ["org/gated is gated", "HF_TOKEN"]),
        ("org/missing", 2, ["there is no model org/missing"]),
        ("org/open", 0, [COMMIT]),
    ],
)
def test_access_is_checked_before_anything_starts(hub, tmp_path, repository, code, words):
    script = (
        "import sys\nfrom r1distill.data import models\nfrom r1distill.pipeline import cli\n"
        f"if {code} == 0:\n    print(models.revision(models.HubModel(kind='hub', repo='{repository}')))\n    sys.exit(0)\n"
        f"sys.argv = ['r1distill', 'distill', '--set', 'student.base={{kind: hub, repo: {repository}}}']\ncli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "R1DISTILL_HOME": str(tmp_path / "runs"),
             "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


WANTED = [("model", "org/gated"), ("model", "org/missing"), ("dataset", "org/open")]


def test_the_planner_names_what_this_account_may_not_have(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert the_hub.access(WANTED) == {"org/gated": "gated", "org/missing": "missing", "org/open": "granted"}


def test_a_granted_account_is_told_so_and_its_token_goes_to_the_hub_alone(hub, monkeypatch):
    seen = []

    def granted(self):
        seen.append(self.headers["Authorization"])
        self._answer(200, {"id": "org/gated", "gated": "auto"})

    monkeypatch.setattr(Hub, "do_GET", granted)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_TOKEN", "hf_ours")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert the_hub.access([("model", "org/gated")]) == {"org/gated": "granted"}
    assert seen == ["Bearer hf_ours"] * 2


@pytest.mark.parametrize(
    "variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}]
)
def test_without_a_network_nothing_is_claimed(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert set(the_hub.access(WANTED).values()) == {"not checked"}
