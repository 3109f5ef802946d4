"""The weights of a checkpoint or of any variant of it, one tensor at a time, as plain numbers in PyTorch.

They are named and laid out as in transformers' Llama and Qwen2, whatever the format: safetensors in full precision,
GPTQ's and AWQ's packed integers, compressed-tensors' integers and FP8 (a scale a channel, or a block), and GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from r1distill.data.errors import R1DistillError
from r1distill.students.tensors import gguf

if TYPE_CHECKING:
    import torch

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ puts the eight 4-bit values of a 32-bit word
FP8_MAX = 448.0  # the largest number of float8_e4m3fn

# transformers' name of a tensor, without its layer: GGUF's.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

Rounding = Callable[["torch.Tensor"], "torch.Tensor"]


class Weights(Protocol):
    """Tensors by transformers' names; what a variant does to the input of a linear layer is ``inputs``."""

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None where the file has none of that name (a tied output embedding)."""

    def inputs(self, layer: str) -> Rounding | None:
        """How the inputs of a linear layer are rounded before it is applied; None where they are not."""


def weights(folder: Path) -> Weights:
    """The weights in a folder of safetensors, or in the GGUF file that it holds."""
    file = next(folder.glob("*.gguf"), None)
    return GgufWeights(file) if file else TorchWeights(folder)


class TorchWeights:
    """Weights in safetensors: plain, or as config.json's ``quantization_config`` says."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        handles = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self._files: dict[str, Any] = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._settings: dict[str, Any] = config.get("quantization_config") or {}
        groups = self._settings.get("config_groups") or {}
        self._groups = list(groups.values())

    def _raw(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def get(self, name: str) -> torch.Tensor | None:
        stem = name.removesuffix(".weight")
        if name in self._files:
            weight = self._raw(name)
            scale = f"{stem}.weight_scale"
            return _scaled(weight, self._raw(scale)) if scale in self._files else weight.float()
        if f"{stem}.qweight" not in self._files:
            return None
        words, zeros, scales = (self._raw(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales"))
        unpack = {"gptq": _gptq, "awq": _awq}[self._settings["quant_method"]]
        return unpack(words, zeros, scales, int(self._settings["bits"]))

    def inputs(self, layer: str) -> Rounding | None:
        if f"{layer}.weight_scale" not in self._files or not self._groups:
            return None
        settings = self._groups[0].get("input_activations")
        if not settings:
            return None
        fixed = f"{layer}.input_scale"
        return _rounding(settings, self._raw(fixed).float() if fixed in self._files else None)


def _scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(out, in) times a scale for each row (out, 1), or for each block of a grid of them; a block may be cut short."""
    for axis in (0, 1):
        size = weight.shape[axis]
        scale = scale.repeat_interleave(-(-size // scale.shape[axis]), axis).narrow(axis, 0, size)
    return weight.float() * scale.float()


def _rounding(settings: dict[str, Any], fixed: torch.Tensor | None) -> Rounding:
    """Rounding to 8 bits, integers or FP8, with a scale that is given, or one for each token (or group of inputs)."""
    import torch

    floating, group = settings["type"] == "float", settings.get("group_size") or 0
    largest = FP8_MAX if floating else 127.0

    def apply(x: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(-1, (-1, group)) if group > 0 and fixed is None else x
        scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / largest if fixed is None else fixed.to(x.device)
        level = (grouped / scale).clamp(-largest, largest)
        level = level.to(torch.float8_e4m3fn).to(x.dtype) if floating else level.round()
        return (level * scale).reshape(x.shape)

    return apply


def _unpacked(words: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """The values in 32-bit words, lowest bits first, laid out along ``axis``."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = words.unsqueeze(axis + 1) >> shifts.reshape([-1 if place == axis + 1 else 1 for place in range(3)])
    return (values & (2**bits - 1)).flatten(axis, axis + 1)


def _gptq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, in) from (in / 8, out) words at 4 bits; a group's zero point is stored less one."""
    levels = _unpacked(qweight, bits, 0)
    zeros = _unpacked(qzeros, bits, 1) + 1
    return _grouped(levels, zeros, scales)


def _awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, in) from (in, out / 8) words at 4 bits, whose values lie in AutoAWQ's order."""
    levels, zeros = (
        _unpacked(words, bits, 1).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1) for words in (qweight, qzeros)
    )
    return _grouped(levels, zeros, scales)


def _grouped(levels: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """(levels - zero) x scale with (in, out) levels and a row of zeros and scales for each group of inputs."""
    size = levels.shape[0] // scales.shape[0]
    levels = levels.unflatten(0, (-1, size)).float()
    return ((levels - zeros.unsqueeze(1)) * scales.float().unsqueeze(1)).flatten(0, 1).t().contiguous()


class GgufWeights:
    """Weights in a GGUF file. llama.cpp's Llama pairs the rows of queries and keys otherwise, which is taken back."""

    def __init__(self, file: Path):
        reader = gguf(file)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._fields = reader.fields
        self.kind = self.field("general.architecture")
        count = f"{self.kind}.attention.head_count"
        self._heads = {"q": self.field(count), "k": self.field(f"{count}_kv")} if self.kind == "llama" else {}

    def field(self, key: str) -> Any:
        """A value of the file's head, or None."""
        found = self._fields.get(key)
        return found.contents() if found else None

    def get(self, name: str) -> torch.Tensor | None:
        import torch
        from gguf.quants import dequantize

        stem, _, suffix = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blk.{number}."
        if stem not in GGUF_NAMES:
            raise R1DistillError(f"{name} has no name in GGUF that is known here.")
        tensor = self.tensors.get(f"{layer}{GGUF_NAMES[stem]}.{suffix}")
        if tensor is None:
            return None
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if heads := self._heads.get(stem.removeprefix("self_attn.").removesuffix("_proj")):
            value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return value

    def inputs(self, layer: str) -> Rounding | None:
        return None  # llama.cpp rounds them as it multiplies, in ways of its own for each processor
