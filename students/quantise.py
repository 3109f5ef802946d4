"""Variants: quantised forms of a checkpoint made with AutoRound, each in a worker of its own, checked without serving.

The checks: the checkpoint's tokenizer, chat template and generation settings, its end and padding tokens, every tensor
accounted for and finite. What a variant is worth is measured later, by serving it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.students import worker
from r1distill.students.catalogue import AwqVariant, Fp8Variant, GgufVariant, GptqVariant, Int8Variant, Student, Variant
from r1distill.students.template import TEMPLATES

# What a variant takes from the checkpoint as it is; AutoRound writes these files in its own way.
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def build(student: Student, checkpoint: Path, dataset: Path, out: Path) -> Result:
    """Write every variant of ``checkpoint`` to ``out/<name>``; what a cut-off run finished is kept."""
    metrics: dict[str, Any] = {}
    for name, variant in tqdm(student.variants.items(), desc="variants", unit="variant", disable=None, delay=2):
        done = out / ".work" / f"{name}.json"
        if not (done.is_file() and (out / name).is_dir()):
            began = time.monotonic()
            _make(student, name, variant, checkpoint, dataset, out)
            size = sum(file.stat().st_size for file in (out / name).iterdir())
            done.write_text(json.dumps({"bytes": size, "seconds": round(time.monotonic() - began, 1)}))
        metrics[name] = {"kind": variant.kind, **json.loads(done.read_text())}
    return Result(len(metrics), len(metrics), {}, metrics, unit="variants")


def _make(student: Student, name: str, variant: Variant, checkpoint: Path, dataset: Path, out: Path) -> None:
    scratch = out / ".work" / name
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(out / name, ignore_errors=True)
    job = {
        "student": student.model_dump(mode="json"),
        "variant": name,
        "checkpoint": str(checkpoint),
        "dataset": str(dataset),
        "out": str(scratch / "made"),
    }
    for _ in worker.run("r1distill.students.quantise", job, scratch):
        pass
    (scratch / "made").rename(out / name)


def main(job: dict[str, Any]) -> None:
    """In the worker: quantise, take over the checkpoint's files, check."""
    student = Student.model_validate(job["student"])
    variant, checkpoint, out = student.variants[job["variant"]], Path(job["checkpoint"]), Path(job["out"])
    texts = calibration(student, variant, checkpoint, Path(job["dataset"]))
    made = _quantise(variant, checkpoint, texts, out.with_name("raw"))
    if isinstance(variant, GgufVariant):
        out.mkdir()
        next(made.glob("*.gguf")).rename(out / f"{student.name}-{variant.scheme.upper()}.gguf")
        problems = list(check_gguf(next(out.glob("*.gguf")), checkpoint))
    else:
        made.rename(out)
        for name in KEPT_FILES:
            shutil.copyfile(checkpoint / name, out / name)
        _set_dtype(out / "config.json")
        problems = list(check_tensors(out, checkpoint))
    if problems:
        raise R1DistillError(f"the variant {job['variant']} is not sound:\n" + "\n".join(problems))


def recipe(variant: Variant) -> tuple[str, str, dict[str, Any]]:
    """AutoRound's scheme, export format and further settings for a variant."""
    match variant:
        case GgufVariant(scheme=scheme):
            return f"gguf:{scheme}", f"gguf:{scheme}", {}
        case GptqVariant(bits=bits, group_size=size):
            return f"W{bits}A16", "auto_gptq", {"group_size": size, "sym": True}
        case AwqVariant(group_size=size):
            return "W4A16", "auto_awq", {"group_size": size, "sym": False}
        case Int8Variant():
            return "INT8", "llm_compressor", {}
        case Fp8Variant(scheme=scheme):
            return f"FP8_{scheme.upper()}", "llm_compressor", {}
    raise AssertionError(variant)


def calibration(student: Student, variant: Variant, checkpoint: Path, dataset: Path) -> list[str]:
    """Training text in the student's own layout, joined to pieces of at least ``calibration_tokens`` tokens.

    AutoRound drops pieces that are shorter than what it was told.
    """
    from transformers import AutoTokenizer

    template, tokenizer = TEMPLATES[student.template], AutoTokenizer.from_pretrained(checkpoint)
    table = schema.read(dataset / "train", schema.TRAINING_ROW)
    pieces, piece, tokens = [], "", 0
    for row in schema.rows(table.slice(0, variant.calibration_traces), ["messages"]):
        text = template.prefix(row["messages"][:-1]) + template.target(row["messages"][-1])
        piece, tokens = piece + text, tokens + len(tokenizer.encode(text, add_special_tokens=False))
        if tokens >= variant.calibration_tokens:
            pieces.append(piece)
            piece, tokens = "", 0
    return pieces or [piece]


def _quantise(variant: Variant, checkpoint: Path, texts: list[str], out: Path) -> Path:
    """Run AutoRound and return the one folder that it made."""
    import gc

    import torch
    from auto_round import AutoRound

    scheme, form, settings = recipe(variant)
    if variant.tuning_steps == 0:
        settings["disable_opt_rtn"] = True  # plain rounding: its search for scales takes minutes on a CPU
    gc.freeze()  # AutoRound collects garbage after every layer; the libraries' own objects need not be walked each time
    rounding = AutoRound(
        str(checkpoint),
        scheme=scheme,
        iters=variant.tuning_steps,
        dataset=texts,
        nsamples=len(texts),
        seqlen=variant.calibration_tokens,
        batch_size=min(8, len(texts)),
        device_map=0 if torch.cuda.is_available() else "cpu",
        **settings,
    )
    gc.freeze()
    rounding.quantize_and_save(output_dir=str(out), format=form)
    return out if (out / "config.json").is_file() else next(path for path in out.iterdir() if path.is_dir())


def _set_dtype(file: Path) -> None:
    """Activations in bf16, which the student was trained in; GPTQ's export says float16."""
    config = json.loads(file.read_text())
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))


def check_tensors(variant: Path, checkpoint: Path) -> Iterator[str]:
    """What is wrong with a variant in safetensors, compared with its checkpoint; each problem in a sentence."""
    import torch

    theirs, ours = dict(_tensors(checkpoint)), dict(_tensors(variant))
    for name, tensor in ours.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            yield f"{name} holds values that are not finite"
    for name, tensor in theirs.items():
        stem = name.removesuffix(".weight")
        if name in ours:
            if ours[name].shape != tensor.shape:
                yield f"{name} has shape {tuple(ours[name].shape)}, expected {tuple(tensor.shape)}"
        elif f"{stem}.qweight" not in ours:
            yield f"{name} is missing"
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (variant, checkpoint))
    for key in ("eos_token_id", "pad_token_id", "vocab_size"):
        if config.get(key) != expected.get(key):
            yield f"config.json has {key} {config.get(key)}, expected {expected.get(key)}"
    if "quantization_config" not in config:
        yield "config.json says nothing of a quantisation"


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                yield name, handle.get_tensor(name)


def check_gguf(file: Path, checkpoint: Path) -> Iterator[str]:
    """What is wrong with a GGUF file, compared with its checkpoint; each problem in a sentence."""
    import numpy as np
    from gguf import GGUFReader

    reader = GGUFReader(file)
    config = json.loads((checkpoint / "config.json").read_text())
    tokens = json.loads((checkpoint / "tokenizer_config.json").read_text())

    def found(key: str) -> Any:
        field = reader.fields.get(key)
        return field.contents() if field else None

    expected = {
        "tokenizer.chat_template": (checkpoint / "chat_template.jinja").read_text(encoding="utf-8"),
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        f"{found('general.architecture')}.context_length": config["max_position_embeddings"],
    }
    for key, value in expected.items():
        if found(key) != value:
            yield f"{key} is {found(key)!r}, expected {value!r}"
    if found("tokenizer.ggml.add_bos_token") and tokens.get("bos_token"):
        yield "tokenizer.ggml.add_bos_token is on, and the chat template writes a BOS too"
    names = {tensor.name for tensor in reader.tensors} - {"rope_freqs.weight"}
    count = sum(1 for _ in _tensors(checkpoint))
    if len(names) != count:
        yield f"it holds {len(names)} tensors, the checkpoint {count}"
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "F32" and not np.isfinite(tensor.data).all():
            yield f"{tensor.name} holds values that are not finite"


if __name__ == "__main__":
    worker.perform(main)
