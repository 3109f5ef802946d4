"""The traces stage: one row for every answer asked for; and recorded traces in the same form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.prompts import prompt_id
from r1distill.teacher import traces
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, VllmTeacher, load_teacher

MIP = Path(__file__).parents[3] / "shared/data/traces/mip_deepseek_r1.jsonl.gz"
INSTRUCTION = "Box your answer."


def table_of_prompts(folder: Path, questions: list[str]) -> Path:
    rest = {"reference_answer": "4", "verifier": "math", "verifier_args": "{}", "source": "s", "license": "mit"}
    schema.write(
        folder,
        schema.PROMPT,
        [
            {"prompt_id": prompt_id(q), "question": q, "domain": "math", "source_id": str(n), **rest}
            for n, q in enumerate(questions)
        ],
    )
    return folder


def read(out: Path) -> list[dict]:
    return schema.read(out, schema.TRACE).to_pylist()


@pytest.fixture
def teacher(fake):
    def make(**changes) -> EndpointTeacher:
        client = {"in_flight": 4, "attempts": 2, "backoff_seconds": 0.01, "timeout_seconds": 20}
        values = {
            "kind": "endpoint",
            "name": "t",
            "prompts": "p",
            "base_url": fake.url,
            "model": "fake",
            "client": client,
        }
        sampling = {"max_tokens": 50, "samples": changes.pop("samples", 2)}
        return EndpointTeacher.model_validate({**values, "sampling": sampling, **changes})

    return make


def test_every_prompt_is_asked_as_often_as_wanted_and_counted(fake, teacher, tmp_path, chat):
    fake.scripts[f"c\n\n{INSTRUCTION}"] = [chat("<think>long", finish_reason="length")]
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b", "c"])
    result = traces.build(teacher(), prompts, tmp_path / "out", tmp_path / "home", INSTRUCTION)
    result.check("traces")
    assert (result.read, result.kept, result.rejected) == (6, 5, {"truncated": 1})
    assert result.metrics["completion_tokens"] == 120
    assert result.metrics["asked_now"] == 6
    answers = json.loads(json.dumps(result.metrics["answers"]))
    assert answers["states"] == {"done": 5, "truncated": 1}
    assert answers["truncated_share"] == pytest.approx(1 / 6)
    assert answers["completion_tokens"] == {"count": 6, "mean": 20, "variance": 0}
    assert answers["cost_usd"] == {"count": 0, "mean": None, "variance": None}
    assert answers["seconds"]["count"] == 6
    assert answers["histogram"] == [{"up_to": 32, "done": 5, "truncated": 1}]
    rows = read(tmp_path / "out")
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(prompt_id(q), n) for q in "abc" for n in (0, 1)]
    assert json.loads(rows[0]["request_text"]) == [{"role": "user", "content": f"a\n\n{INSTRUCTION}"}]
    assert {row["teacher_revision"] for row in rows} == {None}


def test_ten_more_prompts_cost_ten_more_prompts(fake, teacher, tmp_path):
    few = table_of_prompts(tmp_path / "few", ["a", "b"])
    more = table_of_prompts(tmp_path / "more", [*"abcdefghijkl"])
    traces.build(teacher(), few, tmp_path / "out", tmp_path / "home", "")
    assert traces.build(teacher(), more, tmp_path / "out2", tmp_path / "home", "").metrics["asked_now"] == 20
    assert set(fake.asked.values()) == {2}


def test_nothing_is_needed_where_the_ledger_has_it_all(fake, teacher, tmp_path, monkeypatch):
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b"])
    monkeypatch.setenv("FAKE_KEY", "k")
    traces.build(teacher(key_variable="FAKE_KEY"), prompts, tmp_path / "out", tmp_path / "home", "")
    monkeypatch.delenv("FAKE_KEY")
    fake.close()
    again = traces.build(teacher(key_variable="FAKE_KEY"), prompts, tmp_path / "out2", tmp_path / "home", "")
    assert (again.kept, again.metrics["asked_now"]) == (4, 0)
    assert read(tmp_path / "out") == read(tmp_path / "out2")


def test_too_many_failures_are_told_and_only_they_are_asked_again(fake, teacher, tmp_path):
    fake.scripts["b"] = [500] * 4
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b", "c"])
    with pytest.raises(
        R1DistillError, match=r"(?s)2 of 6 requests to 't' failed, .*\(1\.0%\):\n +2 x HTTP 500: as scripted"
    ):
        traces.build(teacher(), prompts, tmp_path / "out", tmp_path / "home", "")
    result = traces.build(teacher(), prompts, tmp_path / "out", tmp_path / "home", "")
    assert (result.kept, result.metrics["asked_now"]) == (6, 2)
    assert fake.asked == {"a": 2, "b": 6, "c": 2}


def test_a_few_failures_are_rows_like_others(fake, teacher, tmp_path):
    fake.scripts["b"] = [500] * 4
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b"])
    result = traces.build(teacher(max_failed_share=0.5), prompts, tmp_path / "out", tmp_path / "home", "")
    assert (result.read, result.kept, result.rejected) == (4, 2, {"failed": 2})
    assert [row["completion"] for row in read(tmp_path / "out") if row["state"] == "failed"] == [None, None]


def test_a_model_that_others_serve_is_asked_there_and_nothing_is_started(fake, another, tmp_path):
    second = another()
    prompts = table_of_prompts(tmp_path / "prompts", [*"abcdefgh"])
    wanted = {
        "kind": "vllm",
        "name": "t",
        "prompts": "p",
        "model": {"kind": "folder", "path": str(tmp_path / "weights")},
        "served_name": "m",
        "sampling": {"max_tokens": 50},
        "client": {"base_urls": [fake.url, f"{second.url}/"]},
    }
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    fake.delay = second.delay = 0.05
    result = traces.build(VllmTeacher.model_validate(wanted), prompts, tmp_path / "out", tmp_path / "home", "")
    assert (result.kept, fake.asked.total(), second.asked.total()) == (8, 4, 4)
    assert not (tmp_path / "home" / "logs").exists()
    assert {row["teacher_revision"] for row in read(tmp_path / "out")} != {None}


def test_a_policy_for_what_was_cut_off_changes_its_rows_alone(fake, teacher, tmp_path, chat):
    fake.scripts["b"] = [chat("<think>long", finish_reason="length")]
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b"])
    plain = traces.build(teacher(samples=1), prompts, tmp_path / "out", tmp_path / "home", "")
    assert (plain.kept, plain.rejected) == (1, {"truncated": 1})
    sampling = {"max_tokens": 50, "truncated": {"kind": "continue", "max_tokens": 90}}
    changed = teacher().model_dump() | {"sampling": sampling}
    fake.scripts["<think>long"] = [chat("er</think>4")]
    more = traces.build(EndpointTeacher.model_validate(changed), prompts, tmp_path / "out2", tmp_path / "home", "")
    assert (more.kept, more.rejected, more.metrics["asked_now"]) == (2, {}, 1)
    assert more.metrics["first_answers"]["states"] == {"done": 1, "truncated": 1}
    assert more.metrics["answers"]["states"] == {"done": 2}
    first, second = read(tmp_path / "out"), read(tmp_path / "out2")
    assert first[0] == second[0]
    assert (second[1]["reasoning"], second[1]["response"]) == ("longer", "4")


def test_a_domain_has_its_own_instruction(fake, teacher, tmp_path):
    prompts = table_of_prompts(tmp_path / "prompts", ["a"])
    traces.build(teacher(samples=1), prompts, tmp_path / "out", tmp_path / "home", {"math": "Box it.", "code": "x"})
    assert fake.asked == {"a\n\nBox it.": 1}


RECORDED = [
    {"q": "a", "r": "so</think>4", "end": "stop"},
    {"q": "A ", "r": "so\n</think>\n\n5", "end": "length", "completion_tokens": 7},
    {"q": "b", "r": "", "end": "stop"},
    {"q": "unknown", "r": "x</think>y", "end": "stop"},
    {"q": None, "r": "x", "end": "stop"},
]


def recorded(path: Path, **changes) -> RecordedTeacher:
    columns = {"prompt": "q", "completion": "r", "finish_reason": "end"}
    source = {"kind": "file", "path": str(path), "columns": columns, "license": "mit"}
    values = {"kind": "recorded", "name": "r", "prompts": "p", "model": "deepseek-ai/DeepSeek-R1", "source": source}
    return RecordedTeacher.model_validate({**values, **changes})


def test_recorded_rows_become_traces_and_all_are_accounted_for(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDED)) + "\n{broken\n")
    prompts = table_of_prompts(tmp_path / "prompts", ["a", "b", "c"])
    result = traces.build(recorded(file), prompts, tmp_path / "out", tmp_path / "home", INSTRUCTION)
    result.check("traces")
    assert (result.read, result.kept) == (6, 1)
    assert result.rejected == {
        "truncated": 1,
        "failed": 1,
        "its question is not among the prompts": 1,
        "no question": 1,
        "unreadable: not JSON": 1,
    }
    assert result.metrics["prompts_without_a_trace"] == 1
    first, second, empty = read(tmp_path / "out")
    assert (first["prompt_id"], first["sample"], first["reasoning"], first["response"]) == (
        prompt_id("a"),
        0,
        "so",
        "4",
    )
    assert (second["sample"], second["state"], second["completion_tokens"]) == (1, "truncated", 7)
    assert (empty["state"], empty["error"]) == ("failed", "an empty completion")
    assert json.loads(first["request_text"]) == [{"role": "user", "content": "a"}]
    assert not (tmp_path / "home").exists()


def test_recorded_parts_are_put_together(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"prompt": "a", "reasoning": "so", "response": "4"}))
    teacher = recorded(file, source={"kind": "file", "path": str(file), "license": "mit"}, revision="2025-01")
    traces.build(teacher, table_of_prompts(tmp_path / "prompts", ["a"]), tmp_path / "out", tmp_path / "home", "")
    (row,) = read(tmp_path / "out")
    assert (row["completion"], row["state"], row["teacher_revision"]) == ("<think>so</think>4", "done", "2025-01")


def test_recorded_rows_of_wrong_types_are_rejected_with_the_reason(tmp_path):
    file = tmp_path / "traces.jsonl"
    damages = [{"completion": 5}, {"finish_reason": ["stop"]}, {"reasoning": {}}, {"completion": "half \ud83d"}]
    rows = [{"prompt": "a", "completion": "4", **damage, "prompt_tokens": 2**70} for damage in [*damages, {}]]
    file.write_text("\n".join(map(json.dumps, rows)))
    teacher = recorded(file, source={"kind": "file", "path": str(file), "license": "mit"})
    prompts = table_of_prompts(tmp_path / "prompts", ["a"])
    result = traces.build(teacher, prompts, tmp_path / "out", tmp_path / "home", "")
    reasons = {f"{kind} where text belongs": 1 for kind in ("int", "list", "dict")}
    assert (result.read, result.kept) == (5, 1)
    assert result.rejected == {**reasons, "unreadable: not Unicode": 1}
    file.write_text("not JSON")
    with pytest.raises(R1DistillError, match="answers none of these prompts: .*not JSON.*columns"):
        traces.build(teacher, prompts, tmp_path / "none", tmp_path / "home", "")


def test_a_recorded_file_that_is_not_there_is_told(tmp_path):
    prompts = table_of_prompts(tmp_path / "prompts", ["a"])
    with pytest.raises(RequestError, match="there is no file"):
        traces.build(recorded(tmp_path / "none.jsonl"), prompts, tmp_path / "out", tmp_path / "home", "")


@pytest.mark.skipif(not MIP.is_file(), reason=f"{MIP} is not on this machine: real R1 traces are not tried")
def test_real_r1_traces_go_in(tmp_path):
    import gzip

    teacher = load_teacher("recorded", {"source.path": str(MIP)})
    with gzip.open(MIP, "rt") as lines:
        recorded_rows = [row for row in map(json.loads, lines) if row["variant"] == "normal"]
    questions = list({prompt_id(row["prompt"]): row["prompt"] for row in recorded_rows}.values())
    prompts = table_of_prompts(tmp_path / "prompts", questions)
    result = traces.build(teacher, prompts, tmp_path / "out", tmp_path / "home", "")
    assert (result.read, result.kept, result.rejected) == (634, 634, {})
    rows = read(tmp_path / "out")
    assert [row["completion"] for row in rows] == [row["response"] for row in recorded_rows]
    assert sum(bool(row["reasoning"]) for row in rows) >= 630
    assert {row["teacher"] for row in rows} == {"deepseek-ai/DeepSeek-R1"}
