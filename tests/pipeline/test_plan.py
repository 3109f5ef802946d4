"""The planner held to published sizes, measured runs and what the project promises of its own machine."""

import json
import subprocess
import sys

import pytest

from r1distill.data.config import load, names
from r1distill.data.errors import RequestError
from r1distill.pipeline import estimate, footprint
from r1distill.pipeline.estimate import ServingLayout, TrainingJob
from r1distill.pipeline.hardware import GIB, Hardware, detect, named
from r1distill.pipeline.plan import check, check_teacher, plan
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import load_teacher

R1_STUDENTS = ["qwen-1.5b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-8b", "llama-70b"]


def student(name, **overrides):
    return load("students", name, Student, overrides)


def stage(answer, name):
    return next(each for each in answer.stages if each.stage == name)


def nodes(**changes):
    return Hardware(**{"cores": 64, "memory_gib": 1000, "disk_gib": 10_000, **changes})


# Published sizes.


def test_r1_has_its_published_sizes():
    r1 = footprint.of_reference(load_teacher("r1-8xh200").model)
    assert r1.weights_bytes / GIB == pytest.approx(641.3, rel=1e-3)
    assert r1.kv_bytes_per_token == 70_272
    assert r1.kv_bytes_per_token * 32_768 / GIB == pytest.approx(2.14, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("qwen-1.5b", 28_672),
        ("qwen-7b", 57_344),
        ("qwen-14b", 196_608),
        ("qwen-32b", 262_144),
        ("llama-8b", 131_072),
        ("llama-70b", 327_680),
    ],
)
def test_students_have_their_published_cache(name, kv_bytes):
    assert footprint.of_architecture(name, student(name).architecture).kv_bytes_per_token == kv_bytes


# What fits where.


def test_r1_in_fp8_fits_8xh200_and_not_8xh100():
    teacher = load_teacher("r1-8xh200")
    check_teacher(teacher, named("8xh200"))
    with pytest.raises(RequestError, match="8xh200"):
        check_teacher(teacher, named("8xh100"))


@pytest.mark.parametrize(("teacher", "hardware"), [("r1-16xh100", "16xh100"), ("r1-4xb200", "4xb200")])
def test_each_r1_teacher_fits_the_hardware_in_its_name(teacher, hardware):
    check_teacher(load_teacher(teacher), named(hardware))


def test_32b_in_full_at_32k_needs_more_than_eight_gpus_of_80_gb():
    answer = plan(student("qwen-32b"), load_teacher("recorded"), named("8xh100"))
    training = stage(answer, "checkpoint")
    assert not training.fits and len(training.rejected) == 2
    assert stage(plan(student("qwen-32b"), load_teacher("recorded"), named("16xh100")), "checkpoint").fits


@pytest.mark.parametrize("name", R1_STUDENTS)
def test_every_r1_student_fits_somewhere_in_the_catalogue(name):
    assert any(plan(student(name), load_teacher("recorded"), named(hardware)).fits for hardware in names("hardware"))


@pytest.mark.parametrize("name", R1_STUDENTS)
def test_no_r1_student_fits_two_cores(name):
    with pytest.raises(RequestError) as error:
        check(student(name), load_teacher("recorded"), named("laptop"))
    text = str(error.value)
    assert "r1distill plan" in text and "checkpoint: full training" in text and "HARDWARE=" in text
    assert error.value.exit_code == 2


def test_the_refusal_names_teachers_that_need_no_serving():
    with pytest.raises(RequestError, match="TEACHER=recorded"):
        check(student("qwen-14b"), load_teacher("r1-8xh200"), named("laptop"))


def test_the_default_chain_fits_two_cores_and_24_gb():
    check(student("smollm2-135m"), load_teacher("embedded"), named("laptop"))
    answer = plan(student("smollm2-135m"), load_teacher("embedded"), named("laptop"))
    assert all(each.needed_gib < 12 for each in answer.stages)


def test_only_the_stages_that_will_run_are_checked():
    check(student("qwen-14b"), load_teacher("recorded"), named("8xh200"), here=named("8xh200"), stages=["traces"])
    check(student("qwen-14b"), load_teacher("recorded"), named("laptop"), stages=["traces"])


def test_a_full_disk_is_a_reason():
    small = named("laptop").model_copy(update={"disk_gib": 1.0})
    with pytest.raises(RequestError, match=r"disk: .* are free"):
        check(student("smollm2-135m"), load_teacher("embedded"), small)


def test_hardware_that_this_machine_is_not_is_refused():
    with pytest.raises(RequestError, match=r"promises 8 x H200 SXM on this machine, found 0"):
        check(student("qwen-14b"), load_teacher("recorded"), named("8xh200"), here=named("laptop"))


def test_lora_takes_less_than_full():
    lora = {"sft.method": {"kind": "lora", "rank": 16, "alpha": 32}}
    full = stage(plan(student("qwen-32b"), load_teacher("recorded"), named("8xh100")), "checkpoint")
    less = stage(plan(student("qwen-32b", **lora), load_teacher("recorded"), named("8xh100")), "checkpoint")
    assert less.fits and less.needed_gib < full.needed_gib


# Measured runs: predictions within 25%.


def test_states_and_kept_activations_of_32b_on_16_gpus():
    memory = estimate.training(TrainingJob(student("qwen-32b").architecture, 32_768, shards=16))
    kept = sum(memory[part] for part in ("weights", "gradients", "optimiser", "activations"))
    assert kept * GIB / 1e9 == pytest.approx(54, rel=0.02)


def test_memory_of_torchtitans_8b_at_32k():
    """8 x H100 of 95 GB, FSDP, plain logits: 83.9 GiB."""
    job = TrainingJob(student("llama-8b").architecture, 32_768, shards=8, fused_head=False)
    total = sum(estimate.training(job).values()) + estimate.training_reserve_gib(95)
    assert total == pytest.approx(83.9, rel=0.25)


@pytest.mark.parametrize(
    ("name", "context", "lora", "measured"),
    [
        ("llama-8b", 32_768, False, 3_890),  # torchtitan
        ("llama-70b", 8_192, False, 867),  # NeMo
        ("qwen-7b", 4_096, True, 14_100),
        ("qwen-32b", 4_096, True, 2_250),
    ],
)
def test_training_speed_of_published_runs(name, context, lora, measured):
    one = named("8xh100").model_copy(update={"gpus_per_node": 1})
    assert estimate.training_rate(student(name).architecture, one, context, lora) == pytest.approx(measured, rel=0.25)


def test_serving_speed_of_r1_lies_among_the_published_ones():
    """Between open-r1's batches on H100 (22 tokens/s a GPU) and vLLM's wide expert parallelism (2,200 on an H200)."""
    model = footprint.of_reference(load_teacher("r1-8xh200").model)
    hardware, layout = named("8xh200"), ServingLayout(data=8, expert_parallel=True)
    memory = estimate.serving(model, layout, 32_768)
    rate = estimate.serving_rate(model, layout, hardware, memory, 0.9 * hardware.gpu_memory_gib, 5_355)
    assert 500 < rate / 8 < 2_200


# The answer's form.


def test_hours_and_dollars_follow_from_the_price():
    priced = named("8xh200").model_copy(update={"price_usd_per_gpu_hour": 3})
    answer = plan(student("qwen-14b"), load_teacher("r1-8xh200"), priced)
    training = stage(answer, "checkpoint")
    assert training.tokens == 2 * 804_745 * 5_355
    assert training.gpu_hours == pytest.approx(8 * training.hours)
    assert float(training.usd) == pytest.approx(3 * training.gpu_hours, rel=1e-3)


def test_plan_is_json_and_text():
    answer = plan(student("qwen-14b"), load_teacher("r1-8xh200"), named("8xh200"))
    loaded = json.loads(json.dumps(answer.as_dict()))
    assert loaded["fits"] and [each["stage"] for each in loaded["stages"]] == [
        "traces",
        "checkpoint",
        "variants",
        "scores",
    ]
    assert "qwen-14b fits on 8xh200." in answer.text()


def test_every_student_teacher_and_hardware_can_be_planned():
    students, teachers = (
        [student(name) for name in names("students")],
        [load_teacher(name) for name in names("teachers")],
    )
    for hardware in [named(name) for name in names("hardware")]:
        for teacher in teachers:
            for each in students:
                assert plan(each, teacher, hardware).text()


def test_planning_imports_nothing_heavy():
    code = (
        "import sys; from r1distill.pipeline.plan import plan; "
        "print([m for m in ('torch', 'vllm', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Hardware.


def test_detection_sees_this_machine():
    found = detect()
    assert found.name == "local" and found.cores >= 1 and found.memory_gib > 0.5 and found.disk_gib > 0


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nfor i in 0 1; do echo 'NVIDIA H100 80GB HBM3, 81559'; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = detect()
    assert (found.gpus_per_node, found.gpu, found.gpu_bf16_tflops) == (2, "NVIDIA H100 80GB HBM3", 989)
    assert found.gpu_memory_gib == pytest.approx(79.65, abs=0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect().gpus_per_node == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect().gpus == 0


def test_a_driverless_nvidia_smi_means_no_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML' >&2; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect().gpus == 0


def test_hardware_with_gpus_needs_their_memory():
    with pytest.raises(ValueError, match="gpu_memory_gib"):
        nodes(gpus_per_node=8)
