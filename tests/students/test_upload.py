"""The real huggingface_hub client against a Hub on this machine: one commit a repository, whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students.upload import upload

COMMITS = r"^POST /api/\w+/[\w./-]+/commit/"


@pytest.fixture(autouse=True)
def account(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def send(hub, publication):
    """Upload the publication to the Hub on this machine."""

    def sent(**options):
        home = publication.parent.parent
        return list(upload(publication, home, endpoint=hub.url, **{"patience_seconds": 5, **options}))

    return sent


def repositories(hub):
    return {name: repo for (_, name), repo in hub.repos.items()}


def test_a_publication_arrives_whole_in_one_commit_each(hub, send, publication):
    dataset, model, collection = send()
    assert (dataset.repository, model.repository) == ("alice/Tiny-Traces", "alice/Tiny-R1")
    assert hub.count(COMMITS) == 2
    there = hub.repos["models", "alice/Tiny-R1"]
    assert [title for title, _ in there.commits] == ["initial commit", "r1distill: tiny-00000000"]
    assert there.private and hub.repos["datasets", "alice/Tiny-Traces"].private
    assert model.commit == there.id() and model.new and dataset.new
    for kind, repo in (("model", there), ("dataset", hub.repos["datasets", "alice/Tiny-Traces"])):
        files = {path for path in (publication / kind).rglob("*") if path.is_file()}
        assert repo.files.keys() == {str(path.relative_to(publication / kind)) for path in files} | {".gitattributes"}
        for path in files - {publication / "model" / "README.md"}:
            assert repo.files[str(path.relative_to(publication / kind))] == path.read_bytes()
    card = there.files["README.md"].decode()
    assert f"the dataset `alice/Tiny-Traces` at commit `{dataset.commit}`" in card
    assert "vllm serve alice/Tiny-R1 " in card and "datasets:\n- alice/Tiny-Traces" in card
    assert max(hub.sent.values()) == 1
    (made,) = hub.collections.values()
    assert made["private"] and set(made["items"]) == {("alice/Tiny-R1", "model"), ("alice/Tiny-Traces", "dataset")}
    assert collection.url.startswith(f"{hub.url}/collections/alice/")


def test_the_same_again_changes_nothing_and_sends_nothing(hub, send):
    first = send()
    asked = len(hub.asked)
    second = send()
    assert [one.commit for one in second] == [one.commit for one in first]
    assert not any(one.new for one in second)
    later = hub.asked[asked:]
    assert not [line for line in later if re.search(COMMITS + "|PUT|create|/resolve/", line)]
    assert len(hub.collections) == 1


def test_what_a_later_publication_no_longer_has_goes(hub, send, publication, failing, lay_out, publishing):
    send()
    failing("int8")
    lay_out(publishing)
    send()
    there = hub.repos["models", "alice/Tiny-R1"]
    assert len(there.commits) == 3 and not [path for path in there.files if path.startswith("variants/int8/")]
    assert len(hub.repos["datasets", "alice/Tiny-Traces"].commits) == 2


def test_large_objects_go_up_in_parts(hub, send):
    hub.part_bytes = 20_000
    send()
    many = [oid for oid, parts in hub.parts.items() if len(parts) > 1]
    assert many and set(many) <= hub.objects.keys()


def test_killed_in_the_middle_of_an_object_it_goes_on_without_sending_what_arrived(hub, send, publication):
    """The command itself, killed while one object of two is on its way."""
    oids = hashes(publication)
    (cut,) = {oid for path, oid in oids.items() if "validation-" in path}
    hub.cut = {cut}
    process = publish(hub, publication, "--to", "hub", wait=False)
    hub.on_cut = lambda: hub.sent and process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [len(repo.commits) for repo in repositories(hub).values()] == [1]
    arrived = dict(hub.sent)
    assert arrived and cut not in arrived
    hub.cut = set()
    send()
    assert [len(repo.commits) for repo in repositories(hub).values()] == [2, 2]
    assert hub.sent[cut] == 1 and {oid: hub.sent[oid] for oid in arrived} == arrived


def hashes(publication):
    """{path: sha256} as the publication says."""
    return dict(line.split("  ")[::-1] for line in (publication / "SHA256SUMS").read_text().splitlines())


def publish(hub, publication, *arguments, wait=True, **variables):
    """The command in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "r1distill.pipeline.cli", "publish", str(publication), *arguments],
        cwd=publication.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
             "R1DISTILL_HOME": str(publication.parent.parent), **variables},
    )  # fmt: skip
    return process.communicate(timeout=300) if wait else process


def test_the_command_lists_first(publication, capsys):
    from rich.console import Console

    from r1distill.pipeline import report
    from r1distill.students.publish import check

    report.show_files(publication, *check(publication, publication.parent.parent), Console(), as_json=True)
    files = json.loads(capsys.readouterr().out)["files"]
    assert {one["path"]: one["sha256"] for one in files} == hashes(publication)
    assert all(one["size"] == (publication / one["path"]).stat().st_size for one in files)
    assert {one["repository"] for one in files} == {"Tiny-Traces", "Tiny-R1"}


def test_the_command_uploads_when_told_and_opens_what_it_loaded_back(hub, publication):
    said, warned = publish(hub, publication, "--to", "hub", "--public")
    assert f"published: model {hub.url}/alice/Tiny-R1 at {hub.repos['models', 'alice/Tiny-R1'].id()}, new" in said, (
        warned
    )
    assert not any(repo.private for repo in repositories(hub).values())
    assert not any(one["private"] for one in hub.collections.values())
    opened, loaded = (
        [number for number, line in enumerate(hub.asked) if re.search(pattern, line)]
        for pattern in ("PUT .*/settings", "GET .*/resolve/")
    )
    assert min(opened) > max(loaded)


# What the Hub may answer.


def test_a_limit_is_waited_out(hub, send):
    for pattern in ("POST .*/preupload/", "PUT /storage/", COMMITS, "GET /api/models/"):
        hub.fail(pattern, 429, Retry_After="1")
    began = time.monotonic()
    send()
    assert time.monotonic() - began > 4
    assert [len(repo.commits) for repo in repositories(hub).values()] == [2, 2]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, send):
    hub.lost = 2
    send()
    assert [len(repo.commits) for repo in repositories(hub).values()] == [2, 2]


def test_a_token_that_may_not_write_is_told_so(hub, send, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(RequestError, match=r"refuses alice/Tiny-Traces \(403\).*may not write there"):
        send()


def test_a_wrong_token_is_told_so_before_anything_is_sent(hub, send, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys_token")
    with pytest.raises(RequestError, match="does not know the token in HF_TOKEN") as refused:
        send()
    assert "nobodys" not in str(refused.value)
    assert hub.asked == ["GET /api/whoami-v2"]


def test_without_a_token_nothing_is_asked(hub, send, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(RequestError, match="set HF_TOKEN"):
        send()
    assert not hub.asked


def test_without_a_network_it_says_so(hub, send):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(R1DistillError, match="can't be reached"):
        send()


def test_what_never_ends_is_given_up_and_nothing_is_lost(hub, send):
    hub.fail(COMMITS, 503, times=99)
    with pytest.raises(R1DistillError, match=r"answers 503 for alice/Tiny-Traces.*the same command goes on"):
        send(patience_seconds=2)
    hub.faults.clear()
    sent = dict(hub.sent)
    send()
    assert {oid: hub.sent[oid] for oid in sent} == sent


def test_signatures_of_addresses_stay_out_of_the_log(hub, send, caplog):
    hub.fail("PUT /storage/", 500)
    send()
    assert "500 thrown while requesting PUT" in caplog.text
    assert "signature=secret" not in caplog.text


# Public and private.


def test_a_repository_that_is_public_already_takes_nothing_new_unless_told(hub, send):
    send(public=True)
    assert send()
    repo = hub.repos["datasets", "alice/Tiny-Traces"]
    repo.commits.append(("an edit on the web", {**repo.files, "README.md": b"---\nlicense: mit\n---\n"}))
    with pytest.raises(RequestError, match="alice/Tiny-Traces is public.*--public"):
        send()
    send(public=True)
    assert repo.files["README.md"] != b"---\nlicense: mit\n---\n"


# Loading back.


def test_damage_on_the_way_is_found_by_loading_back_and_nothing_is_opened(hub, send, publication):
    oids = hashes(publication)
    name = next(path for path in oids if path.endswith(".parquet"))
    hub.damaged = {oids[name]}
    with pytest.raises(
        R1DistillError, match=f"(?s)alice/Tiny-Traces at .*{name.removeprefix('dataset/')} comes back with"
    ):
        send(public=True)
    assert all(repo.private for repo in repositories(hub).values())
    hub.damaged = set()
    assert [one.new for one in send()] == [False, True, False]


def test_a_dataset_that_cannot_be_opened_is_found_by_loading_it_back(tmp_path):
    from r1distill.students.upload import _load_dataset, _load_model

    head = (
        '---\nconfigs: [{config_name: default, data_files: [{split: train, path: "parquet/train-*.parquet"}]}]\n---\n'
    )
    (tmp_path / "README.md").write_text(head)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / "train-0.parquet").write_bytes(b"PAR1 and no more")
    assert "datasets can't load it" in next(_load_dataset(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "transformers can't load it" in next(_load_model(tmp_path))
