"""The benchmarks as they are asked: prompts, choices shuffled once for all, sources that say what is wrong with them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from r1distill.data import benchmarks
from r1distill.data.config import ROOT, load, names
from r1distill.data.errors import RequestError
from r1distill.data.settings import Benchmark, Choices
from r1distill.data.sources import FileSource
from r1distill.data.verify import choice

EVAL = ROOT.parent / "shared" / "data" / "eval"
BOX = "Please reason step by step, and put your final answer within \\boxed{}."


def on_file(name: str, path: Path, **columns: str) -> Benchmark:
    """A benchmark of ours with its questions from a local file."""
    bench = load("benchmarks", name, Benchmark)
    columns = columns or bench.source.columns
    changes = {"kind": "file", "path": str(path), "columns": columns, "license": "test"}
    source = FileSource(**changes, domain=bench.source.domain, verifier=bench.source.verifier)
    return bench.model_copy(update={"source": source})


@pytest.mark.parametrize("name", names("benchmarks"))
def test_every_benchmark_names_its_revision_and_asks_as_deepseek_does(name):
    bench = load("benchmarks", name, Benchmark)
    if name == "arithmetic":  # the embedded one is for a laptop
        return
    assert len(bench.source.revision) == 40  # a commit: scores of two days are of the same questions
    assert (bench.temperature, bench.top_p, bench.max_tokens, bench.limit) == (0.6, 0.95, 32768, None)
    assert (
        bench.k
        == {"aime2024": 64, "aime2025": 64, "gpqa-diamond": 64, "math500": 16, "livecodebench": 8, "gsm8k": 1}[name]
    )
    assert bench.private == (name == "gpqa-diamond")


@pytest.mark.skipif(not EVAL.is_dir(), reason="needs ../shared/data/eval")
@pytest.mark.parametrize(
    ("name", "file", "count", "columns"),
    [
        ("aime2024", "aime2024.jsonl", 30, {}),
        ("math500", "math500.jsonl.gz", 500, {}),
        ("gsm8k", "gsm8k_test.jsonl.gz", 1319, {}),
    ],
)
def test_the_real_questions_are_read_and_end_in_the_instruction(name, file, count, columns):
    asked = benchmarks.asked(on_file(name, EVAL / file, **columns))
    assert len(asked) == count
    assert all(one.message.endswith(BOX) and one.message.startswith(one.row["question"]) for one in asked)
    assert all(one.row["reference_answer"] and "####" not in one.row["reference_answer"] for one in asked)
    if name == "math500":
        assert {one.difficulty for one in asked} == {"1", "2", "3", "4", "5"}


def gpqa_rows(count: int) -> list[dict]:
    return [
        {
            "Question": f"Which of these is number {n}? {{choices}}",
            "Correct Answer": f"right {n}",
            **{f"Incorrect Answer {m}": f"wrong {n}.{m}\n" for m in (1, 2, 3)},
        }
        for n in range(count)
    ]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_choices_are_shuffled_by_question_and_seed_and_by_nothing_else(tmp_path):
    rows = gpqa_rows(40)
    bench = on_file("gpqa-diamond", write(tmp_path / "gpqa.jsonl", rows))
    first = {one.row["question"]: one for one in benchmarks.asked(bench)}
    random.Random(1).shuffle(rows)
    swapped = [{**row, "Incorrect Answer 1": row["Incorrect Answer 3"], "Incorrect Answer 3": row["Incorrect Answer 1"]}
               for row in rows[:20]]  # fmt: skip
    again = benchmarks.asked(on_file("gpqa-diamond", write(tmp_path / "other.jsonl", swapped)))
    assert {one.message for one in again} <= {one.message for one in first.values()}
    letters = [one.row["reference_answer"] for one in first.values()]
    assert {letters.count(letter) > 3 for letter in "ABCD"} == {True}
    other = bench.model_copy(update={"layout": bench.layout.model_copy(update={"seed": 1})})
    assert [one.row["reference_answer"] for one in benchmarks.asked(other)] != letters
    # The order of all days: these letters stand in recorded answers.
    assert "".join(letters[:12]) == LETTERS


LETTERS = "AAAAACCBADCC"


def test_the_letter_of_the_right_choice_is_the_reference_and_the_verifier_knows_it(tmp_path):
    for one in benchmarks.asked(on_file("gpqa-diamond", write(tmp_path / "gpqa.jsonl", gpqa_rows(8)))):
        letter, choices = one.row["reference_answer"], json.loads(one.row["verifier_args"])["choices"]
        number = one.row["question"].split("number ")[1].split("?")[0]
        assert f"\n{letter}) right {number}" in one.message
        assert "{choices}" in one.message  # the question's own braces stay
        assert "'ANSWER: $LETTER'" in one.message.splitlines()[0]
        assert choice.examine(f"It is so.\n\nANSWER: {letter}", letter, one.row["question"], choices).outcome == "pass"
        wrong = next(other for other in "ABCD" if other != letter)
        assert choice.examine(f"ANSWER: {wrong}", letter, one.row["question"], choices).outcome == "fail"


def test_a_source_without_the_columns_is_told_what_it_lacks(tmp_path):
    rows = [{"Question": "q?", "Correct answer": "a", "Incorrect Answer 1": "b"}]
    with pytest.raises(RequestError, match="no column 'Correct Answer'.*Correct answer"):
        benchmarks.asked(on_file("gpqa-diamond", write(tmp_path / "gpqa.jsonl", rows)))
    empty = [{**row, "Correct Answer": " "} for row in gpqa_rows(2)]
    with pytest.raises(RequestError, match="2 rows: a choice or the question is empty"):
        benchmarks.asked(on_file("gpqa-diamond", write(tmp_path / "empty.jsonl", empty)))
    assert isinstance(load("benchmarks", "gpqa-diamond", Benchmark).layout, Choices)


@pytest.mark.parametrize("change", [{"limit": 0}, {"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"k": 0}])
def test_how_a_model_cannot_be_asked_is_an_error_of_the_file(change):
    with pytest.raises(RequestError, match=f"'{next(iter(change))}': Input should be greater than"):
        load("benchmarks", "math500", Benchmark, change)
