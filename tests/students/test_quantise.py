"""Variants of a tiny checkpoint, made for real; what the static checks find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from r1distill.students import quantise, soundness
from r1distill.students.catalogue import Student
from r1distill.students.template import TEMPLATES, write_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = tmp_path_factory.mktemp("checkpoint")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = write_tokenizer(TEMPLATES["chatml"], tiny_base, folder, max_tokens=512)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(ends)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, **ends)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def student(tiny_student: Student) -> Student:
    few = {"tuning_steps": 0, "calibration_traces": 8, "calibration_tokens": 64}
    variants = {"int8": {"kind": "int8", **few}, "gptq-4bit": {"kind": "gptq", "group_size": 32, **few}}
    return Student.model_validate({**tiny_student.model_dump(), "variants": variants})


def test_variants_are_sound_and_kept_by_a_second_run(student, checkpoint, sums_dataset, tmp_path) -> None:
    (tmp_path / ".work").mkdir()
    result = quantise.build(student, checkpoint, sums_dataset, tmp_path)
    result.check("variants")
    for name in student.variants:
        for file in soundness.KEPT_FILES:
            assert (tmp_path / name / file).read_bytes() == (checkpoint / file).read_bytes()
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"
        assert soundness.problems(tmp_path / name, checkpoint) == []
    made = (tmp_path / "int8" / "model.safetensors").stat().st_mtime_ns
    assert quantise.build(student, checkpoint, sums_dataset, tmp_path).metrics == result.metrics
    assert (tmp_path / "int8" / "model.safetensors").stat().st_mtime_ns == made


def test_checks_find_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].clone()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, bad / "model.safetensors")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    found = "\n".join(soundness.check_tensors(bad, checkpoint))
    for problem in (
        "not finite",
        "has shape",
        "up_proj.weight is missing",
        "eos_token_id 0",
        "nothing of a quantisation",
    ):
        assert problem in found


def test_calibration_reads_the_middle_and_the_end_of_long_traces(student, checkpoint, sums_dataset) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = student.variants["int8"].model_copy(update={"calibration_traces": 24})
    pieces = quantise.calibration(student, settings, tokenizer, sums_dataset)
    assert pieces.shape[1] == 64 and len(pieces) > 10
    text = "".join(tokenizer.decode(piece) for piece in pieces)
    for number in (4, 9, 14):  # the longest traces: thinking of four lines
        assert f"{number}+{number * 7}=?" in text and f"{number}+3={number + 3}" in text
        assert f"\\boxed{{{number * 8}}}<|im_end|>" in text
