"""The report: from artifacts alone, the same bytes twice, nothing loaded from elsewhere, nothing said that isn't there."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1distill.data import schema
from r1distill.data.errors import RequestError
from r1distill.pipeline import page, published
from r1distill.pipeline.evaluation import ANSWER
from r1distill.pipeline.metrics import paired, question_means, summary
from r1distill.pipeline.published import figure

QWEN = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def answers(model: str, bench: str, right: int, questions: int = 20) -> list[dict]:
    """``right`` of every four answers to a question."""
    return [
        {
            "model": model, "benchmark": bench, "prompt_id": f"q{q}", "difficulty": str(q % 5 + 1), "sample": n,
            "completion": "text", "answer": str(n < right), "vote": int(n >= right), "correct": n < right,
            "reason": None if n < right else "correctness: wrong answer", "loops": False, "completion_tokens": 100 + 7 * q + n,
        }
        for q in range(questions)
        for n in range(4)
    ]  # fmt: skip


def seal(home: Path, stage: str, label: str, digest: str, inputs: dict[str, str], **more) -> Path:
    folder = home / stage / f"{label}-{digest[:8]}"
    folder.mkdir(parents=True)
    day = ["prompts", "traces", "verdicts", "scores", "checkpoint", "logits", "beyond"].index(stage) + 1
    manifest = {
        "stage": stage, "label": label, "fingerprint": digest, "inputs": inputs, "read": 10, "kept": 8, "unit": "rows",
        "rejected": {"a | b": 2}, "seconds": 1.5, "metrics": {}, "created_at": f"2025-01-0{day}T00:00:00", **more,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def build(home: Path, student: str = "qwen-1.5b", passed: bool | None = True) -> None:
    rows = answers("base", "math500", 1) + answers("student", "math500", 3) + answers("twin", "math500", 3)
    by_model = {name: [row for row in rows if row["model"] == name] for name in ("base", "twin", "student")}
    models = {name: {**summary(each), "size_bytes": 1, "runtime": "vllm"} for name, each in by_model.items()}
    student_means = question_means(by_model["student"])
    against = [
        {"model": "student", "against": name, **paired(student_means, question_means(by_model[name]))}
        for name in ("base", "twin")
    ]
    settings = {"revision": "abc", "k": 4, "temperature": 0.6, "top_p": 0.95, "max_tokens": 32768, "limit": None}
    bench = {"title": "MATH-500", "settings": settings, "models": models, "comparisons": against}
    check = {"passed": passed, "message": "published 83.9%, found 75.0%"}
    scores = {
        "benchmarks": {"math500": {**bench, "published": figure(QWEN, "math500").as_dict()}},
        "reproduction": {"applies": True, "passed": passed, "checks": [check], "reason": None},
        "gates": [{"name": "reproduction", "model": "checkpoint", **check}],
    }
    if passed is None:
        scores |= {"reproduction": {"applies": False, "passed": None, "checks": [], "reason": "no twin"}, "gates": []}
    seal(home, "prompts", "mix", "a" * 64, {})
    seal(home, "traces", "teacher", "b" * 64, {"prompts": "a" * 64})
    verdicts = seal(home, "verdicts", "teacher", "c" * 64, {"prompts": "a" * 64, "traces": "b" * 64})
    found = [("p1", 0, "pass"), ("p1", 1, "fail"), ("p2", 0, "pass"), ("p3", 0, "unverifiable")]
    rows_of = [
        {
            "prompt_id": p,
            "sample": n,
            "check": "correctness",
            "outcome": o,
            "reason": None,
            "detail": None,
            "version": "1",
        }
        for p, n, o in found
    ]
    schema.write(verdicts, schema.VERDICT, rows_of)
    folder = seal(home, "scores", student, "d" * 64, {"verdicts": "c" * 64}, metrics={"scores": scores})
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWER), folder / "answers.parquet")


class Page(HTMLParser):
    """What a page holds: cells, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.loaded, self.open = [], [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_report_holds_what_the_artifacts_do_in_both_forms(tmp_path):
    build(tmp_path)
    md, html, *plots = page.write(tmp_path, "qwen-1.5b", tmp_path / "report")
    text = md.read_text()
    for word in (
        "| prompts | 10 | 8 | rows | 1.5 | 2 a \\| b | mix-aaaaaaaa |",
        "student against base: better by 50.0% (95%: +50.0 to +50.0%), 20 questions, paired",
        "student against twin: no difference is shown",
        "Published for DeepSeek-R1-Distill-Qwen-1.5B: pass@1 83.9% (k = 16, temperature 0.6, top-p 0.95, 32,768 tokens;",
        "Reproduced: published 83.9%, found 75.0%.",
        "75.0% (75.0% – 75.0%)",
        "| DeepSeek-R1 | 79.8% | – |",
        "70.0% (cons@64 86.7%) | not measured |",
    ):
        assert word in text, word
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == [file.name for file in plots]
    assert {file.name for file in plots} == {
        f"qwen-1.5b-{n}.png" for n in ("accuracy", "lengths", "difficulty", "pass-rates")
    }
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 3000 for file in plots)
    parsed = Page()
    parsed.feed(html.read_text())
    assert not parsed.open
    assert len(parsed.loaded) == 4 and all(one.startswith("data:image/png;base64,") for one in parsed.loaded)
    assert "2 a | b" in parsed.cells and "75.0% – 75.0%" in parsed.cells


def test_the_same_artifacts_make_the_same_bytes(tmp_path):
    build(tmp_path)
    first, again = (page.write(tmp_path, "qwen-1.5b", tmp_path / name) for name in ("one", "two"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_scores_of_a_harness_that_reproduces_nothing_do_not_count(tmp_path):
    build(tmp_path, passed=False)
    text = page.write(tmp_path, "qwen-1.5b", tmp_path / "report")[0].read_text()
    assert "NOT reproduced" in text and "does not count: the harness does not reproduce its twin" in text


def test_scores_without_a_twin_are_not_called_unreproduced(tmp_path):
    """As those of a student that was trained to teach another."""
    build(tmp_path, passed=None)
    text = page.write(tmp_path, "qwen-1.5b", tmp_path / "report")[0].read_text()
    assert "Not applicable: no twin." in text and "its published twin was not scored" in text
    assert "does not count" not in text


def test_the_newest_artifacts_are_shown_and_those_that_made_them(tmp_path):
    build(tmp_path)
    seal(tmp_path, "prompts", "other", "e" * 64, {})
    stages = page.chain(tmp_path, "qwen-1.5b")
    assert {stage: folder.name for stage, (folder, _) in stages.items()} == {
        "prompts": "mix-aaaaaaaa", "traces": "teacher-bbbbbbbb", "verdicts": "teacher-cccccccc", "scores": "qwen-1.5b-dddddddd",
    }  # fmt: skip
    seal(tmp_path, "scores", "qwen-7b", "f" * 64, {}, metrics={"scores": {"benchmarks": {}}})  # by an earlier version
    with pytest.raises(RequestError, match="make distill STUDENT=qwen-7b"):
        page.chain(tmp_path, "qwen-7b")


def test_every_published_figure_is_in_the_table(tmp_path):
    build(tmp_path)
    text = page.write(tmp_path, "qwen-1.5b", tmp_path / "report")[0].read_text()
    for model in published.MODELS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {model} ")]
        for bench in published.TABLE:
            assert f"{figure(model, bench).accuracy:.1%}" in line


def test_a_student_of_two_hops_names_who_taught_it_and_how_that_one_scored(tmp_path):
    build(tmp_path, "first")
    seal(tmp_path, "checkpoint", "first", "e" * 64, {"verdicts": "c" * 64})
    scores = tmp_path / "scores" / f"first-{'d' * 8}" / "manifest.json"
    told = json.loads(scores.read_text())
    scores.write_text(json.dumps({**told, "inputs": {"checkpoint": "e" * 64}}))
    decides = {"teacher": [{"kind": "checkpoint", "fingerprint": "e" * 64}, "e" * 64], "k": 16}
    about = {"metrics": {"teacher": "first", "k": 16}, "identity": {"decides": decides}}
    seal(tmp_path, "logits", "second-via-first", "f" * 64, {"prompts": "a" * 64}, **about)
    seal(tmp_path, "checkpoint", "second-via-first", "1" * 64, {"logits": "f" * 64})
    text = page.write(tmp_path, "second-via-first", tmp_path / "report")[0].read_text()
    for word in (
        f"first ({'e' * 64}), its 16 most probable tokens in 8 places.",
        "| checkpoint | 10 | 8 | rows | 1.5 | 2 a \\| b | first-eeeeeeee |",
        "### first: MATH-500 (math500)",
        "| checkpoint | 10 | 8 | rows | 1.5 | 2 a \\| b | second-via-first-11111111 |",
        "Not scored yet.",
    ):
        assert word in text, word


def test_what_it_learned_from_its_own_answers_is_told(tmp_path: Path) -> None:
    found = {"steps": 50, "answers": 1600, "tokens": 80_000, "teacher": "org/big"}
    found |= {"first_right": 0.25, "last_right": 0.5, "first_mean_tokens": 60, "last_mean_tokens": 40}
    found |= {"first_loss": 0.5, "last_loss": 0.25, "first_cut_off": 0.1, "last_cut_off": 0.0}
    decides = {"decides": {"teacher": [{"kind": "hub", "repo": "org/big"}, "abc"]}}
    folder = seal(tmp_path, "beyond", "mine", "a" * 64, {}, metrics=found, identity=decides)
    (folder / "loss.png").write_bytes(b"\x89PNG")
    text = page.write(tmp_path, "mine", tmp_path / "out")[0].read_text()
    assert "50 steps towards the probabilities of org/big (abc), on 1,600 answers of 80,000 tokens." in text
    assert "| last step | 50.0% | 0.0% | 40 | 0.2500 |" in text
    assert (tmp_path / "out" / "mine-own-answers.png").read_bytes() == b"\x89PNG"
