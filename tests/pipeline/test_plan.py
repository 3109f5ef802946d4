"""The planner held to published sizes, measured runs and what the project promises of its own machine."""

import json
import subprocess
import sys

import pytest

from r1distill.data.config import load, names
from r1distill.data.errors import RequestError
from r1distill.data.settings import Benchmark
from r1distill.pipeline import estimate, footprint, stageplan, training
from r1distill.pipeline.estimate import ServingLayout
from r1distill.pipeline.hardware import GIB, Hardware, named
from r1distill.pipeline.plan import check, check_teacher, plan
from r1distill.pipeline.training import TrainingJob
from r1distill.students.catalogue import FullMethod, LoraMethod, QloraMethod, Student
from r1distill.students.layout import Layout
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
    trained = stage(answer, "checkpoint")
    assert not trained.fits and len(trained.rejected) > 2
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


def test_how_many_traces_are_assumed_refuses_nobody():
    endpoint, small = load_teacher("deepseek-api"), named("laptop")
    answer = plan(student("qwen-14b"), endpoint, small)
    assert answer.disk["traces and packs"] == pytest.approx(96, rel=0.02) and not answer.disk_fits
    check(student("qwen-14b"), endpoint, small, stages=["prompts", "traces"])


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

LORA = LoraMethod(kind="lora", rank=8, alpha=16)
FULL = FullMethod(kind="full")


def layout(gpus, sequence_parallel=1, **changes):
    nodes = changes.get("nodes", 1)
    strategy = "one" if gpus * nodes == 1 else "zero3" if sequence_parallel > 1 else "fsdp2"
    return Layout(strategy=strategy, processes_per_node=gpus, sequence_parallel=sequence_parallel, cpu=False, **changes)


def job(name, context, spread, method=FULL, fused_head=True):
    return TrainingJob(student(name).architecture, context, spread, method, fused_head)


def needed(one):
    return sum(training.memory(one).values())


def test_states_and_kept_activations_of_32b_on_16_gpus():
    memory = training.memory(job("qwen-32b", 32_768, layout(16)))
    kept = sum(memory[part] for part in ("weights", "gradients", "optimiser", "activations"))
    assert kept * GIB / 1e9 == pytest.approx(54, rel=0.02)


@pytest.mark.parametrize(
    ("context", "degree", "measured_gib"),
    [(32_768, 1, 83.9), (65_536, 2, 84.2), (131_072, 4, 84.0), (262_144, 8, 84.5)],
)
def test_memory_of_torchtitans_8b_at_long_context(context, degree, measured_gib):
    """torchtitan, docs/performance.md, table 2: 8 x H100 of 96 GB, FSDP and context parallelism, full activation
    checkpointing, plain logits. Our own way of cutting a sequence, Ulysses, is held to the same figures."""
    whole = job("llama-8b", context, layout(8, degree), fused_head=False)
    assert needed(whole) + training.reserve_gib(95) == pytest.approx(measured_gib, rel=0.25)
    sharded = job("llama-8b", context // degree, layout(8), fused_head=False)
    assert needed(sharded) + training.reserve_gib(95) == pytest.approx(measured_gib, rel=0.25)


@pytest.mark.parametrize(
    ("hardware", "nodes", "name", "context", "method", "measured"),
    [
        ("8xh100", 1, "llama-8b", 8_192, FULL, 5_762),  # torchtitan, docs/performance.md, table 1
        ("8xh100", 1, "llama-8b", 32_768, FULL, 3_890),  # the same, table 2, with FP8
        ("8xa100", 8, "llama-8b", 8_192, FULL, 2_904),  # the same, an older edition: 64 A100
        ("8xa100", 8, "llama-70b", 8_192, FULL, 331),
        ("8xh100", 8, "llama-70b", 8_192, FULL, 866.77),  # NeMo AutoModel, performance summary
        ("1xh100", 1, "llama-8b", 4_096, LORA, 12_472.87),
        ("1xh100", 1, "qwen-7b", 4_096, LORA, 14_110.05),
        ("8xh100", 1, "llama-70b", 4_096, LORA, 1_091.85),
        ("8xh100", 1, "qwen-32b", 4_096, LORA, 2_250.31),
        ("8xh100", 2, "qwen-32b", 4_096, LORA, 2_072.89),
    ],
)
def test_training_speed_of_published_runs(hardware, nodes, name, context, method, measured):
    """Tokens a second and GPU, one sequence of the context's length in each pack, two packs at a time under LoRA."""
    machine = named(hardware).model_copy(update={"nodes": nodes})
    spread = layout(machine.gpus_per_node, nodes=nodes, packs_per_batch=2 if method is LORA else 1)
    packs = 8 * spread.replicas * spread.packs_per_batch
    seconds = training.seconds_per_step(job(name, context, spread, method), machine, packs, context)
    assert packs * context / seconds / machine.gpus == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize(("context", "fits"), [(32_768, False), (22_528, True)])
def test_open_r1s_limit_with_whole_logits_on_128_gpus(context, fits):
    """open-r1 trained 32B with FSDP and plain logits on 16 x 8 H100: out of memory at 32,768 tokens, not at 22,528."""
    machine = named("8xh100").model_copy(update={"nodes": 16})
    whole = job("qwen-32b", context, layout(8, nodes=16), fused_head=False)
    assert (needed(whole) <= machine.gpu_memory_gib - training.reserve_gib(machine.gpu_memory_gib)) is fits


def test_states_of_deepspeed_are_counted_as_its_authors_do():
    """144 for Llama-8B, weights, gradients and optimiser (arXiv 2506.13996; in GB, though it says GiB)."""
    memory = training.memory(job("llama-8b", 8_192, layout(8, 2)))
    states = 8 * sum(memory[part] for part in ("weights", "gradients", "optimiser"))
    assert states * GIB / 1e9 == pytest.approx(144, rel=0.02)


def test_qlora_of_65b_fits_one_gpu_of_48_gib():
    """QLoRA's own claim (arXiv 2305.14314), at 512 tokens; ours is of 70 B."""
    method = QloraMethod(kind="qlora", rank=64, alpha=16)
    assert 36 < 65 / 70.55 * needed(job("llama-70b", 512, layout(1), method)) < 48


def test_adapter_parameters_are_those_that_peft_counts():
    """LoRA of rank 16 on all linear layers of Llama-3.1-8B has 41,943,040."""
    method = LoraMethod(kind="lora", rank=16, alpha=32)
    assert job("llama-8b", 512, layout(1), method).adapter_parameters == 41_943_040


# The layout of the training.


def choice(name, hardware, **overrides):
    return training.choose(student(name, **overrides), named(hardware), 5_355)


def test_32b_is_refused_on_8_gpus_of_80_gb_in_every_layout():
    for hardware in ("8xh100", "8xa100"):
        taken = choice("qwen-32b", hardware)
        assert not taken.fits
        for word in ("DDP", "FSDP2", "Ulysses 2", "Ulysses 4", "Ulysses 8", "offload"):
            assert any(word in line and "can be used" in line for line in taken.rejected), word
    assert choice("qwen-32b", "8xh200").layout.strategy == "fsdp2"


@pytest.mark.parametrize(("name", "hardware"), [("qwen-32b", "16xh100"), ("llama-70b", "32xh100")])
def test_large_students_cut_their_sequences_where_sharding_alone_is_too_tight(name, hardware):
    taken = choice(name, hardware)
    assert taken.fits and taken.layout.strategy == "zero3" and taken.layout.sequence_parallel in (2, 4, 8)
    assert "not proven on a GPU" in taken.note
    for word in ("DDP x", "FSDP2 x8,", f"FSDP2 x{taken.layout.processes},"):  # plain, over a node, over all of them
        assert any(line.startswith(word) for line in taken.rejected), word


def test_ulysses_is_named_and_not_taken_where_there_is_another_way():
    taken = choice("qwen-7b", "8xh100")
    assert taken.layout.strategy == "fsdp2" and "--set student.sft.launch.sequence_parallel=4" in taken.note
    assert any("28 heads" in line for line in taken.rejected)  # a degree of 8 doesn't divide them
    forced = choice("qwen-7b", "8xh100", **{"sft.launch.sequence_parallel": 4})
    assert forced.layout.sequence_parallel == 4 and forced.rate > taken.rate


def test_what_every_gpu_can_hold_is_not_sharded():
    taken = choice("qwen-1.5b", "8xh100")
    assert taken.layout.strategy == "ddp"
    assert any(line.startswith("FSDP2 x8") and "fits" in line for line in taken.rejected)


def test_a_gpu_of_unknown_speed_has_memory_and_no_hours():
    machine = nodes(gpus_per_node=8, gpu_memory_gib=140)
    answer = plan(student("qwen-7b"), load_teacher("r1-8xh200"), machine)
    assert answer.fits and answer.text()
    assert [each.hours for each in answer.stages] == [None] * 4


def test_one_gpu_takes_one_process_and_so_do_two_cores():
    assert choice("qwen-1.5b", "1xh100").layout.strategy == "one"
    cpu = choice("smollm2-135m", "laptop").layout
    assert cpu.strategy == "one" and cpu.cpu and not cpu.checkpointing  # as its file says


def test_what_the_user_asks_of_the_launch_is_kept():
    asked = {"sft.launch.strategy": "zero3", "sft.launch.processes_per_node": 2}
    taken = choice("smollm2-135m", "laptop", **asked).layout
    assert (taken.strategy, taken.processes, taken.cpu) == ("zero3", 2, True)
    with pytest.raises(RequestError, match="can't be laid out"):
        choice("qwen-7b", "8xh100", **{"sft.launch.strategy": "one"})
    with pytest.raises(RequestError, match="28 heads"):
        choice("qwen-7b", "8xh100", **{"sft.launch.sequence_parallel": 8})


def test_offloading_is_tried_where_nothing_else_fits():
    whole = {"sft.launch.sequence_parallel": 1}
    taken = choice("llama-70b", "32xh100", **whole)
    assert taken.fits and taken.layout.offload_activations
    assert taken.host["activations"] == pytest.approx(8 * 40, rel=0.01)
    little = named("32xh100").model_copy(update={"memory_gib": 500})
    assert not training.choose(student("llama-70b", **whole), little, 5_355).fits


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_every_choice_can_run(kind):
    """Heads and processes are shared out evenly, the processes are the hardware's, and a step holds the batch."""
    for name in names("students"):
        method = {"kind": kind} if kind == "full" else {"kind": kind, "rank": 16, "alpha": 32}
        one = student(name, **{"sft.method": method})
        for hardware in [named(each) for each in names("hardware")]:
            taken = training.choose(one, hardware, min(5_355, one.packs.context_tokens / 2))
            spread, heads = taken.layout, one.architecture.heads
            assert heads % spread.sequence_parallel == 0 and spread.processes % spread.sequence_parallel == 0
            assert spread.processes <= max(1, hardware.gpus) and spread.cpu == (not hardware.gpus)
            places = spread.rounds(taken.packs_per_step) * spread.replicas * spread.packs_per_batch
            assert places >= taken.packs_per_step >= 1
            assert kind != "qlora" or spread.strategy in ("one", "ddp", "fsdp2")
            if taken.fits and hardware.gpus:
                assert taken.needed_gib <= taken.available_gib < hardware.gpu_memory_gib and taken.rate > 0


def test_serving_speed_of_r1_lies_among_the_published_ones():
    """Between open-r1's batches on H100 (22 tokens/s a GPU) and vLLM's wide expert parallelism (2,200 on an H200)."""
    model = footprint.of_reference(load_teacher("r1-8xh200").model)
    hardware, layout = named("8xh200"), ServingLayout(data=8, expert_parallel=True)
    memory = estimate.serving(model, layout, 32_768)
    held = estimate.sequences_held(model, layout, memory, 0.9 * hardware.gpu_memory_gib, 5_355, 256)
    rate = estimate.serving_rate(model, layout, hardware, memory, held, 5_355)
    assert 500 < rate / 8 < 2_200


def test_serving_speed_is_that_of_the_requests_in_flight():
    few, many = (
        stage(plan(student("qwen-14b"), load_teacher("r1-8xh200", {"client.in_flight": n}), named("8xh200")), "traces")
        for n in (64, 512)
    )
    assert few.tokens_per_second < many.tokens_per_second
    assert "64 answers at a time" in few.note and "in_flight=" in few.note


def test_layouts_of_the_teacher_are_weighed_beside_its_own():
    answer = stage(plan(student("qwen-14b"), load_teacher("r1-8xh200"), named("16xh100")), "traces")
    assert not answer.fits
    assert any(line.startswith("TP8 PP2: fits") and "--set teacher.options" in line for line in answer.rejected)


def test_students_are_served_in_layouts_that_share_out_their_heads():
    for name in R1_STUDENTS:
        for hardware in [named(each) for each in names("hardware") if named(each).gpus]:
            options = stageplan.student_options(student(name), hardware, 32_768)
            tensor, data = options.get("tensor-parallel-size", 1), options.get("data-parallel-size", 1)
            assert student(name).architecture.heads % tensor == 0 and tensor * data == hardware.gpus_per_node
    mine = student("qwen-7b", **{"serve_options.tensor-parallel-size": 2})
    assert stageplan.student_options(mine, named("8xh100"), 32_768)["tensor-parallel-size"] == 2
    assert "data-parallel-size" not in stageplan.student_options(mine, named("8xh100"), 32_768)


def test_processes_and_liger_are_chosen_where_the_user_leaves_them_open():
    here, node = named("laptop"), named("8xh100")
    assert training.choose(student("smollm2-135m"), here, 100).layout.strategy == "one"
    two = student("smollm2-135m", **{"sft.launch.processes_per_node": 2})
    assert training.choose(two, here, 100).layout.strategy == "ddp"
    assert training.choose(student("qwen-7b"), node, 5355).layout.liger
    assert not training.choose(student("qwen-7b", **{"sft.launch.liger": False}), node, 5355).layout.liger
    assert not training.choose(student("smollm2-135m"), here, 100).layout.liger


def test_gguf_files_are_answered_on_the_cpu_and_counted_so():
    benchmarks = [load("benchmarks", "aime2024", Benchmark)]

    def scored(questions):
        one = student("qwen-32b", variant_questions=questions, variants={"q4_k_m": {"kind": "gguf"}})
        return stage(plan(one, load_teacher("recorded"), named("8xh200"), None, benchmarks), "scores")

    assert "llama.cpp answers on the CPU" in scored(None).note and scored(None).hours > 2 * scored(10).hours


# The answer's form.


def test_hours_and_dollars_follow_from_the_price():
    priced = named("8xh200").model_copy(update={"price_usd_per_gpu_hour": 3})
    answer = plan(student("qwen-14b"), load_teacher("r1-8xh200"), priced)
    trained = stage(answer, "checkpoint")
    assert trained.tokens == 2 * 804_745 * 5_355
    assert trained.gpu_hours == pytest.approx(8 * trained.hours)
    assert float(trained.usd) == pytest.approx(3 * trained.gpu_hours, rel=1e-3)


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
    assert Layout.model_validate(loaded["training_layout"]) == answer.training_layout
    for part in ("weights", "gradients", "optimiser", "activations", "logits", "buffers"):
        assert loaded["stages"][1]["memory"][part] > 0
    for part in ("weights", "KV cache", "activations", "logits", "buffers"):
        assert loaded["stages"][0]["memory"][part] > 0


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
