"""What a student is asked while it learns from its own answers, and what each answer is worth."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.students import rollouts
from r1distill.students.catalogue import Student
from r1distill.students.template import TEMPLATES, write_tokenizer

from .own_answers import GRPO, INSTRUCTION, RULES


def test_one_answer_to_two_prompts_is_judged_for_each(tiny_base: Path) -> None:
    """A student that says the same to everything gets no verdict of another prompt's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    said = [tokenizer.encode("4", add_special_tokens=False)]
    judge = rollouts.Judge(RULES, tokenizer, [tokenizer.eos_token_id], sharing=1)
    rows = [dict.fromkeys(schema.PROMPT.names) | {"prompt_id": name, "question": "2 + 2?", "domain": "math",
            "verifier": "math", "reference_answer": "4"} for name in "ab"]  # fmt: skip
    assert [judge([row], said)[0].prompt_id for row in rows] == ["a", "b"]


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
