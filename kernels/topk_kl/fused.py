"""The step of a chunk as one Triton kernel: logits in, losses out, the gradient left in their place.

One program takes one row. It gathers the few special columns (the teacher's ids and the label), puts minus infinity
there, reads the row once for the running maximum and sum, and once more, from its end to its start, to write the
gradient: what was read last is read first, so part of it still lies in the L2 cache. The special columns' gradients are
written last. Same sums as ``reference.losses_``, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from r1distill.kernels.row import BLOCK, WARPS, exp, log, logaddexp
from r1distill.kernels.topk_kl.reference import Terms


@triton.jit
def _row(
    LOGITS,  # (N, stride), columns from vocab on are room for alignment
    LABELS,  # (N,)
    IDS,  # (N, k)
    LOGPROBS,  # (N, k)
    SCALE,  # (N,) float32
    LOSSES,  # (N,) float32
    stride,
    vocab,
    k,
    rate,  # 1 / temperature
    kl_weight,
    ce_weight,
    BUCKET: tl.constexpr,
    TEMPERED: tl.constexpr,  # temperature is not 1
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    columns = tl.arange(0, BLOCK)
    blocks = tl.cdiv(stride, BLOCK)
    scale = tl.load(SCALE + row)
    if scale == 0:
        tl.store(LOSSES + row, 0.0)
        if GRADIENT:
            for i in range(blocks):
                place = i * BLOCK + columns
                tl.store(LOGITS + place, tl.zeros([BLOCK], LOGITS.dtype.element_ty), mask=place < stride)
        return

    # The teacher; ids outside the vocabulary are padding.
    slots = tl.arange(0, BLOCK_K)
    ids = tl.load(IDS + row * k + slots, mask=slots < k, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < vocab)
    log_p = tl.load(LOGPROBS + row * k + slots, mask=known, other=float("-inf")).to(tl.float32)
    mass = tl.sum(tl.exp(log_p))
    if BUCKET:
        whole = tl.maximum(mass, 1.0)
        rest = tl.maximum(1.0 - mass, 0.0)
        wanted = 1.0
    else:
        whole = tl.where(mass > 0, mass, 1.0)
        rest = 0.0
        wanted = tl.where(mass > 0, 1.0, 0.0)
    log_p -= tl.log(whole)
    p = tl.exp(log_p)

    # The special columns, out of the row.
    label = tl.load(LABELS + row).to(tl.int64)
    labelled = (label >= 0) & (label < vocab)
    hit = ids == label
    alone = labelled & (tl.sum(hit.to(tl.int32)) == 0)
    z_top = tl.load(LOGITS + ids, mask=known, other=float("-inf")).to(tl.float32)
    z_label = tl.load(LOGITS + label, mask=labelled, other=float("-inf")).to(tl.float32)
    z_alone = tl.where(alone, z_label, float("-inf"))
    tl.debug_barrier()
    never = tl.full([BLOCK_K], float("-inf"), tl.float32).to(LOGITS.dtype.element_ty)
    tl.store(LOGITS + ids, never, mask=known)
    tl.store(LOGITS + label, tl.full([], float("-inf"), tl.float32).to(LOGITS.dtype.element_ty), mask=labelled)
    tl.debug_barrier()

    # The rest of the row: its maximum, and Σ exp relative to it, at the temperature and at 1.
    top = float("-inf")
    total = 0.0
    total_1 = 0.0
    for i in range(blocks):
        place = i * BLOCK + columns
        z = tl.load(LOGITS + place, mask=place < stride, other=float("-inf")).to(tl.float32)
        z = tl.where(place < vocab, z, float("-inf"))
        before = top
        top = tl.maximum(top, tl.max(z))
        total = total * exp(before * rate, top * rate) + tl.sum(exp(z * rate, top * rate))
        if TEMPERED:
            total_1 = total_1 * exp(before, top) + tl.sum(exp(z, top))

    # Everything that is one number a row.
    s_top = z_top * rate
    s_alone = z_alone * rate
    lse_tail = logaddexp(top * rate + log(total), s_alone)
    most = tl.max(s_top)
    lse = logaddexp(lse_tail, most + log(tl.sum(exp(s_top, most))))
    lse_1 = lse
    if TEMPERED:
        most = tl.max(z_top)
        lse_1 = logaddexp(top + log(total_1), logaddexp(z_alone, most + log(tl.sum(exp(z_top, most)))))
    log_s = lse_tail - lse
    rest = tl.where(lse_tail == float("-inf"), 0.0, rest)
    kl = tl.sum(tl.where(p > 0, p * (log_p - (s_top - lse)), 0.0))
    kl += tl.where(rest > 0, rest * (log(rest) - log_s), 0.0)
    tl.store(LOSSES + row, scale * (kl_weight * kl + ce_weight * (lse_1 - z_label)))

    if GRADIENT:
        kl_scale = scale * kl_weight * rate
        ce_scale = scale * ce_weight
        share = exp(log_s, 0.0)
        pull = kl_scale * (wanted * share - rest)
        for i in range(blocks):
            place = (blocks - 1 - i) * BLOCK + columns
            z = tl.load(LOGITS + place, mask=place < stride, other=float("-inf")).to(tl.float32)
            z = tl.where(place < vocab, z, float("-inf"))
            if TEMPERED:
                g = pull * exp(z * rate, lse_tail) + ce_scale * exp(z, lse_1)
            else:
                g = (pull + ce_scale * share) * exp(z, lse_tail)
            tl.store(LOGITS + place, g.to(LOGITS.dtype.element_ty), mask=place < stride)
        tl.debug_barrier()
        g_top = kl_scale * (wanted * exp(s_top, lse) - p) + ce_scale * (exp(z_top, lse_1) - hit.to(tl.float32))
        g_alone = pull * exp(s_alone, lse_tail) + ce_scale * (exp(z_alone, lse_1) - 1.0)
        tl.store(LOGITS + ids, g_top.to(LOGITS.dtype.element_ty), mask=known)
        tl.store(LOGITS + label, g_alone.to(LOGITS.dtype.element_ty), mask=alone)


def losses_(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    scale: Tensor,
    terms: Terms,
    *,
    gradient: bool,
    block: int = BLOCK,
    warps: int = WARPS,
) -> Tensor:
    """As ``reference.losses_``. Row i of logits has logits.stride(0) places, all of them ours to write to."""
    rows, vocab = logits.shape
    losses = scale.new_empty(rows)
    block = min(block, triton.next_power_of_2(logits.stride(0)))
    _row[(rows,)](
        logits,
        labels,
        ids,
        logprobs,
        scale,
        losses,
        logits.stride(0),
        vocab,
        ids.shape[1],
        1 / terms.temperature,
        terms.kl_weight,
        terms.ce_weight,
        BUCKET=terms.tail == "bucket",
        TEMPERED=terms.temperature != 1,
        GRADIENT=gradient,
        BLOCK=block,
        BLOCK_K=triton.next_power_of_2(max(1, ids.shape[1])),
        num_warps=max(1, min(warps, block // 512)),
    )
    return losses
