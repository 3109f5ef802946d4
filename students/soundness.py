"""What is wrong with a variant's files, compared with its checkpoint's, before anything is served; a sentence each.

The checkpoint's tokenizer, chat template and generation settings, its end and padding tokens, the rotary frequencies,
every tensor accounted for, finite, and with scales that are not all zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1distill.students.dequantise import GgufWeights, Weights
from r1distill.students.tensors import shapes

# What a variant takes from the checkpoint as it is; AutoRound writes these files in its own way.
KEPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SAME = ("eos_token_id", "bos_token_id", "pad_token_id", "vocab_size", "max_position_embeddings", "rope_parameters")


def problems(variant: Path, checkpoint: Path, values: Weights) -> list[str]:
    """Everything that is found wrong with the variant in a folder, whose weights are ``values``."""
    if isinstance(values, GgufWeights):
        return list(check_gguf(values, checkpoint))
    return list(check_tensors(variant, checkpoint))


def check_tensors(variant: Path, checkpoint: Path) -> Iterator[str]:
    """What is wrong with a variant in safetensors."""
    import torch

    theirs, ours = shapes(checkpoint), shapes(variant)
    for name, shape, tensor in _tensors(variant):
        numbers = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not torch.isfinite(numbers).all():
            yield f"{name} holds values that are not finite"
        if name.endswith(("scale", "scales")) and not numbers.any():
            yield f"{name} holds zeros alone"
        if name in theirs and theirs[name] != shape:
            yield f"{name} has shape {shape}, expected {theirs[name]}"
    for name in theirs:
        if name not in ours and f"{name.removesuffix('.weight')}.qweight" not in ours:
            yield f"{name} is missing"
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (variant, checkpoint))
    for key in SAME:
        if config.get(key) != expected.get(key):
            yield f"config.json has {key} {config.get(key)}, expected {expected.get(key)}"
    if "quantization_config" not in config:
        yield "config.json says nothing of a quantisation"
    for name in KEPT_FILES:
        if not (variant / name).is_file():
            yield f"{name} is missing"
        elif (variant / name).read_bytes() != (checkpoint / name).read_bytes():
            yield f"{name} is not the checkpoint's"


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                tensor = handle.get_tensor(name)
                yield name, tuple(tensor.shape), tensor


def check_gguf(values: GgufWeights, checkpoint: Path) -> Iterator[str]:
    """What is wrong with a GGUF file."""
    import numpy as np
    from gguf import TokenType

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    spec = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    found = values.field
    kind, rope = values.kind, config.get("rope_parameters") or {}
    expected = {
        "tokenizer.chat_template": (checkpoint / "chat_template.jinja").read_text(encoding="utf-8"),
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10_000))),
    }
    for key, value in expected.items():
        if found(key) != value:
            yield f"{key} is {found(key)!r}, expected {value!r}"
    if found("tokenizer.ggml.add_bos_token") is not False and settings.get("bos_token"):
        yield "tokenizer.ggml.add_bos_token is not off, and the chat template writes a BOS too"
    tokens, types = found("tokenizer.ggml.tokens") or [], found("tokenizer.ggml.token_type") or []
    for added in spec["added_tokens"]:
        here, name = added["id"], added["content"]
        whole = types[here] in (TokenType.CONTROL, TokenType.USER_DEFINED) if here < len(types) else False
        if here >= len(tokens) or tokens[here] != name:
            yield f"token {here} is {tokens[here] if here < len(tokens) else None!r}, expected {name!r}"
        elif not whole:
            yield f"token {here}, {name}, is not read as one token"
    names = set(values.tensors)
    count = len(shapes(checkpoint))
    if len(names - {"rope_freqs.weight"}) != count:
        yield f"it holds {len(names)} tensors, the checkpoint {count}"
    if (rope.get("rope_type") == "llama3") != ("rope_freqs.weight" in names):
        yield "the rotary frequencies are stretched in one of the file and its checkpoint, and not in the other"
    for tensor in values.tensors.values():
        if tensor.tensor_type.name == "F32" and not np.isfinite(tensor.data).all():
            yield f"{tensor.name} holds values that are not finite"
        elif tensor.tensor_type.name != "F32" and not tensor.data.any():
            yield f"{tensor.name} holds zeros alone"
