"""Real training of a tiny model: TRL under accelerate, killed and resumed, full and LoRA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import layout, packing, sft, trainer, worker
from r1distill.students.catalogue import Student

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


def trained(student: Student, packs: Path, out: Path):
    (out / ".work").mkdir(parents=True, exist_ok=True)
    return sft.build(student, packs, out, out / "home", layout.default(student.sft.launch))


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
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == end
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / "tokenizer" / name).read_bytes()


def test_killed_training_resumes_and_ends_in_the_same_weights(tiny_student, sums_dataset, packs, tmp_path) -> None:
    """SIGKILL after a whole checkpoint: the worker dies too, the rerun goes on and ends as an unbroken run does."""
    folder = packs(tiny_student, sums_dataset)
    slow = tiny_student.model_copy(update={"sft": tiny_student.sft.model_copy(update={"epochs": 6})})
    whole = trained(slow, folder, tmp_path / "whole")
    out = tmp_path / "killed"
    (out / ".work").mkdir(parents=True)
    code = (
        "import sys, pathlib\nfrom r1distill.students import layout, sft\n"
        "from r1distill.students.catalogue import Student\n"
        "a = sys.argv\ns = Student.model_validate_json(a[1])\n"
        "sft.build(s, *map(pathlib.Path, a[2:]), layout.default(s.sft.launch))"
    )
    command = [sys.executable, "-c", code, slow.model_dump_json(), str(folder), str(out), str(out / "home")]
    caller = subprocess.Popen(command)
    checkpoints = out / ".work" / "checkpoints"
    deadline = time.monotonic() + 240
    while not list(checkpoints.glob(f"*/{trainer.GOOD}")):
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
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def losses(checkpoint: Path) -> list[float]:
    return [row["loss"] for row in json.loads((checkpoint / "loss.json").read_text()) if "loss" in row]


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


def test_a_failing_worker_says_why(tmp_path) -> None:
    with pytest.raises(R1DistillError, match=r"KeyError: 'student'"):
        list(worker.run("r1distill.students.sft", {"nothing": 1}, tmp_path))


def test_a_step_holds_the_traces_that_were_asked_for(tiny_student) -> None:
    student = tiny_student.sft.model_copy(update={"batch_traces": 64})
    assert (
        sft.packs_per_step(student, packs=131_340, traces=804_745) == 10
    )  # 804,745 traces of 5,355 tokens in 32k packs
    assert sft.packs_per_step(student, packs=10, traces=10_000) == 1
