"""``token_scores``: log-probability, entropy and top-k of every token from hidden states and head, forward only."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from r1distill.kernels import head
from r1distill.kernels.token_scores import reference


class TokenScores(NamedTuple):
    """Of softmax(logits / temperature), in nats; float32 (float64 for float64 inputs)."""

    logprobs: Tensor  # (T,) of the given ids; 0 where the id is negative
    entropy: Tensor  # (T,)
    topk_ids: Tensor  # (T, k) int32, the most probable first; the order of equals is not determined
    topk_logprobs: Tensor  # (T, k)


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    k: int = 64,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_tokens: int = 2048,
    implementation: Literal["auto", "reference", "fused"] = "auto",
) -> TokenScores:
    """Scores of ids (T,) and of the whole distribution, for hidden (T, H) through the head weight (V, H).

    ids are the tokens that follow, already shifted; negative ones ask for nothing. Rows of the head from ``vocab_size``
    on are padding and have no probability. k = 0 leaves the top-k away. Memory beyond inputs and results is about
    2 bytes · chunk_tokens · V in bfloat16; the reference takes fewer tokens at a time where a chunk would have over
    2**26 logits. "auto" is "fused" on CUDA. Logits are rounded to hidden's dtype, as a model's own head rounds them.

    Raises ValueError for shapes that don't fit, and for ids outside the vocabulary.
    """
    vocab = head.check(hidden, weight, vocab_size, temperature, chunk_tokens)
    if not 0 <= k <= vocab:
        raise ValueError(f"k must be in 0..{vocab} (the vocabulary), found {k}.")
    if ids.shape != hidden.shape[:1] or ids.is_floating_point():
        raise ValueError(f"ids must be {hidden.shape[0]} integers, found {list(ids.shape)} of {ids.dtype}.")
    step = reference.scores
    if head.is_fused(implementation, hidden):
        from r1distill.kernels.token_scores import fused

        step = fused.scores
    else:
        chunk_tokens = min(chunk_tokens, max(1, head.REFERENCE_LOGITS // vocab))
    tokens, ids = hidden.shape[0], ids.contiguous()
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = TokenScores(
        torch.empty(tokens, dtype=dtype, device=hidden.device),
        torch.empty(tokens, dtype=dtype, device=hidden.device),
        torch.empty(tokens, k, dtype=torch.int32, device=hidden.device),
        torch.empty(tokens, k, dtype=dtype, device=hidden.device),
    )
    for rows, _, logits in head.chunks(hidden, weight[:vocab].to(hidden.dtype), chunk_tokens):
        for whole, part in zip(out, step(logits, ids[rows], k, float(temperature)), strict=True):
            whole[rows] = part
    if bool((ids >= vocab).any()):  # read at the end, where a GPU is waited for anyway
        raise ValueError(f"ids must be under {vocab} (the vocabulary), found {int(ids.max())}.")
    return out
