"""The published figures, and the gate that holds this harness to them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from r1distill.data.config import ROOT, load, names
from r1distill.data.settings import Benchmark
from r1distill.data.sources import FileSource
from r1distill.pipeline import scores
from r1distill.pipeline.evaluation import Contender
from r1distill.pipeline.published import MODELS, TABLE, figure, reproduced
from r1distill.pipeline.scores import harness_gate
from r1distill.pipeline.scores import reproduced as all_reproduced
from r1distill.students.catalogue import Gate, Student, Twin
from r1distill.teacher.settings import Client, EndpointTeacher, Sampling

FILE = ROOT.parent / "shared" / "data" / "eval" / "published_scores.json"
REPO = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


@pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/eval/published_scores.json")
def test_the_table_is_deepseeks():
    columns = {
        "aime2024": "aime2024_pass1",
        "math500": "math500_pass1",
        "gpqa-diamond": "gpqa_diamond_pass1",
        "livecodebench": "livecodebench_pass1_cot",
    }
    rows = json.loads(FILE.read_text())["published"]["rows"]
    assert set(rows) == set(MODELS) and set(columns) == set(TABLE)
    for model, row in rows.items():
        for bench, column in columns.items():
            assert 100 * figure(model, bench).accuracy == pytest.approx(row[column])
        cons = figure(model, "aime2024").cons
        assert (cons and 100 * cons) == (row["aime2024_cons64"] and pytest.approx(row["aime2024_cons64"]))


def test_pass_at_1_and_consensus_are_kept_apart():
    llama = figure("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "aime2024")
    assert (llama.accuracy, llama.cons) == (0.70, 0.867)
    assert figure("somebody/Another-Model", "aime2024") is None
    assert figure(REPO, "gsm8k") is None and figure(None, "math500") is None


def test_every_r1_student_has_its_own_twin_with_figures_on_its_benchmarks():
    students = {name: load("students", name, Student) for name in names("students")}
    r1 = {name: student for name, student in students.items() if student.template == "r1"}
    assert {student.twin.repo.rpartition("/")[2] for student in r1.values()} == set(MODELS) - {"DeepSeek-R1"}
    for name, student in r1.items():
        family, _, size = name.partition("-")
        assert student.twin.repo.lower() == f"deepseek-ai/deepseek-r1-distill-{family}-{size}"
        assert all(figure(student.twin.repo, bench) for bench in student.benchmarks)
    assert students["smollm2-135m"].twin is None


def its(accuracy: float, low: float, high: float) -> dict:
    return {"accuracy": accuracy, "low": low, "high": high, "questions": 500, "k": 16}


def bench(name: str = "math500", **changes) -> Benchmark:
    return load("benchmarks", name, Benchmark).model_copy(update=changes)


def test_the_tolerance_is_both_intervals_together():
    """Published 83.9 on 500 x 16: its binomial half-width is 1.96 sqrt(0.839 x 0.161 / 8000) = 0.0081; ours is 0.03."""
    found = reproduced(bench(), REPO, its(0.839 - 0.031, 0.808 - 0.03, 0.808 + 0.03))
    assert found["tolerance"] == pytest.approx((0.03**2 + 0.00805**2) ** 0.5, abs=1e-4)
    assert found["passed"]
    assert not reproduced(bench(), REPO, its(0.839 - 0.032, 0.807 - 0.03, 0.807 + 0.03))["passed"]
    assert not reproduced(bench(), REPO, its(0.92, 0.90, 0.94))["passed"]  # too good is no reproduction either
    for word in ("80.8%", "83.9%", "3.1% apart", "500 questions × 16", "k = 16"):
        assert word in found["message"]


def test_other_settings_reproduce_nothing_whatever_the_score():
    found = reproduced(bench(max_tokens=4096), REPO, its(0.839, 0.8, 0.88))
    assert not found["passed"] and "max_tokens 4096, not 32768" in found["message"]


def test_a_harness_that_is_off_fails_the_checkpoint_and_says_why():
    tables = {"math500": {"models": {"twin": its(0.5, 0.45, 0.55), "student": its(0.9, 0.88, 0.92)}}}
    found = all_reproduced([bench()], REPO, tables)
    (gate,) = harness_gate(found)
    assert (found["applies"], found["passed"]) == (True, False)
    assert (gate["model"], gate["passed"]) == ("checkpoint", False) and "33.9% apart" in gate["message"]
    tables["math500"]["models"]["twin"] = its(0.84, 0.81, 0.87)
    assert all_reproduced([bench()], REPO, tables)["passed"]


def test_without_a_published_twin_it_does_not_apply():
    found = all_reproduced([bench("arithmetic")], None, {})
    assert (found["applies"], found["passed"], harness_gate(found)) == (False, None, [])
    assert "no published twin is named" in found["reason"]
    found = all_reproduced([bench("gsm8k")], REPO, {"gsm8k": {"models": {}}})
    assert not found["applies"] and "no published figure on gsm8k" in found["reason"]


# The stage itself, with a recorded run of the twin and a fast server as base and student.


def the_run(folder, right: int):
    """A student of 1.5B's size whose twin's recorded answers are right ``right`` times of 25 on each question."""
    rows = [{"problem": f"{n} + {n}?", "answer": str(2 * n), "level": n % 5 + 1} for n in range(8)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = [
        {
            "question": row["problem"],
            "completion": f"So.\n</think>\n\n\\boxed{{{row['answer'] if sample < right else -1}}}",
            "finish_reason": "stop",
            "completion_tokens": 9,
        }
        for row in rows
        for sample in range(25)
    ]
    (folder / "recorded.jsonl").write_text("\n".join(map(json.dumps, answers)))
    columns = {"question": "problem", "reference_answer": "answer"}
    source = FileSource(kind="file", path=str(folder / "questions.jsonl"), columns=columns, license="mit")
    recorded = FileSource(kind="file", path=str(folder / "recorded.jsonl"), license="mit")
    student = load("students", "qwen-1.5b", Student).model_copy(
        update={"twin": Twin(repo=REPO, recorded=recorded), "variants": {}, "gate": Gate(min_gain=0.1)}
    )
    asked = bench(source=source, k=25)
    verdicts = SimpleNamespace(workers=1)
    prompts = SimpleNamespace(verdicts=verdicts)
    return SimpleNamespace(student=student, benchmarks=[asked], home=folder / "home", prompts=prompts)


@pytest.mark.parametrize(("right", "passes"), [(21, True), (12, False)])
def test_a_student_whose_twin_is_not_reproduced_does_not_pass(tmp_path, monkeypatch, fast_model, right, passes):
    run = the_run(tmp_path, right)
    run.home.mkdir()

    def server(good: float):
        def answer(question: str, number: int) -> str:
            value = 2 * int(question.split()[0]) if number < 25 * good else -1
            return f"Hm.\n</think>\n\n\\boxed{{{value}}}"

        settings = {"kind": "endpoint", "name": "m", "prompts": "", "model": "m", "sampling": Sampling(max_tokens=1)}
        return EndpointTeacher(base_url=fast_model(answer).url, client=Client(in_flight=4), **settings)

    everyone = [
        Contender("base", server(0.2), "b", None, True),
        scores.twin(run),
        Contender("student", server(0.8), "s", None, True),
    ]
    monkeypatch.setattr(scores, "contenders", lambda *_: everyone)
    (tmp_path / "manifest.json").write_text(json.dumps({"metrics": {}}))  # of no variants
    (tmp_path / "prompts.json").write_text(json.dumps({"conversations": [], "texts": []}))
    result = scores.build(run, tmp_path, tmp_path, tmp_path)
    result.check("scores")
    found = json.loads((tmp_path / "scores.json").read_text())
    models = found["benchmarks"]["math500"]["models"]
    assert {name: round(row["accuracy"], 2) for name, row in models.items()} == {
        "base": 0.2, "twin": right / 25, "student": 0.8,
    }  # fmt: skip
    assert models["twin"]["runtime"] == "recorded"
    assert found["reproduction"]["passed"] is passes
    assert result.failed_gates == ([] if passes else ["checkpoint"])
    verdicts = {one["against"]: one["verdict"] for one in found["benchmarks"]["math500"]["comparisons"]}
    assert verdicts == {"base": "better", "twin": "worse" if passes else "better"}
    assert found["benchmarks"]["math500"]["published"]["accuracy"] == 0.839
