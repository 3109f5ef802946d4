"""Artifacts are whole or not there, and a fingerprint means one thing."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.pipeline.artifact import MANIFEST, WORK, building, find, fingerprint, place, seal


def make(path: Path, text: str = "hello") -> None:
    with building(path) as partial:
        (partial / "data.txt").write_text(text)
        (partial / WORK / "resume.txt").write_text("for resuming")
        seal(partial, path, {"fingerprint": "f" * 64})


def test_fingerprint_does_not_depend_on_key_order_but_on_every_value():
    one = fingerprint({"a": 1, "b": {"c": [1, 2.5, None, True], "d": "x"}})
    assert one == fingerprint({"b": {"d": "x", "c": [1, 2.5, None, True]}, "a": 1})
    assert one != fingerprint({"a": 1, "b": {"c": [1, 2.5, None, False], "d": "x"}})
    assert len(one) == 64


@pytest.mark.parametrize("value", [object(), {1, 2}, Path("x"), float("nan"), b"bytes", {1: "a"}])
def test_fingerprint_refuses_what_it_cannot_write_down_in_one_way(value):
    with pytest.raises(R1DistillError, match=r"identity\.settings"):
        fingerprint({"settings": value})


def test_a_sealed_artifact_is_found_and_holds_no_resume_files(tmp_path):
    path = place(tmp_path, "traces", "embedded", "f" * 64)
    assert path.name == "embedded-ffffffff"
    assert find(path, "f" * 64) is None
    make(path)
    artifact = find(path, "f" * 64)
    assert artifact and artifact.manifest["files"] == {"data.txt": 5}
    assert sorted(p.name for p in path.iterdir()) == ["data.txt", MANIFEST]


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "list", "files", "sizes", "foreign"])
def test_a_damaged_artifact_is_named_and_not_trusted(tmp_path, damage):
    path = tmp_path / "traces" / "embedded-ffffffff"
    make(path)
    if damage == "truncate":
        (path / "data.txt").write_text("hel")
    elif damage == "delete":
        (path / "data.txt").unlink()
    elif damage == "manifest":
        (path / MANIFEST).write_text('{"fingerprint": "ff')
    elif damage in ("list", "files", "sizes"):
        found = {"list": [], "files": {"fingerprint": "f" * 64, "files": None}}
        sizes = {"fingerprint": "f" * 64, "files": {"data.txt": "five"}}
        (path / MANIFEST).write_text(json.dumps(found.get(damage, sizes)))
    else:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps({**manifest, "fingerprint": "ffffffff" + "0" * 56}))
    with pytest.raises(R1DistillError, match=str(path)):
        find(path, "f" * 64)


def test_an_exception_leaves_the_partial_folder_for_the_next_attempt(tmp_path):
    path = tmp_path / "traces" / "a"
    with pytest.raises(ZeroDivisionError), building(path) as partial:
        (partial / WORK / "seen.txt").write_text("1")
        raise ZeroDivisionError
    assert not path.exists()
    with building(path) as partial:
        assert (partial / WORK / "seen.txt").read_text() == "1"


def test_one_killed_between_its_manifest_and_the_rename_is_built_again(tmp_path, monkeypatch):
    path = tmp_path / "traces" / "a"
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make(path)
    assert (tmp_path / "traces" / ".a.partial" / MANIFEST).is_file()
    with building(path) as partial:
        seal(partial, path, {"fingerprint": "f" * 64, "seconds": 12.5})
    artifact = find(path, "f" * 64)
    assert artifact and artifact.manifest["files"] == {"data.txt": 5}


def test_one_that_another_run_has_sealed_meanwhile_leaves_nothing_half_built(tmp_path):
    path = tmp_path / "traces" / "a"
    make(path)
    with building(path):
        assert find(path, "f" * 64)
    assert sorted(p.name for p in path.parent.iterdir() if p.is_dir()) == ["a"]


def _hold(path: Path) -> None:
    with building(path) as partial:
        (partial / "held").touch()
        time.sleep(60)


def test_two_runs_of_one_artifact_are_kept_apart_and_a_killed_one_frees_the_lock(tmp_path):
    path = tmp_path / "traces" / "a"
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(path,))
    holder.start()
    held = tmp_path / "traces" / ".a.partial" / "held"
    while not held.exists():
        time.sleep(0.01)
    with pytest.raises(RequestError, match="another run is building"), building(path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    make(path)
    assert find(path, "f" * 64)
