"""The stage beyond: GRPO and on-policy distillation of a tiny model, killed and resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data import verdicts
from r1distill.data.errors import RequestError
from r1distill.students import checkpoints, rollouts
from r1distill.students.catalogue import Student
from r1distill.students.layout import Layout
from r1distill.students.template import TEMPLATES, encode, write_tokenizer

from .own_answers import GRPO, INSTRUCTION, RULES, answers, built, history, losses, on_policy, prompt
from .test_sft import kill_all

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def grpo(student, prompts, checkpoint, whole: Path, here, monkeypatch) -> tuple:
    """(result, folder) of a GRPO training that nothing disturbed, made once; what generate was given lies beside."""
    from transformers import GenerationMixin

    file = whole / "result.json"
    if not file.is_file():
        given: list[list[int]] = []
        generate = GenerationMixin.generate

        def noted(self, input_ids, attention_mask, **kwargs):
            given.extend(ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True))
            return generate(self, input_ids, attention_mask=attention_mask, **kwargs)

        monkeypatch.setattr(GenerationMixin, "generate", noted)
        result = built(student(GRPO), prompts, checkpoint, whole / "out")
        result.check("beyond")
        monkeypatch.setattr(GenerationMixin, "generate", generate)
        (whole / "given.json").write_text(json.dumps(given))
        file.write_text(json.dumps(vars(result)))
    return json.loads(file.read_text()), whole / "out"


def test_every_prompt_is_accounted_for(grpo) -> None:
    """What can't be asked, and of the others what the 4 steps of 2 take: the order of a lot decides."""
    result, out = grpo
    held_out = result["rejected"].pop("held out for validation", 0)
    assert result["rejected"].pop("no rule can judge its answers") == 2
    assert 8 == result["kept"] == len({row["prompt_id"] for row in answers(out)})
    assert sum(result["rejected"].values()) == 14 - held_out - 2 - 8
    assert set(result["rejected"]) <= {
        "not needed for so many steps",
        "longer than the context leaves",
        "control token inside the text",
    }


def test_answers_are_logged_with_what_they_are_worth(grpo, prompts) -> None:
    """A reward is our verdict of the text that was logged; an advantage is over the group's mean."""
    import numpy as np

    result, out = grpo
    rows, asked = answers(out), {row["prompt_id"]: row for row in map(prompt, range(10))}
    assert len(rows) == result["metrics"]["answers"] == 4 * 2 * 4
    assert [(row["step"], row["number"]) for row in rows] == [(s, n) for s in range(1, 5) for n in range(8)]
    assert result["metrics"]["tokens"] == sum(len(row["token_ids"]) for row in rows)
    items = [
        verdicts.item(asked[row["prompt_id"]], rollouts._trace(asked[row["prompt_id"]], 0, row["completion"],
                                                              row["finish_reason"], 1))
        for row in rows
    ]  # fmt: skip
    for row, judged in zip(rows, verdicts.judge(RULES, items), strict=True):
        found = {one["check"]: one["outcome"] for one in judged.verdicts}
        assert found == {one["check"]: one["outcome"] for one in row["verdicts"]}
        right = found["correctness"] == "pass" and found["truncation"] != "fail"
        assert row["reward"] == right + (found["format"] == "pass")
    rewards = np.array([row["reward"] for row in rows]).reshape(-1, 4)
    assert len(set(rewards.ravel())) > 1
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose([row["advantage"] for row in rows], expected.ravel(), atol=1e-3)


def test_rewards_lengths_and_cuts_are_told_of_every_step(grpo) -> None:
    _, out = grpo
    rows = answers(out)
    for number, told in enumerate(history(out), 1):
        own = [row for row in rows if row["step"] == number]
        assert told["rewards/correctness/mean"] + told["rewards/format/mean"] == pytest.approx(
            sum(row["reward"] for row in own) / len(own)
        )
        assert told["completions/mean_length"] == sum(len(row["token_ids"]) for row in own) / len(own)
        cut = sum(row["finish_reason"] == "length" for row in own) / len(own)
        assert told["completions/clipped_ratio"] == pytest.approx(cut)
    assert (out / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("kind", ["grpo", "on_policy"])
def test_one_that_was_cut_off_ends_as_one_that_was_not(
    kind, student, prompts, checkpoint, teacher, grpo, tmp_path, here, monkeypatch
) -> None:
    """Cut off while the answers of step 3 are written, which is then repeated from the checkpoint of step 2."""
    _, alone = grpo
    settings = GRPO
    if kind == "on_policy":
        settings, alone = on_policy(teacher(320)), tmp_path / "alone"
        built(student(settings), prompts, checkpoint, alone)
    write = rollouts.Log.write

    def cut_off(self: rollouts.Log, step: int, process: int, rows: list) -> None:
        write(self, step, process, rows)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(rollouts.Log, "write", cut_off)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        built(student(settings), prompts, checkpoint, out)
    assert len(list((out / ".work" / "rollouts").glob("*.arrow"))) == 3
    monkeypatch.setattr(rollouts.Log, "write", write)
    result = built(student(settings), prompts, checkpoint, out)
    assert result.metrics["resumed_from_step"] == 2
    assert losses(out) == losses(alone) and len(set(losses(out))) > 1
    assert answers(out) == answers(alone)
    assert (out / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_a_checkpoint_comes_out_as_one_went_in(grpo, checkpoint) -> None:
    import torch
    from safetensors.torch import load_file

    _, out = grpo
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, out))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_student_is_asked_with_the_very_tokens_of_its_training(grpo, checkpoint, whole) -> None:
    """What generate gets, padding aside, is the prefix of a training example."""
    from transformers import AutoTokenizer

    given = json.loads((whole / "given.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = answers(grpo[1])
    assert len(given) == len(rows)
    for ids, row in zip(given, rows, strict=True):
        question = prompt(int(row["prompt_id"][1:]))["question"]
        told = {"role": "user", "content": f"{question}\n\n{INSTRUCTION}", "thinking": None}
        said = {"role": "assistant", "content": "9", "thinking": "8"}
        example, labels = encode(TEMPLATES["chatml"], tokenizer, [told, said])
        assert ids == example[: labels.count(-100)]


def test_every_end_token_ends_an_answer(student, prompts, checkpoint, tmp_path, here) -> None:
    from transformers import AutoTokenizer

    two = tmp_path / "two"
    shutil.copytree(checkpoint, two)
    tokenizer = AutoTokenizer.from_pretrained(two)
    sampling = json.loads((two / "generation_config.json").read_text())
    ends = [sampling["eos_token_id"], *tokenizer.encode("\\")]
    (two / "generation_config.json").write_text(json.dumps({**sampling, "eos_token_id": ends}))
    settings = {**GRPO, "steps": 1, "prompts_per_step": 4, "group_size": 2}
    built(student(settings, precision="bf16_autocast"), prompts, two, tmp_path / "out")
    rows = answers(tmp_path / "out")
    assert {row["token_ids"][-1] for row in rows if row["finish_reason"] == "stop"} == {ends[1]}
    for row in rows:
        assert not set(row["token_ids"][:-1]) & set(ends)
        assert row["finish_reason"] == "stop" or len(row["token_ids"]) == GRPO["max_completion_tokens"]


@pytest.mark.parametrize("kind", ["on_policy", pytest.param("grpo", marks=pytest.mark.soak)])
def test_an_adapter_goes_on_where_it_stood(kind, tiny_r1_student, tiny_r1_base, prompts, tmp_path, here) -> None:
    """On a base whose embeddings are untied, with the rows of renamed tokens, which both losses have to see."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import load_file

    from r1distill.students import base, trainer

    start, out = tmp_path / "checkpoint", tmp_path / "out"
    tokenizer = write_tokenizer(TEMPLATES["r1"], tiny_r1_base, start, max_tokens=512)
    model = base.load_to_train(tiny_r1_student, tiny_r1_base, tokenizer, Layout())
    model.generation_config.save_pretrained(start)
    torch.manual_seed(3)
    model = get_peft_model(model, trainer.lora(tiny_r1_student, tokenizer))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    model.save_pretrained(start / "adapter")
    settings = {**GRPO, "steps": 1, "group_size": 2, "rewards": {"language": 1.0}, "max_completion_tokens": 8}
    if kind == "on_policy":
        settings = on_policy(tiny_r1_base, steps=1, prompts_per_step=2, max_completion_tokens=8)
    student = Student.model_validate({**tiny_r1_student.model_dump(), "beyond": settings})
    built(student, prompts, start, out).check("beyond")
    before, after = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (start, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if kind == "on_policy":  # GRPO's rewards may all be the same
        assert changed == set(before)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_r1_base.name  # not the checkpoint, nor a path of this machine
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["answers", "sequences", "vllm"])
def test_what_cannot_be_carried_is_refused_before_anything_starts(name, student, prompts, checkpoint, tmp_path) -> None:
    two = {"processes_per_node": 2}
    settings, spread, message = {
        "answers": ({**GRPO, "group_size": 3, "prompts_per_step": 1}, Layout(strategy="ddp", **two), "3 answers"),
        "sequences": (GRPO, Layout(strategy="zero3", sequence_parallel=2, **two), "cut sequences"),
        "vllm": ({**GRPO, "rollouts": "vllm"}, Layout(), "there are none"),
    }[name]
    with pytest.raises(RequestError, match=message):
        built(student(settings), prompts, checkpoint, tmp_path, spread)


@pytest.mark.soak
def test_two_processes_killed_and_resumed_log_every_answer_once(student, prompts, checkpoint, tmp_path) -> None:
    """All are killed once a checkpoint is whole and answers after it are on disk."""
    settings, out = {**GRPO, "save_steps": 1}, tmp_path / "out"
    (out / ".work").mkdir(parents=True)
    code = (
        "import sys, pathlib\nfrom r1distill.data.settings import VerdictSettings\n"
        "from r1distill.students import beyond\nfrom r1distill.students.catalogue import Student\n"
        "from r1distill.students.layout import Layout\na = sys.argv\n"
        "beyond.build(Student.model_validate_json(a[1]), *map(pathlib.Path, a[2:]),"
        "Layout(strategy='ddp', processes_per_node=2, checkpointing=False), rules=VerdictSettings(workers=1),"
        f"instruction={INSTRUCTION!r}, validation_share=0.1)"
    )
    words = [student(settings).model_dump_json(), str(prompts), str(checkpoint), str(out), str(out / "home")]
    caller = subprocess.Popen([sys.executable, "-c", code, *words])
    saved, logged, deadline = out / ".work" / "checkpoints", out / ".work" / "rollouts", time.monotonic() + 300
    while not (good := checkpoints.whole(saved)) or not list(logged.glob(f"{checkpoints.number(good[-1]) + 1:08}-*")):
        assert caller.poll() is None and time.monotonic() < deadline
    kill_all(caller, str(out))
    spread = Layout(strategy="ddp", processes_per_node=2, checkpointing=False)
    result = built(student(settings), prompts, checkpoint, out, spread)
    rows = answers(out)
    assert result.metrics["resumed_from_step"] >= 1 and result.metrics["layout"] == "DDP x2"
    assert [(row["step"], row["number"]) for row in rows] == [(s, n) for s in range(1, 5) for n in range(8)]
    for number, told in enumerate(history(out), 1):
        own = [row for row in rows if row["step"] == number]
        assert len({row["prompt_id"] for row in own}) == 2
        assert told["reward"] == pytest.approx(sum(row["reward"] for row in own) / 8)
