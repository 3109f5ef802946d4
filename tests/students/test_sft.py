"""Real training of a tiny model: TRL under accelerate, killed and resumed, full and LoRA."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import checkpoints, layout, packing, sft, trainer, worker
from r1distill.students.catalogue import Student
from r1distill.students.layout import Layout

from .conftest import row, sums

pytestmark = pytest.mark.slow

R1_USED = (151646, 151644, 151645, 151648, 151649, 151643)  # BOS, user, assistant, <think>, </think>, EOS


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Path] = {}

    def make(student: Student, dataset: Path) -> Path:
        key = student.template
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packs")
            (made[key] / ".work").mkdir()
            packing.build(student, dataset, made[key], made[key] / "home")
        return made[key]

    return make


def spread_of(student: Student) -> Layout:
    """As many processes on this CPU as the student's file says."""
    count = student.sft.launch.processes_per_node or 1
    strategy = "one" if count == 1 else "ddp"
    return layout.build(student.sft.launch, strategy=strategy, processes_per_node=count)


def trained(student: Student, packs: Path, out: Path, spread: Layout | None = None):
    (out / ".work").mkdir(parents=True, exist_ok=True)
    return sft.build(student, packs, out, out / "home", spread or spread_of(student))


def with_sft(student: Student, **changes) -> Student:
    return Student.model_validate({**student.model_dump(), "sft": {**student.sft.model_dump(), **changes}})


@pytest.fixture
def several(tiny_student: Student) -> Student:
    """Several packs a step, which two processes can't share out evenly, over many saves."""
    return with_sft(tiny_student, batch_traces=10, epochs=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, packs):
    """One process's training of ``several``, uninterrupted: its result and folder, made once."""
    made: list[tuple] = []

    def make(student: Student, dataset: Path) -> tuple:
        if not made:
            out = tmp_path_factory.mktemp("whole")
            told = with_sft(student, tracking="tensorboard")
            made.append(
                (trained(told, packs(student, dataset), out, Layout(checkpointing=False, device_tflops=1)), out)
            )
        return made[0]

    return make


def test_training_lowers_the_loss_and_ships_a_whole_checkpoint(several, sums_dataset, packs, whole) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packs(several, sums_dataset)
    result, out = whole(several, sums_dataset)
    metrics = result.metrics
    result.check("checkpoint")
    assert metrics["last_loss"] < metrics["first_loss"] and metrics["validation_loss"] > 0
    assert (metrics["batch_traces"], metrics["packs_per_step"], metrics["layout"]) == (10, 3, "one process")
    history = json.loads((out / "loss.json").read_text())
    assert [row["step"] for row in history if "loss" in row] == list(range(1, metrics["steps"] + 1))
    assert all(row["loss"] == pytest.approx(row["loss_math"]) for row in history if "loss_math" in row)
    assert (out / "loss.png").stat().st_size > 1000
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - tied
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.dtype == torch.bfloat16
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == end
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()


def test_the_tracker_is_told_what_matters(several, sums_dataset, whole) -> None:
    result, out = whole(several, sums_dataset)
    told = b"".join(events.read_bytes() for events in (out / "home" / "tracking").rglob("events.*"))
    for name in (b"tokens_per_second", b"mfu", b"padding_share", b"grad_norm", b"train/loss"):
        assert name in told
    assert 0 < result.metrics["mfu"] < 1 and 0 <= result.metrics["padding_share"] < 1


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tiny_student, packs, sums_dataset, tmp_path):
    missing = next((name for name in ("wandb", "trackio") if not importlib.util.find_spec(name)), None)
    if missing is None:
        pytest.skip("every tracker is installed")
    with pytest.raises(RequestError, match=f"tracking is '{missing}', and {missing} is not installed"):
        trained(with_sft(tiny_student, tracking=missing), packs(tiny_student, sums_dataset), tmp_path)


def test_two_processes_killed_while_saving_and_resumed_on_two_nodes_end_as_one_uninterrupted(
    several, sums_dataset, packs, whole, tmp_path
) -> None:
    """Two processes take unequal shares of every step; all are killed in the middle of a save; two launches that meet
    over loopback go on from the checkpoint before it. Every loss is that of one process that was never disturbed."""
    folder, out = packs(several, sums_dataset), tmp_path / "killed"
    (out / ".work").mkdir(parents=True)
    two = with_sft(several, launch={"processes_per_node": 2, "checkpointing": False})
    code = (
        "import sys, pathlib\nfrom r1distill.students import layout, sft\n"
        "from r1distill.students.catalogue import Student\n"
        "a = sys.argv\ns = Student.model_validate_json(a[1])\n"
        "sft.build(s, *map(pathlib.Path, a[2:]), layout.build(s.sft.launch, strategy='ddp', processes_per_node=2))"
    )
    command = [sys.executable, "-c", code, two.model_dump_json(), str(folder), str(out), str(out / "home")]
    caller = subprocess.Popen(command)
    saved = out / ".work" / "checkpoints"
    deadline = time.monotonic() + 400
    while not (torn := unfinished(saved) if checkpoints.whole(saved) else []):
        assert caller.poll() is None and time.monotonic() < deadline
    kill_all(caller, str(out))
    assert unfinished(saved), torn  # the save was cut off indeed
    first = checkpoints.number(checkpoints.whole(saved)[-1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = Layout(strategy="ddp", nodes=2, hosts=("127.0.0.1", "127.0.0.1"), port=port, checkpointing=False)
    result = trained(two, folder, out, nodes)
    assert not unfinished(saved)
    uninterrupted, alone = whole(several, sums_dataset)
    assert result.metrics["steps"] == uninterrupted.metrics["steps"] > first > 0
    assert result.metrics["layout"] == "DDP x2, 2 nodes"
    assert losses(out) == pytest.approx(losses(alone), rel=1e-4)
    assert result.metrics["validation_loss"] == pytest.approx(uninterrupted.metrics["validation_loss"], rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("degree", [1, 2], ids=["zero3", "ulysses"])
def test_deepspeed_on_two_processes_learns_as_one_alone(degree, several, sums_dataset, packs, whole, tmp_path) -> None:
    """Sharded weights, and under Ulysses sequences cut in two whose packed traces still don't see each other."""
    spread = Layout(strategy="zero3", processes_per_node=2, sequence_parallel=degree)
    result = trained(several, packs(several, sums_dataset), tmp_path, spread)
    uninterrupted, alone = whole(several, sums_dataset)
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(tmp_path, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-3)
    assert result.metrics["validation_loss"] == pytest.approx(uninterrupted.metrics["validation_loss"], rel=1e-4)
    assert (tmp_path / "model.safetensors").stat().st_size == (alone / "model.safetensors").stat().st_size


def test_a_loss_that_is_no_number_stops_the_training_with_its_pack_saved(tiny_student, tiny_base, tmp_path) -> None:
    """A broken embedding of one token, which one trace holds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, tie_word_embeddings=False)
    (broken,) = AutoTokenizer.from_pretrained(base).encode("Q")
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.model.embed_tokens.weight[broken] = float("nan")
    model.save_pretrained(base)
    shape = tiny_student.architecture.model_dump() | {"tied": False}
    student = Student.model_validate(
        {**with_sft(tiny_student, batch_traces=6).model_dump(), "architecture": shape}
        | {"base": {"kind": "folder", "path": str(base)}}
    )
    dataset, folder, out = tmp_path / "dataset", tmp_path / "packs", tmp_path / "out"
    schema.write(dataset / "train", schema.TRAINING_ROW, [*sums(11), row("odd", "Q?", "Q", "1")])
    (folder / ".work").mkdir(parents=True)
    packing.build(student, dataset, folder, tmp_path / "home")
    with pytest.raises(
        R1DistillError, match=r"step \d+ has loss nan and gradient norm nan: pack \d+ gave it"
    ) as caught:
        trained(student, folder, out)
    (record,) = (out / ".work" / "not-finite").glob("step-*/losses.json")
    told = json.loads(record.read_text())
    kept = list(schema.rows(schema.read(record.parent / "packs", schema.PACK)))
    (bad,) = told["not_finite"]
    culprit = kept[told["packs"].index(bad)]
    assert "odd" in [member["prompt_id"] for member in culprit["members"]]
    assert str(record.parent) in str(caught.value)
    assert f"checkpoint-{told['step']}" not in {path.name for path in (out / ".work" / "checkpoints").glob("*")}


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints that are being written, or were when their writer died."""
    return [one for one in folder.glob("checkpoint-*") if not (one / checkpoints.GOOD).is_file()]


def losses(checkpoint: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in json.loads((checkpoint / "loss.json").read_text()) if "loss" in row]


def living(mark: str) -> list[int]:
    """Processes that have ``mark`` in their command line (this one aside)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
    return found


def kill_all(caller: subprocess.Popen, mark: str) -> None:
    """SIGKILL for a process and for all that have ``mark`` in their command line; waits for their end."""
    for process in [caller.pid, *living(mark)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    caller.wait()
    wait_until_gone(mark)


def wait_until_gone(mark: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := living(mark):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


def test_merged_lora_equals_the_adapter(tiny_student, tiny_base, sums_dataset, packs, tmp_path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r1distill.students import base

    method = {"kind": "lora", "rank": 4, "alpha": 8}
    student = with_sft(tiny_student, method=method)
    folder, out = packs(student, sums_dataset), tmp_path / "out"
    result = trained(student, folder, out)
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
    assert {file.name for file in (out / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = base.load(student.architecture, tiny_base, tokenizer, torch.float32)
    adapted = PeftModel.from_pretrained(model, str(out / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("12+30=?")])
    with torch.no_grad():
        found, expected = merged(ids).logits, adapted(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)(ids).logits
    assert (found - expected).abs().max() < 0.02 * (expected - plain).abs().max() + 2e-2  # bf16 rounding of the merged
    assert (expected - plain).abs().max() > 0.1


def test_lora_of_an_r1_student_trains_the_renamed_rows_of_both_embeddings(
    tiny_r1_student, tiny_r1_base, sums_dataset, packs, tmp_path
) -> None:
    """The base ties its embeddings, the student doesn't: both start alike, only the renamed tokens' rows move."""
    from safetensors.torch import load_file

    folder, out = packs(tiny_r1_student, sums_dataset), tmp_path / "out"
    trained(tiny_r1_student, folder, out)
    before = load_file(tiny_r1_base / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(out / "model.safetensors")
    for name, rows in (("model.embed_tokens.weight", {*R1_USED[:-1]}), ("lm_head.weight", {*R1_USED[-2:]})):
        moved = (after[name] != before).any(dim=1).nonzero().flatten().tolist()
        assert rows <= set(moved) <= set(range(151643, 151650)), name
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_trls_fused_head_sees_the_trained_rows(tiny_r1_student, tiny_r1_base, sums_dataset, packs) -> None:
    """On GPUs the loss is TRL's: it must read the adapter's rows of lm_head, and give them gradients."""
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer
    from trl.trainer.utils import add_fused_lm_head

    from r1distill.students import base

    tokenizer = AutoTokenizer.from_pretrained(packs(tiny_r1_student, sums_dataset) / "tokenizer")
    model = base.load(tiny_r1_student.architecture, tiny_r1_base, tokenizer, torch.float32)
    tuned = get_peft_model(model, trainer.lora(tiny_r1_student, tokenizer))
    add_fused_lm_head(model)
    trainer.complete_head(tuned)
    rows = tuned.get_output_embeddings().token_adapter.trainable_tokens_delta["default"]
    rows.data += 0.1
    ids = torch.tensor([[*R1_USED]])
    fused = tuned(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
    logits = tuned(input_ids=ids, use_cache=False).logits[0, :-1]
    torch.testing.assert_close(fused, torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    assert torch.autograd.grad(fused, rows)[0].abs().max() > 0


def test_an_untied_student_keeps_its_own_output_embedding(tiny_r1_student, tiny_r1_base, sums_dataset, packs, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r1distill.students import base

    shape = tiny_r1_student.architecture.model_copy(update={"rope_theta": 300000.0, "max_position": 1024})
    tokenizer = AutoTokenizer.from_pretrained(packs(tiny_r1_student, sums_dataset) / "tokenizer")
    model = base.load(shape, tiny_r1_base, tokenizer, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight + 1)
    assert again.config.rope_parameters["rope_theta"] == 300000.0 and again.config.max_position_embeddings == 1024


def test_a_base_of_another_shape_is_refused(tiny_student, tiny_base, sums_dataset, packs) -> None:
    import torch
    from transformers import AutoTokenizer

    from r1distill.students import base

    tokenizer = AutoTokenizer.from_pretrained(packs(tiny_student, sums_dataset) / "tokenizer")
    with pytest.raises(RequestError, match="num_hidden_layers 2, the student's file says 3"):
        base.load(tiny_student.architecture.model_copy(update={"layers": 3}), tiny_base, tokenizer, torch.float32)


def test_a_base_that_lacks_weights_is_refused(tiny_student, tiny_base, sums_dataset, packs, tmp_path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from r1distill.students import base

    tokenizer = AutoTokenizer.from_pretrained(packs(tiny_student, sums_dataset) / "tokenizer")
    shutil.copytree(tiny_base, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file(
        {name: one for name, one in weights.items() if "layers.1.mlp.up" not in name},
        tmp_path / "base/model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(RequestError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        base.load(tiny_student.architecture, tmp_path / "base", tokenizer, torch.float32)


@pytest.mark.parametrize(
    ("before", "after", "goes_on"),
    [
        ({"strategy": "one"}, {"strategy": "ddp", "processes_per_node": 4}, True),
        ({"strategy": "zero3", "processes_per_node": 2}, {"strategy": "zero3", "processes_per_node": 2}, True),
        ({"strategy": "zero3", "processes_per_node": 2}, {"strategy": "ddp", "processes_per_node": 2}, False),
        ({"strategy": "zero3", "processes_per_node": 2}, {"strategy": "zero3", "processes_per_node": 4}, False),
        ({"strategy": "ddp", "processes_per_node": 2}, {"strategy": "zero3", "processes_per_node": 2}, False),
        (
            {"strategy": "fsdp2", "processes_per_node": 8, "cpu": False},
            {"strategy": "fsdp2", "nodes": 2, "processes_per_node": 8, "cpu": False},
            True,
        ),
    ],
)
def test_a_layout_that_cannot_read_the_checkpoints_is_refused(before: dict, after: dict, goes_on: bool, tmp_path):
    """Without its optimiser's file transformers would begin optimiser and learning rate anew, and say nothing."""
    first, then = Layout(**before), Layout(**after)
    sft.check_states(first, tmp_path)
    sft.check_states(then, tmp_path)  # nothing was saved yet
    sft.check_states(first, tmp_path)
    (saved := tmp_path / "checkpoints" / "checkpoint-50").mkdir(parents=True)
    checkpoints.mark(saved)
    if goes_on:
        return sft.check_states(then, tmp_path)
    with pytest.raises(RequestError, match=r"at step 50 by .*, and .* can't go on from its states"):
        sft.check_states(then, tmp_path)
    sft.check_states(first, tmp_path)


def test_a_failing_worker_says_why(tmp_path) -> None:
    with pytest.raises(R1DistillError, match=r"KeyError: 'student'"):
        list(worker.run("r1distill.students.sft", {"nothing": 1}, tmp_path))


def test_a_step_holds_the_traces_that_were_asked_for(tiny_student) -> None:
    student = tiny_student.sft.model_copy(update={"batch_traces": 64})
    assert (
        sft.packs_per_step(student, packs=131_340, traces=804_745) == 10
    )  # 804,745 traces of 5,355 tokens in 32k packs
    assert sft.packs_per_step(student, packs=10, traces=10_000) == 1
