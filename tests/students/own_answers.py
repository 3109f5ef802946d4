"""What the tests of learning from own answers share: prompts, a checkpoint that answers them, a teacher, the stage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from r1distill.data import schema
from r1distill.data.settings import VerdictSettings
from r1distill.students import beyond, layout
from r1distill.students.catalogue import Student
from r1distill.students.layout import Layout
from r1distill.students.template import TEMPLATES, encode

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


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
