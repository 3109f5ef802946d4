"""The prompts stage: every row accounted for, and evidence for each that was like another."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from r1distill.data import prompts, schema, words
from r1distill.data.config import load, names
from r1distill.data.errors import R1DistillError
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.verify import gym
from r1distill.data.verify.verifiers import VERIFIERS

ROWS = [
    ("a", "What is the sum of the first 40 odd positive integers, and is that sum a perfect square or not?"),
    ("b", "what is the  sum of the first 40 odd positive integers, and is that sum a perfect square or not?"),
    ("c", "What is the sum of the first 40 odd positive integers, and is that sum a perfect square or isn't it?"),
    ("d", "What is the sum of the first 50 odd positive integers, and is that sum a perfect square or not?"),
    ("e", "How many marbles does Ines have left, if she loses 8 of her 30 marbles and gives 5 away to Paulo? Explain."),
    ("f", "Ines has 30 marbles, loses 8, and gives 5 marbles to her friend Paulo. How many are left?"),
    ("g", "Name the capital city of Burkina Faso."),
    ("h", "A recipe for pancakes takes 3 eggs for each 2 cups of milk. How many eggs go with 10 cups?"),
    ("i", "  "),
    ("j", "half a pair \ud83d"),
]
BENCHMARK = [
    ("q1", "Paulo visits. How many marbles does Ines have left, if she loses 8 of her 30 marbles and gives 5 away to Paulo?"),
    ("q2", "What is the capital of Burkina Faso?"),
    ("q3", "What is the sum of 2 and 2?"),
]  # fmt: skip


def source(tmp_path, name, rows):
    file = tmp_path / f"{name}.jsonl"
    lines = [json.dumps({"question": question, "id": id_}) for id_, question in rows]
    file.write_text("\n".join(lines) + "\nnot JSON\n")
    return {"kind": "file", "path": str(file), "license": "mit"}


@pytest.fixture
def build(tmp_path):
    benchmark = Benchmark(name="marbles", title="Marbles", source=source(tmp_path, "marbles", BENCHMARK), k=1)

    def build(rows=ROWS, **settings):
        settings = {"near_duplicates": {"threshold": 0.7}, **settings}
        asked = PromptSet(name="mine", sources=[source(tmp_path, "mine", rows)], **settings)
        out = tmp_path / "out"
        result = prompts.build(asked, [benchmark], out)
        result.check("prompts")
        kept = [row["source_id"] for row in schema.rows(schema.read(out, schema.PROMPT))]
        rejected = {row["source_id"]: row for row in schema.rows(schema.read(out / "rejected", schema.REJECTED_PROMPT))}
        assert not (out / "distinct").exists()
        assert result.kept == len(kept)
        return result, kept, rejected

    return build


def test_every_row_is_kept_or_rejected_with_its_evidence(build):
    result, kept, rejected = build()
    assert kept == ["a", "d", "h"]
    assert result.rejected == {
        "duplicate": 1,
        "near duplicate": 1,
        "shares a 10-gram with a benchmark": 1,
        "rewords a benchmark's question": 2,
        "no question": 1,
        "unreadable: not JSON": 1,
        "unreadable: not Unicode": 1,
    }
    assert result.metrics["contaminated"] == {"marbles": {"10-gram": 1, "reworded": 2}}
    assert result.metrics["domains"] == {"math": 3}

    assert (rejected["b"]["against"], rejected["b"]["matched_id"]) == ("prompts", prompts.prompt_id(ROWS[0][1]))
    near = rejected["c"]
    assert (near["matched_id"], near["matched_text"]) == (prompts.prompt_id(ROWS[0][1]), ROWS[0][1])
    assert 0.7 <= near["score"] < 1
    shared = rejected["e"]
    assert (shared["against"], shared["matched_id"], shared["score"]) == ("marbles", "q1", 21.0)
    assert shared["matched_text"].startswith("how many marbles") and shared["matched_text"].endswith("away to paulo")
    assert (rejected["f"]["matched_id"], rejected["g"]["matched_id"]) == ("q1", "q2")
    assert all(row["question"] == dict(ROWS)[id_].strip() for id_, row in rejected.items())


def test_without_an_ngram_only_whole_questions_count(build):
    rows = [*ROWS, ("k", "what is the CAPITAL of  Burkina Faso?")]
    result, kept, rejected = build(rows, decontaminate={"ngram": None}, near_duplicates=None)
    assert kept == ["a", "c", "d", "e", "f", "g", "h"]
    assert rejected["k"]["reason"] == "asked by a benchmark"
    assert result.rejected["asked by a benchmark"] == 1


def test_rewording_can_be_turned_off_alone(build):
    _, kept, _ = build(decontaminate={"reworded": None})
    assert kept == ["a", "d", "f", "g", "h"]


def test_prompts_that_all_fall_away_are_an_error(build):
    with pytest.raises(R1DistillError, match="came out empty"):
        build([ROWS[6]])


def test_generated_questions_are_never_near_duplicates(tmp_path):
    tasks = {"leg_counting": {"count": 60, "config": {"min_animals": 2, "max_animals": 2}}}
    made = {"kind": "reasoning_gym", "seed": 5, "tasks": tasks}
    settings = PromptSet(name="made", sources=[made], near_duplicates={"threshold": 0.5})
    result = prompts.build(settings, [], tmp_path / "out")
    assert result.kept + result.rejected.get("duplicate", 0) == result.read == 60


def test_prompts_pass_through_and_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "BATCH_CHARACTERS", 1 << 14)
    monkeypatch.setattr(schema, "ROWS_PER_BATCH", 16)
    lexicon = [f"w{i}" for i in range(1009)]
    long = ((str(i), " ".join(lexicon[(i * j + i) % 1009] for j in range(1000))) for i in range(1, 1008))
    settings = PromptSet(name="long", sources=[source(tmp_path, "long", long)], near_duplicates={"threshold": 0.9})
    prompts.build(settings, [], tmp_path / "once")  # tables that are made once
    tracemalloc.start()
    prompts.build(settings, [], tmp_path / "again")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "long.jsonl").stat().st_size
    assert most < 0.7 * size, f"{most:,} bytes for {size:,} bytes of prompts"


def test_a_column_of_another_type_costs_its_row_alone(tmp_path):
    odd = [
        {"domain": ["math"]},
        {"license": ["mit"]},
        {"verifier": 5},
        {"reference_answer": ["4", "5"]},
        {"domain": "\ud83d"},
    ]
    rows = [{"question": f"What is {number}?", **more} for number, more in enumerate([*odd, {"reference_answer": 4}])]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"kind": "file", "path": str(tmp_path / "odd.jsonl"), "license": "mit"}
    result = prompts.build(PromptSet(name="odd", sources=[one]), [], tmp_path / "out")
    result.check("prompts")
    assert result.rejected == {
        "domain is list, expected text": 1,
        "license is list, expected text": 1,
        "verifier is int, expected text": 1,
        "reference_answer is list, expected text or a number": 1,
        "unreadable: not Unicode": 1,
    }
    assert schema.read(tmp_path / "out", schema.PROMPT)["reference_answer"].to_pylist() == ["4"]


def test_a_row_brings_its_own_tests(tmp_path):
    """As public sets have them: JSON of inputs and outputs, with the source saying what they are."""
    file = tmp_path / "code.jsonl"
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    rows = [{"question": "A", "io": json.dumps(tests)}, {"question": "B", "io": tests}, {"question": "C", "io": "[1]"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"columns": {"verifier_args": "io"}, "verifier": "code", "verifier_args": {"kind": "stdin"}}
    own = {"kind": "file", "path": str(file), "license": "mit", **settings}
    found = list(prompts.read_source(PromptSet(name="code", sources=[own]).sources[0]))
    assert [json.loads(row["verifier_args"]) for row, _ in found[:2]] == [{"kind": "stdin", **tests}] * 2
    assert found[2] == (None, "verifier_args is no JSON object")


def test_a_generated_question_without_an_answer_has_no_reference():
    made = {"kind": "reasoning_gym", "seed": 5, "tasks": {"propositional_logic": {"count": 1}}}
    [(row, _)] = prompts.read_source(PromptSet(name="made", sources=[made]).sources[0])
    assert row["reference_answer"] is None


def test_the_mixs_own_puzzles_can_be_scored():
    """The published mix's logic: reasoning-gym's scorers find the right answer right, from what the row holds."""
    [logic] = [source for source in load("prompts", "r1-mix", PromptSet).sources if source.kind == "reasoning_gym"]
    few = logic.model_copy(
        update={"tasks": {name: task.model_copy(update={"count": 2}) for name, task in logic.tasks.items()}}
    )
    for row, _ in prompts.read_source(few):
        if row["reference_answer"] is not None:
            response = f"<answer>{row['reference_answer']}</answer>"
            finding = gym.examine(response, row["reference_answer"], row["question"], json.loads(row["verifier_args"]))
            assert finding.outcome == "pass", (row["source_id"], finding)


def test_every_domain_of_the_published_mix_has_a_source_and_a_verifier():
    mix = load("prompts", "r1-mix", PromptSet)
    assert {source.domain for source in mix.sources} == {"math", "code", "stem", "logic", "general"}
    assert {source.verifier for source in mix.sources} - {"judge"} <= set(VERIFIERS)


def test_the_mixes_of_the_project_parse():
    for name in names("prompts"):
        assert load("prompts", name, PromptSet).sources
