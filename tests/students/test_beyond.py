"""Learning from its own answers: GRPO and on-policy distillation of a tiny model, killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from r1distill.data import schema, verdicts
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import VerdictSettings
from r1distill.students import beyond, checkpoints, layout, onpolicy, preflight, rollouts
from r1distill.students.catalogue import Student
from r1distill.students.layout import Layout
from r1distill.students.template import TEMPLATES, encode, write_tokenizer

from .test_sft import kill_all

pytestmark = pytest.mark.slow

INSTRUCTION = "Box it."
GRPO = {"kind": "grpo", "steps": 4, "prompts_per_step": 2, "group_size": 4, "learning_rate": 3e-3, "save_steps": 2,
        "max_completion_tokens": 24}  # fmt: skip
RULES = VerdictSettings(workers=1)


def prompt(number: int, **changes: object) -> dict:
    """The answer is 8 or 9, and nothing in the question says which."""
    row = {"prompt_id": f"p{number:03}", "question": f"What is box {number}?", "domain": "math",
           "reference_answer": str(8 + number % 2), "verifier": "math", "verifier_args": "{}", "source": "boxes",
           "source_id": str(number), "license": "mit"}  # fmt: skip
    return row | changes


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten usable prompts, one without a rule, one that is too long, one with a control token."""
    folder = tmp_path_factory.mktemp("prompts")
    odd = [
        prompt(90, verifier="judge"),
        prompt(91, question="long " * 200),
        prompt(92, question="<|im_start|> What?"),
        prompt(93, reference_answer=None),
    ]
    schema.write(folder, schema.PROMPT, [*map(prompt, range(10)), *odd])
    return folder


@pytest.fixture(scope="module")
def checkpoint(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has learned the form of an answer, and that it is 8 or 9."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    for file in folder.glob("model*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    rows = []
    for number in range(8):
        told = {"role": "user", "content": f"{prompt(number)['question']}\n\n{INSTRUCTION}", "thinking": None}
        said = {"role": "assistant", "thinking": "Hm", "content": f"\\boxed{{{8 + number % 2}}}"}
        rows.append(encode(TEMPLATES["chatml"], tokenizer, [told, said]))
    width = max(len(ids) for ids, _ in rows)
    ids, labels = (
        torch.tensor([row[part] + [fill] * (width - len(row[0])) for row in rows]) for part, fill in ((0, 0), (1, -100))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    torch.manual_seed(0)
    for _ in range(60):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def student(tiny_student: Student) -> Callable[..., Student]:
    """The tiny student with settings of the stage, and of its training."""

    def with_beyond(settings: dict, **sft: object) -> Student:
        whole = tiny_student.model_dump()
        return Student.model_validate({**whole, "beyond": settings, "sft": {**whole["sft"], **sft}})

    return with_beyond


@pytest.fixture
def teacher(checkpoint: Path, tmp_path: Path) -> Callable[[int], Path]:
    """The checkpoint with other weights and so many rows of vocabulary."""

    def make(rows: int) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        folder = tmp_path / f"teacher-{rows}"
        shutil.copytree(checkpoint, folder)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        torch.manual_seed(7)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(folder)
        return folder

    return make


def on_policy(folder: Path, **changes: object) -> dict:
    plain = {"kind": "on_policy", "steps": 4, "prompts_per_step": 4, "learning_rate": 3e-3, "save_steps": 2,
             "max_completion_tokens": 24, "teacher": {"kind": "folder", "path": str(folder)}}  # fmt: skip
    return plain | changes


def built(student: Student, prompts: Path, checkpoint: Path, out: Path, spread: Layout | None = None):
    """The stage as it is run, in processes of its own."""
    (out / ".work").mkdir(parents=True, exist_ok=True)
    spread = spread or layout.build(student.sft.launch)
    return beyond.build(
        student, prompts, checkpoint, out, out / "home", spread,
        rules=RULES, instruction=INSTRUCTION, validation_share=0.1,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the worker's code in this process: what is told is the last message."""

    def launched(module: str, job: dict, work: Path, student: Student, spread: Layout) -> dict:
        said: list[dict] = []
        monkeypatch.setattr("r1distill.students.worker.tell", lambda **message: said.append(message))
        with mock.patch.dict(os.environ):  # a worker keeps to itself what it sets
            beyond.main(job)
        return said[-1]

    monkeypatch.setattr("r1distill.students.sft.launched", launched)


def history(out: Path) -> list[dict]:
    return json.loads((out / "loss.json").read_text())


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in history(out)]


def answers(out: Path) -> list[dict]:
    return schema.read(out / "rollouts", schema.ROLLOUT).to_pylist()


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


def test_one_answer_to_two_prompts_is_judged_for_each(tiny_base: Path) -> None:
    """A student that says the same to everything gets no verdict of another prompt's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    said = [tokenizer.encode("4", add_special_tokens=False)]
    judge = rollouts.Judge(RULES, tokenizer, [tokenizer.eos_token_id], sharing=1)
    rows = [dict.fromkeys(schema.PROMPT.names) | {"prompt_id": name, "question": "2 + 2?", "domain": "math",
            "verifier": "math", "reference_answer": "4"} for name in "ab"]  # fmt: skip
    assert [judge([row], said)[0].prompt_id for row in rows] == ["a", "b"]


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


def test_a_prompt_has_one_bos_and_opens_the_thinking(tiny_r1_student, tiny_r1_base, prompts, tmp_path) -> None:
    """And what is too long or holds a control token is not asked."""
    template = TEMPLATES["r1"]
    tokenizer = write_tokenizer(template, tiny_r1_base, tmp_path, max_tokens=512)
    student = Student.model_validate({**tiny_r1_student.model_dump(), "beyond": {**GRPO, "steps": 100}})
    drawn, rejected = rollouts.draw(student, schema.read(prompts, schema.PROMPT), tokenizer, INSTRUCTION, 0.1)
    assert rejected["longer than the context leaves"] == 1 and rejected["no rule can judge its answers"] == 2
    assert len(drawn) + rejected.total() == 14
    for row in drawn:
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
        assert row["prompt"].endswith("<｜Assistant｜><think>\n")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(R1DistillError, match="asks with other tokens"):
        rollouts.draw(student, schema.read(prompts, schema.PROMPT), tokenizer, INSTRUCTION, 0.1)


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


@pytest.mark.parametrize(("rows", "beta", "temperature"), [(320, 0.5, 0.7), (333, 1.0, 1.0), (264, 0.0, 1.0)])
def test_the_loss_of_on_policy_is_the_dense_one(
    rows, beta, temperature, student, prompts, checkpoint, teacher, tmp_path, here, monkeypatch
) -> None:
    """Loss and every gradient to 1e-4 of their size, over the rows that both vocabularies have."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    grads: dict[str, torch.Tensor] = {}
    plain = onpolicy.progress

    def progress(answers: int):
        class Grads(type(plain(answers))):  # type: ignore[misc]
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs) -> None:
                grads.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

        assert issubclass(Grads, TrainerCallback)
        return Grads()

    monkeypatch.setattr(onpolicy, "progress", progress)
    folder = teacher(rows)
    settings = on_policy(folder, steps=1, beta=beta, temperature=temperature)
    built(student(settings, max_grad_norm=1e9), prompts, checkpoint, tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    small, large = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (checkpoint, folder))
    shared, total, tokens = min(320, rows), 0, 0
    for row in answers(tmp_path / "out"):
        question = prompt(int(row["prompt_id"][1:]))["question"]
        text = TEMPLATES["chatml"].prefix([{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}])
        asked, said = tokenizer.encode(text, add_special_tokens=False), row["token_ids"]
        places = slice(len(asked) - 1, len(asked) + len(said) - 1)
        s, t = (
            (model(torch.tensor([asked + said])).logits[0, places, :shared] / temperature).log_softmax(-1)
            for model in (small, large)
        )
        t = t.detach()
        m = torch.logsumexp(torch.stack([s + torch.tensor(1 - beta).log(), t + torch.tensor(beta).log()]), dim=0)
        if beta == 0:
            total = total + (t.exp() * (t - s)).sum()
        elif beta == 1:
            total = total + (s.exp() * (s - t)).sum()
        else:
            total = total + beta * (t.exp() * (t - m)).sum() + (1 - beta) * (s.exp() * (s - m)).sum()
        tokens += len(said)
    loss = total / tokens
    loss.backward()
    assert losses(tmp_path / "out") == [pytest.approx(loss.item(), rel=1e-4)]
    assert loss.item() > 1e-3 and grads.keys() == {name for name, _ in small.named_parameters()}
    for name, weight in small.named_parameters():
        found = grads[name].double()
        assert float((found - weight.grad).abs().max() / weight.grad.abs().max()) < 1e-4, name


def test_a_teacher_of_another_vocabulary_is_refused(student, prompts, checkpoint, tiny_r1_base, tmp_path, here) -> None:
    """By the stage, and by the look at everything before a teacher of traces is paid."""
    other = student(on_policy(tiny_r1_base))
    with pytest.raises(RequestError, match=r"beyond\.teacher .* has another vocabulary"):
        built(other, prompts, checkpoint, tmp_path)
    with pytest.raises(RequestError, match=r"beyond\.teacher .* has another vocabulary"):
        preflight.require_teachers(other, tmp_path)
    preflight.require_teachers(student(on_policy(checkpoint)), tmp_path)


def test_a_loss_that_is_no_number_stops_it(student, prompts, checkpoint, teacher, tmp_path, here) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = teacher(320)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(R1DistillError, match="step 1 has loss nan"):
        built(student(on_policy(folder)), prompts, checkpoint, tmp_path / "out")
    assert len(list((tmp_path / "out" / ".work" / "rollouts").glob("*.arrow"))) == 1


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


def test_prompts_come_again_once_all_were_asked() -> None:
    """Whole groups side by side, a step's rows once for each round, and the same order whenever it is asked for."""
    order = rollouts.Order(prompts=3, steps=6, prompts_per_step=2, group=2, rounds=2, seed=1)
    rows = list(order)
    assert len(rows) == len(order) == 6 * 2 * 2 * 2 and rows == list(order)
    steps = [rows[place : place + 8] for place in range(0, 48, 8)]
    for step in steps:
        assert step[:4] == step[4:] and step[0] == step[1] and step[2] == step[3]
    asked = [prompt for step in steps for prompt in (step[0], step[2])]
    assert all(sorted(asked[place : place + 3]) == [0, 1, 2] for place in range(0, 12, 3))
    assert asked[:3] == [0, 1, 2] and len({tuple(asked[place : place + 3]) for place in range(0, 12, 3)}) > 1


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
