"""A linear head whose logits exist for a chunk of tokens at a time: what the operations on it share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

REFERENCE_LOGITS = 2**26  # of a chunk in plain PyTorch: 256 MiB in float32
ALIGNED = 64  # columns; the row length of a chunk's logits is a multiple of it, as matrix units and vector loads want


def check(hidden: Tensor, weight: Tensor, vocab_size: int | None, temperature: float, chunk_tokens: int) -> int:
    """The number of rows of weight (V, H) that are tokens; ValueError where it does not go with hidden (T, H)."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (T, H) and weight (V, H) expected, found {list(hidden.shape)}, {list(weight.shape)}.")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} must be bfloat16, float32 or float64, found {tensor.dtype}.")
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    if not 0 < vocab <= weight.shape[0]:
        raise ValueError(f"vocab_size must be in 1..{weight.shape[0]} (the head's rows), found {vocab}.")
    if not temperature > 0 or chunk_tokens < 1:
        raise ValueError(f"temperature and chunk_tokens must be positive, found {temperature} and {chunk_tokens}.")
    return vocab


def is_fused(implementation: str, hidden: Tensor) -> bool:
    """Whether Triton's kernels are to be used; "auto" takes them on CUDA."""
    if implementation not in ("auto", "reference", "fused"):
        raise ValueError(f"implementation must be 'auto', 'reference' or 'fused', found {implementation!r}.")
    if implementation == "reference" or (implementation == "auto" and not hidden.is_cuda):
        return False
    from r1distill.kernels import row

    row.check(hidden)
    return True


def chunks(hidden: Tensor, used: Tensor, chunk_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, hidden states of them (N, H) in the dtype of ``used``, their logits (N, V)) for all of hidden, in order.

    Every chunk's logits lie in the same memory, V columns of rows that are a multiple of 64 long.
    """
    tokens, vocab = hidden.shape[0], used.shape[0]
    width = -(-vocab // ALIGNED) * ALIGNED
    buffer = used.new_empty(min(chunk_tokens, tokens), width)
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        states = hidden[rows].to(used.dtype)
        logits = buffer[: len(states), :vocab]
        torch.mm(states, used.t(), out=logits)
        yield rows, states, logits
