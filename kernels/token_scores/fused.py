"""Scores of a chunk's logits as one Triton kernel that reads them once, and an exact top-k of what it leaves behind.

The kernel also writes the maximum of every group of neighbouring columns. The k groups with the largest maxima hold
the k largest logits (an element outside them is at most as large as k others), so the top-k is sought among k · group
candidates: a few percent of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1distill.kernels.row import BLOCK, WARPS, exp


@triton.jit
def _row(
    LOGITS,  # (N, stride), columns from vocab on are room for alignment
    IDS,  # (N,)
    LOGPROBS,  # (N,) float32
    ENTROPY,  # (N,) float32
    LSE,  # (N,) float32, of logits · rate
    MAXIMA,  # (N, groups) of the logits
    stride,
    vocab,
    groups,
    rate,  # 1 / temperature
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    each = tl.arange(0, BLOCK // GROUP)
    inside = tl.arange(0, GROUP)
    top = float("-inf")
    total = 0.0  # Σ exp(z - top)
    moment = 0.0  # Σ exp(z - top) (z - top)
    for i in range(tl.cdiv(stride, BLOCK)):
        group = i * (BLOCK // GROUP) + each
        place = group[:, None] * GROUP + inside[None, :]
        z = tl.load(LOGITS + place, mask=place < stride, other=float("-inf")).to(tl.float32)
        z = tl.where(place < vocab, z, float("-inf"))
        maxima = tl.max(z, axis=1)
        tl.store(MAXIMA + row * groups + group, maxima.to(MAXIMA.dtype.element_ty), mask=group < groups)
        before = top
        top = tl.maximum(top, tl.max(maxima, axis=0))
        fall = tl.where(before == float("-inf"), 0.0, (before - top) * rate)
        kept = exp(before * rate, top * rate)
        shifted = z * rate - top * rate
        e = tl.exp(shifted)
        moment = kept * (moment + fall * total) + tl.sum(tl.where(e > 0, e * shifted, 0.0))
        total = kept * total + tl.sum(e)
    lse = top * rate + tl.log(total)
    tl.store(LSE + row, lse)
    tl.store(ENTROPY + row, tl.log(total) - moment / total)
    token = tl.load(IDS + row).to(tl.int64)
    asked = (token >= 0) & (token < vocab)
    z = tl.load(LOGITS + token, mask=asked, other=0.0).to(tl.float32)
    tl.store(LOGPROBS + row, tl.where(asked, z * rate - lse, 0.0))


def group_columns(vocab: int, k: int) -> int:
    """A power of two near sqrt(V / k), 16 to 64: about as many groups to sort as candidates in the chosen ones."""
    return min(64, max(16, 1 << (int((vocab / max(1, k)) ** 0.5).bit_length() - 1)))


def scores(
    logits: Tensor, ids: Tensor, k: int, temperature: float, *, block: int = BLOCK, warps: int = WARPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.scores``. Row i of logits has logits.stride(0) places, a multiple of 64."""
    rows, vocab = logits.shape
    group = group_columns(vocab, k)
    groups = triton.cdiv(vocab, group)
    block = max(group, min(block, triton.next_power_of_2(logits.stride(0))))
    logprobs, entropy, lse = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    maxima = logits.new_empty(rows, groups)
    _row[(rows,)](
        logits,
        ids,
        logprobs,
        entropy,
        lse,
        maxima,
        logits.stride(0),
        vocab,
        groups,
        1 / temperature,
        GROUP=group,
        BLOCK=block,
        num_warps=max(1, min(warps, block // 512)),
    )
    best = maxima.topk(min(k, groups), 1, sorted=False).indices
    columns = (best[:, :, None] * group + torch.arange(group, device=logits.device)).view(rows, -1)
    full = logits.as_strided((rows, logits.stride(0)), logits.stride())
    found = full.gather(1, columns).masked_fill_(columns >= vocab, float("-inf"))
    top, place = found.topk(k, 1)
    topk_ids = columns.gather(1, place).to(torch.int32)
    return logprobs, entropy, topk_ids, top.float() / temperature - lse[:, None]
