"""The publication holds what passed, names what was withheld, and leaks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from r1distill.data.config import load
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import publish
from r1distill.students.catalogue import Student

LINEAGE = {
    "student": "smollm2-135m",
    "base": "base",
    "base_revision": "1",
    "teacher": "embedded",
    "prompts": "arithmetic",
}
ROW = {"accuracy": 0.7, "low": 0.6, "high": 0.8, "questions": 10, "k": 2, "truncated": 0.0, "mean_tokens": 40.0,
       "size_bytes": 1_000_000, "runtime": "vllm", "seconds": 1.0}  # fmt: skip


@pytest.fixture
def student() -> Student:
    return load("students", "smollm2-135m", Student)


@pytest.fixture
def inputs(tmp_path, student) -> dict[str, Path]:
    """Artifacts as the stages leave them, with one byte where there would be weights."""
    folders = {stage: tmp_path / stage for stage in ("dataset", "checkpoint", "variants", "scores")}
    for stage, folder in folders.items():
        folder.mkdir()
        manifest = {"fingerprint": stage * 4, "kept": 300, "metrics": {"steps": 100}, "versions": {"torch": "2.13.0"}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    for file in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "loss.json"):
        (folders["checkpoint"] / file).write_text("x")
    for name in student.variants:
        (folders["variants"] / name).mkdir()
        (folders["variants"] / name / "weights").write_text("x")
    (folders["dataset"] / "parquet").mkdir()
    (folders["dataset"] / "parquet" / "train-00000-of-00001.parquet").write_text("x")
    (folders["dataset"] / "README.md").write_text("---\nlicense: mit\n---\n# traces\n")
    write_gates(folders, student)
    return folders


def write_gates(folders: dict[str, Path], student: Student, failed: str | None = None) -> None:
    models = dict.fromkeys(("base", "teacher", "student", *student.variants), ROW)
    gates = [
        {"name": "recovered accuracy", "model": name, "passed": name != failed, "message": "recovered accuracy: 50.0%"}
        for name in ("checkpoint", *student.variants)
    ]
    scores = {"benchmarks": {"arithmetic": {"title": "Sums", "models": models}}, "gates": gates}
    (folders["scores"] / "scores.json").write_text(json.dumps(scores))


def test_both_repositories_are_complete_and_the_card_can_be_read(inputs, student, tmp_path):
    result = publish.build(student, inputs, tmp_path / "out", lineage=LINEAGE)
    result.check("publication")
    model = tmp_path / "out" / "model"
    assert {path.name for path in model.iterdir()} >= {"model.safetensors", "config.json", "README.md", "variants"}
    assert not (model / "manifest.json").exists()
    assert not (model / "loss.json").exists()
    assert {path.name for path in (model / "variants").iterdir()} == set(student.variants)
    assert (tmp_path / "out" / "dataset" / "parquet" / "train-00000-of-00001.parquet").is_file()
    _, head, body = (model / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "apache-2.0"
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 70.0
    assert "60.0% – 80.0%" in body
    assert "checkpoint" * 4 in body


def test_a_variant_that_failed_its_gate_is_withheld_and_named(inputs, student, tmp_path):
    write_gates(inputs, student, failed="int8")
    result = publish.build(student, inputs, tmp_path / "out", lineage=LINEAGE)
    assert result.rejected == {"failed its gate": 1}
    assert not (tmp_path / "out" / "model" / "variants" / "int8").exists()
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "withheld: recovered accuracy: 50.0%" in card
    assert "vllm serve ./variants/int8" not in card


def test_a_checkpoint_that_failed_its_gate_is_not_published(inputs, student, tmp_path):
    write_gates(inputs, student, failed="checkpoint")
    with pytest.raises(R1DistillError, match="nothing is published"):
        publish.build(student, inputs, tmp_path / "out", lineage=LINEAGE)


def test_a_file_with_a_key_in_it_stops_the_publication(inputs, student, tmp_path):
    (inputs["checkpoint"] / "config.json").write_text(json.dumps({"token": "hf_" + "a" * 34}))
    with pytest.raises(R1DistillError, match="key or token"):
        publish.build(student, inputs, tmp_path / "out", lineage=LINEAGE)


def test_uploading_without_a_token_or_a_publication_is_refused(inputs, student, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RequestError, match="no publication"):
        list(publish.upload(tmp_path / "out", student))
    publish.build(student, inputs, tmp_path / "out", lineage=LINEAGE)
    with pytest.raises(RequestError, match="HF_TOKEN"):
        list(publish.upload(tmp_path / "out", student))
