"""Real training of a tiny model: TRL under accelerate, killed and resumed, full and LoRA."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.students import packing, sft, trainer, worker
from r1distill.students.catalogue import Student


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


def trained(student: Student, packs: Path, out: Path):
    (out / ".work").mkdir(parents=True, exist_ok=True)
    return sft.build(student, packs, out, out / "home")


def test_training_lowers_the_loss_and_ships_a_whole_checkpoint(tiny_student, sums_dataset, packs, tmp_path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = packs(tiny_student, sums_dataset)
    result = trained(tiny_student, folder, tmp_path / "out")
    out, metrics = tmp_path / "out", result.metrics
    result.check("checkpoint")
    assert metrics["last_loss"] < metrics["first_loss"] and metrics["validation_loss"] > 0
    history = json.loads((out / "loss.json").read_text())
    assert [row["step"] for row in history if "loss" in row] == list(range(1, metrics["steps"] + 1))
    assert (out / "loss.png").stat().st_size > 1000
    with safe_open(out / "model.safetensors", "pt") as file:
        assert all(file.get_tensor(name).dtype == torch.bfloat16 for name in file.keys())  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - tied
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.dtype == torch.bfloat16
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()


def test_killed_training_resumes_and_ends_in_the_same_weights(tiny_student, sums_dataset, packs, tmp_path) -> None:
    """SIGKILL after the second whole checkpoint; the worker dies too; the rerun continues and equals an unbroken run."""
    folder = packs(tiny_student, sums_dataset)
    slow = tiny_student.model_copy(update={"sft": tiny_student.sft.model_copy(update={"epochs": 12})})
    whole = trained(slow, folder, tmp_path / "whole")
    out = tmp_path / "killed"
    (out / ".work").mkdir(parents=True)
    code = (
        "import sys, pathlib\nfrom r1distill.students import sft\nfrom r1distill.students.catalogue import Student\n"
        "a = sys.argv\nsft.build(Student.model_validate_json(a[1]), *map(pathlib.Path, a[2:]))"
    )
    command = [sys.executable, "-c", code, slow.model_dump_json(), str(folder), str(out), str(out / "home")]
    caller = subprocess.Popen(command)
    checkpoints = out / ".work" / "checkpoints"
    deadline = time.monotonic() + 240
    while len(list(checkpoints.glob(f"*/{trainer.GOOD}"))) < 2:
        assert caller.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    wait_until_gone(str(out))
    (checkpoints / "checkpoint-999").mkdir()  # one that was cut off while being written
    good = trainer.last_good(checkpoints)
    assert good and not (checkpoints / "checkpoint-999").exists()
    first = int(good.rpartition("-")[2])
    result = trained(slow, folder, out)
    assert result.metrics["steps"] == whole.metrics["steps"] > first
    assert result.metrics["last_loss"] == pytest.approx(whole.metrics["last_loss"], rel=1e-5)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert len(json.loads((out / "loss.json").read_text())) == len(
        json.loads((tmp_path / "whole" / "loss.json").read_text())
    )


def wait_until_gone(mark: str, seconds: float = 20) -> None:
    """No process that has ``mark`` in its command line is left (this one aside)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        left = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if mark.encode() in command:
                    left.append(entry.name)
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {left}")


def test_merged_lora_equals_the_adapter(tiny_student, tiny_base, sums_dataset, packs, tmp_path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r1distill.students import base

    method = {"kind": "lora", "rank": 4, "alpha": 8}
    student = Student.model_validate(
        {**tiny_student.model_dump(), "sft": {**tiny_student.sft.model_dump(), "method": method}}
    )
    folder, out = packs(student, sums_dataset), tmp_path / "out"
    result = trained(student, folder, out)
    assert result.metrics["last_loss"] < result.metrics["first_loss"]
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


def test_lora_of_an_r1_student_trains_the_renamed_rows_of_both_embeddings(tmp_path) -> None:
    """The rows move, the other rows don't, and merging keeps them; TRL's and our loss see the trained rows."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    rows = {"embed_tokens": [5, 6], "lm_head": [5, 6]}
    model = LlamaForCausalLM(config)
    before = model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()
    tuned = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=rows)
    )
    packs = [{"input_ids": [1, 5, 9, 6, 2], "labels": [IGNORED, 5, 9, 6, 2], "seq_lengths": [5]}]
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    optimiser = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=1.0)
    batch = trainer.collate(packs, pad=0)
    labels = batch.pop("labels")
    head = tuned.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][labels[:, 1:] != IGNORED],))
    logits = tuned(**batch, use_cache=False).logits
    hook.remove()
    assert logits.shape == (4, 64)
    torch.nn.functional.cross_entropy(logits, labels[0, 1:]).backward()
    optimiser.step()
    with torch.no_grad():
        expected = tuned(**batch, use_cache=False).logits
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch, use_cache=False).logits, expected)
    for old, new in zip(
        before, (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight), strict=True
    ):
        moved = (new.detach() - old).abs().amax(dim=1) > 0
        assert moved.nonzero().flatten().tolist() == [5, 6]


IGNORED = -100


def test_a_base_whose_embeddings_are_tied_becomes_an_untied_student(
    tiny_student, tiny_base, packs, sums_dataset, tmp_path
):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from r1distill.students import base

    untied = tiny_student.architecture.model_copy(update={"tied": False, "rope_theta": 300000.0, "max_position": 1024})
    tokenizer = AutoTokenizer.from_pretrained(packs(tiny_student, sums_dataset) / "tokenizer")
    model = base.load(untied, tiny_base, tokenizer, torch.float32)
    ties = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert ties[0] is not ties[1] and torch.equal(*ties)
    with torch.no_grad():
        ties[1].add_(1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight + 1)
    assert again.config.rope_parameters["rope_theta"] == 300000.0 and again.config.max_position_embeddings == 1024


def test_a_failing_worker_is_answered_with_the_end_of_its_log(tmp_path) -> None:
    with pytest.raises(R1DistillError, match="KeyError"):
        list(worker.run("r1distill.students.sft", {"nothing": 1}, tmp_path))


def test_launch_options_are_known_to_accelerate(tmp_path) -> None:
    from accelerate.commands.launch import launch_command_parser

    from r1distill.data.config import load, names

    for name in names("students"):
        arguments = sft.launch_arguments(load("students", name, Student).sft.launch, cores=16)
        parsed = launch_command_parser().parse_args([*arguments, "-m", "module", "job"])
        assert parsed.num_processes >= 1 and parsed.module


def test_accumulation_gives_the_batch_that_was_asked_for(tiny_student) -> None:
    student = tiny_student.sft.model_copy(update={"batch_traces": 64})
    assert sft.accumulation(student, packs=131_340, traces=804_745) == 10  # 804,745 traces of 5,355 tokens in 32k packs
    assert sft.accumulation(student, packs=10, traces=10_000) == 1
    shutil.which("true")
