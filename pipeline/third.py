"""SmolLM2 with a third of its layers, the student of a study on two CPU cores: its base and its configuration files."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import yaml

from r1distill.data import models
from r1distill.data.config import load
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import VllmTeacher, load_teacher

NAME, WHOLE, TEACHER = "smollm2-third", "smollm2-135m", "embedded"
# Of the 30 layers ten are kept, evenly spread, the first and the last among them: the first turns embeddings into what
# the others read, the last writes what the head reads, and a model suffers most where the last is gone (arXiv
# 2403.17887, section 4). What is left writes nothing sensible until it is trained.
KEPT = (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
SUMS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}  # short answers: a token is dear on a CPU
# What the arms that go on take: about as many answers a step as there were traces, a little longer than the teacher's,
# the longest of which has 35 tokens.
BEYOND: dict[str, dict[str, Any]] = {
    "on-policy": {"kind": "on_policy", "prompts_per_step": 4, "max_completion_tokens": 40, "learning_rate": 3.0e-4},
    "grpo": {
        "kind": "grpo",
        "prompts_per_step": 2,
        "group_size": 4,
        "max_completion_tokens": 40,
        "learning_rate": 5.0e-5,
    },
}
PROMPTS, QUESTIONS, SAMPLES, ANSWER_TOKENS = 640, 96, 1, 64
INSTRUCTION = "Think step by step and box the final answer."


def write(home: Path) -> tuple[str, str]:
    """Lay out ``home/third``: the base, and the files of student, prompts and benchmark. The student's and the prompts'
    files, as the command line takes them."""
    folder = home / "third"
    whole, teacher = load("students", WHOLE, Student), load_teacher(TEACHER)
    assert isinstance(teacher, VllmTeacher)
    parameters = write_base(models.materialise(whole.base, home), folder / "base")
    files = {name: folder / f"{name}.yaml" for name in (NAME, "sums", "held-out-sums")}
    student = {
        "extends": WHOLE,
        "base": {"kind": "folder", "path": str(folder / "base")},
        "architecture": {"layers": len(KEPT), "parameters": parameters},
        # A damaged model learns more than it keeps: a higher rate than the whole one's.
        "sft": {"learning_rate": 1.0e-3, "epochs": 1, "batch_traces": 6, "save_steps": 100},
        "distill": {"kind": "topk_kl", "teacher": teacher.model.model_dump(mode="json"), "k": 64, "ce_weight": 0.1},
        "benchmarks": [str(files["held-out-sums"])],
        "teacher": TEACHER,
    }
    prompts = {
        "sources": [_sums(seed=23, count=PROMPTS)],
        "instruction": INSTRUCTION,
        "decontaminate": {"against": [str(files["held-out-sums"])], "ngram": None},
        "dataset": {"validation_share": 0.1},
    }
    benchmark = {
        "title": "Sums of three digits (reasoning-gym)",
        "source": _sums(seed=20250121, count=QUESTIONS),
        "instruction": INSTRUCTION,
        "k": SAMPLES,
        "temperature": 0.6,
        "max_tokens": ANSWER_TOKENS,
    }
    for file, values in zip(files.values(), (student, prompts, benchmark), strict=True):
        file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(files[NAME]), str(files["sums"])


def _sums(seed: int, count: int) -> dict[str, Any]:
    return {"kind": "reasoning_gym", "seed": seed, "tasks": {"chain_sum": {"count": count, "config": SUMS}}}


def write_base(whole: Path, out: Path) -> int:
    """Write the layers KEPT of the model in ``whole``, with its tokenizer, unless they are there; the parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not out.is_dir():
        partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
        shutil.copytree(whole, partial, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
        model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
        model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in KEPT)
        model.config.num_hidden_layers = len(KEPT)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[number] for number in KEPT]
        model.save_pretrained(partial)
        partial.rename(out)
    with torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out)).num_parameters())
