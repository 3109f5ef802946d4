"""The students' files: architectures against published parameter counts, recipe numbers against the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1distill.data.config import load, names
from r1distill.data.errors import RequestError
from r1distill.students.catalogue import Student

# DeepSeek-R1, arXiv:2501.12948 v2, supplement B.4.3, and the published models' sizes.
PUBLISHED = {
    "qwen-1.5b": (1_777_088_000, 1e-4),
    "qwen-7b": (7_615_616_512, 8e-5),
    "qwen-14b": (14_770_033_664, 7e-5),
    "qwen-32b": (32_763_876_352, 6e-5),
    "llama-8b": (8_030_261_248, 5e-5),
    "llama-70b": (70_553_706_496, 2e-5),
}
SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"


@pytest.mark.parametrize("name", names("students"))
def test_architecture_has_the_published_number_of_parameters(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    student = load("students", name, Student)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student.architecture.to_config())
    assert model.num_parameters() == student.architecture.parameters
    if name in PUBLISHED:
        assert student.architecture.parameters == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one(name: str) -> None:
    student = load("students", name, Student)
    assert student.sft.learning_rate == PUBLISHED[name][1]
    assert student.sft.min_lr_ratio == 0.1
    assert student.sft.epochs in (2, 3)
    assert student.sft.batch_traces == 64
    assert student.packs.context_tokens == 32768
    assert student.sft.method.kind == "full"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared facts are not on this machine")
@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_agrees_with_the_recorded_facts(name: str) -> None:
    student = load("students", name, Student)
    family, _, size = name.partition("-")
    facts = json.loads((SHARED / "model_architectures.json").read_text())["students"]
    fact = facts[f"DeepSeek-R1-Distill-{family.title()}-{size.upper()}"]
    shape = student.architecture
    assert student.base.repo == fact["base"]
    found = (shape.layers, shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.vocab, shape.tied)
    keys = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocab", "tied_embeddings")
    assert found == tuple(fact[key] for key in keys)
    assert (shape.rope_theta, shape.max_position, shape.rms_eps) == (
        fact["rope_theta"],
        fact["max_position"],
        fact["rms_eps"],
    )
    assert (shape.rope_scaling and shape.rope_scaling.model_dump()) == fact.get("rope_scaling")


def test_files_are_short() -> None:
    from r1distill.data.config import CONFIGS

    for file in (CONFIGS / "students").glob("*.yaml"):
        assert len(file.read_text().splitlines()) <= 45, file


def test_execution_settings_stay_out_of_the_identity() -> None:
    plain = load("students", "smollm2-135m", Student)
    other = load(
        "students",
        "smollm2-135m",
        Student,
        {
            "sft.save_steps": 7,
            "sft.launch.checkpointing": True,
            "sft.launch.processes_per_node": 2,
            "sft.tracking": "wandb",
        },
    )
    assert plain.identity() == other.identity()
    assert plain.identity() != load("students", "smollm2-135m", Student, {"sft.epochs": 3}).identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft.method": {"kind": "lora", "rank": 8, "alpha": 16, "rnak": 1}}, "unknown key 'sft.method.lora.rnak'"),
        ({"variants.gptq-4bit.group_size": 128}, "must divide 576"),
        ({"packs.context_tokens": 100_000}, "max_position"),
        ({"sft.epochs": float("inf")}, "finite number"),
        ({"variants.checkpoint": {"kind": "int8"}}, "not a model's role"),
        ({"sft.epochs": 1e308}, "less than or equal to 1000"),
        ({"architecture.heads": 0}, "greater than 0"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace(".", r"\.").replace("sft\\.method\\.lora", ".*")):
        load("students", "smollm2-135m", Student, change)


TEACHER = "{ kind: hub, repo: deepseek-ai/DeepSeek-R1-Distill-Qwen-32B }"


def test_a_file_may_ask_for_what_lies_beyond(tmp_path: Path) -> None:
    def student(text: str) -> Student:
        file = tmp_path / "mine.yaml"
        file.write_text(f"extends: qwen-7b\n{text}")
        return load("students", str(file), Student)

    one = student(f"distill: {{ kind: on_policy, teacher: {TEACHER}, steps: 50 }}\n")
    same = student(f"beyond: {{ kind: on_policy, teacher: {TEACHER}, steps: 50 }}\n")
    assert one == same and one.distill is None and one.beyond and one.beyond.answers_per_step == 32
    both = student(f"distill: {{ kind: topk_kl, teacher: {TEACHER} }}\nbeyond: {{ kind: grpo, steps: 50 }}\n")
    assert both.distill and both.beyond and both.beyond.answers_per_step == 32 * 16
    assert Student.model_validate(both.model_dump(mode="json")) == both
    with pytest.raises(RequestError, match="give one of the two"):
        student(f"distill: {{ kind: on_policy, teacher: {TEACHER}, steps: 5 }}\nbeyond: {{ kind: grpo, steps: 5 }}\n")
    with pytest.raises(RequestError, match=r"mine\.yaml:2.*group_sise.*Did you mean 'group_size'"):
        student("beyond: { kind: grpo, steps: 50, group_sise: 4 }\n")
    with pytest.raises(RequestError, match="steps.* is required"):
        student("beyond: { kind: grpo }\n")
