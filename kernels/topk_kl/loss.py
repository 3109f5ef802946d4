"""``topk_kl_loss``: forward KL to a teacher's top-k and cross-entropy of a linear head that never holds (T, V).

Logits exist for a chunk of tokens at a time: one product makes them, ``losses_`` turns them into their gradient in
place, two more products carry it to the hidden states and the head. For "sum" and "mean" all of that happens in the
forward pass (three products a token), and backward only scales; "none" does not know its gradient's weights before
backward, so it makes the logits twice (four products).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1distill.kernels import head
from r1distill.kernels.topk_kl import reference
from r1distill.kernels.topk_kl.reference import Terms


def topk_kl_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    tail: Literal["bucket", "renormalise"] = "bucket",
    token_weights: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk_tokens: int = 2048,
    implementation: Literal["auto", "reference", "fused"] = "auto",
) -> Tensor:
    """kl_weight · KL(teacher ‖ student) + ce_weight · cross-entropy, of hidden (T, H) through the head weight (V, H).

    labels (T,) are the tokens to predict, already shifted; ``ignore_index`` drops a position from both terms.
    topk_ids and topk_logprobs (T, K) are the teacher's, at this ``temperature``, each id once in its row; rows with
    fewer than K are padded with negative ids. K = 0 leaves cross-entropy alone. ``tail`` says what becomes of the
    teacher's remaining mass, see ``reference``, where the loss is defined.

    token_weights (T,), not negative, multiply each token's loss; "mean" divides by their sum over the positions that
    are not ignored (and is 0 where there is none). Rows of the head from ``vocab_size`` on are padding: their logits
    count as minus infinity and their gradient is 0.

    Gradients go to hidden and weight, summed over chunks in the dtype of weight's gradient: a bfloat16 weight gets a
    float32 sum after ``weight.grad_dtype = torch.float32``; a float32 weight with bfloat16 hidden states (or under
    autocast) is cast for the products and its gradient summed in float32. They are made in the forward pass and scaled
    in place in backward, so one backward a forward; "none" (T,) makes them in backward, for one more product.

    ``chunk_tokens`` bounds memory beyond inputs and gradients: 2 bytes · chunk_tokens · V in bfloat16. The reference
    takes fewer tokens at a time where a chunk would have over 2**26 logits. "auto" is "fused" on CUDA.

    Returns float32 (float64 for float64 inputs). Raises ValueError for shapes that don't fit, ids or labels outside
    the vocabulary, repeated ids, and log-probabilities that are none.
    """
    vocab = head.check(hidden, weight, vocab_size, temperature, chunk_tokens)
    _check_targets(hidden, labels, topk_ids, topk_logprobs, token_weights)
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"tail must be 'bucket' or 'renormalise', found {tail!r}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', found {reduction!r}.")

    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = (labels != ignore_index).to(dtype)
    if token_weights is not None:
        scale = torch.where(scale > 0, token_weights.detach().to(dtype), 0)
    faults = _Faults(labels, topk_ids, topk_logprobs, scale != 0, vocab)
    if reduction == "mean":
        total = scale.sum()
        scale = scale / torch.where(total > 0, total, 1)
    step = reference.losses_
    if head.is_fused(implementation, hidden):
        from r1distill.kernels.topk_kl import fused

        step = fused.losses_
    else:
        faults.settle()
        chunk_tokens = min(chunk_tokens, max(1, head.REFERENCE_LOGITS // vocab))
    call = Call(
        labels=labels.contiguous(),
        ids=topk_ids.contiguous(),
        logprobs=topk_logprobs.detach().contiguous(),
        terms=Terms(float(temperature), float(kl_weight), float(ce_weight), tail),
        vocab=vocab,
        chunk_tokens=chunk_tokens,
        step=step,
        product=_product_dtype(hidden),
        gradient=_gradient_dtype(weight),
        wanted=(torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad),
    )
    result: Tensor = (_EachToken if reduction == "none" else _AllTokens).apply(hidden, weight, scale, call)
    faults.settle()
    return result


@dataclass(frozen=True)
class Call:
    """Everything but the differentiable inputs and the scale of each token."""

    labels: Tensor
    ids: Tensor
    logprobs: Tensor
    terms: Terms
    vocab: int
    chunk_tokens: int
    step: Callable[..., Tensor]
    product: torch.dtype
    gradient: torch.dtype
    wanted: tuple[bool, bool]

    def run(self, hidden: Tensor, weight: Tensor, scale: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any, Any]:
        """(losses (T,), gradient of hidden (T, H), gradient of weight (V, H)) of Σ scale · loss; None if not wanted."""
        used = weight[: self.vocab].to(self.product)
        losses = torch.empty_like(scale)
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.empty_like(weight, dtype=self.gradient) if wanted[1] else None
        if to_weight is not None:
            to_weight[self.vocab if len(hidden) else 0 :] = 0
        for rows, states, logits in head.chunks(hidden, used, self.chunk_tokens):
            inputs = (self.labels[rows], self.ids[rows], self.logprobs[rows], scale[rows])
            losses[rows] = self.step(logits, *inputs, self.terms, gradient=any(wanted))
            if to_hidden is not None:
                if to_hidden.dtype == logits.dtype:
                    torch.mm(logits, used, out=to_hidden[rows])
                else:
                    to_hidden[rows] = logits @ used
            if to_weight is not None:
                _accumulate(to_weight[: self.vocab], logits.t(), states, first=rows.start == 0)
        return losses, to_hidden, to_weight


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """total (+)= left @ right, without a temporary of total's size where the device can."""
    beta = 0 if first else 1  # with 0 what stands in total is not read
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


class _AllTokens(torch.autograd.Function):
    """Σ scale · loss; the gradients are made in forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scale: Tensor, call: Call) -> Tensor:
        losses, *gradients = call.run(hidden, weight, scale, call.wanted)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        gradients = ctx.saved_tensors
        # On a GPU the comparison would wait for the device; multiplying by one costs less.
        if outer.is_cuda or outer != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(outer)
        return *gradients, None, None


class _EachToken(torch.autograd.Function):
    """scale · loss of each token; the gradients are made in backward, from logits that are made again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, scale: Tensor, call: Call) -> Tensor:
        ctx.save_for_backward(hidden, weight, scale)
        ctx.call = call
        return call.run(hidden, weight, scale, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Any:
        hidden, weight, scale = ctx.saved_tensors
        _, *gradients = ctx.call.run(hidden, weight, scale * outer, ctx.call.wanted)
        return *gradients, None, None


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer would compute in here."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if dtype == torch.float16:
        raise ValueError("float16 is too narrow for gradients of logits: use autocast with bfloat16.")
    return dtype


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    wanted = weight.grad_dtype if weight.is_leaf else None
    return wanted or weight.dtype


def _check_targets(hidden: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, token_weights: Tensor | None) -> None:
    """Shapes and dtypes, which cost nothing."""
    tokens = hidden.shape[0]
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("labels", labels, (tokens,))]
    if token_weights is not None:
        expected.append(("token_weights", token_weights, (tokens,)))
    if ids.dim() != 2 or ids.shape != logprobs.shape:
        raise ValueError(
            f"topk_ids and topk_logprobs must both be (T, K), found {list(ids.shape)}, {list(logprobs.shape)}."
        )
    expected += [("topk_ids", ids, (tokens, ids.shape[1])), ("topk_logprobs", logprobs, (tokens, ids.shape[1]))]
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} for {tokens} hidden states, found {list(tensor.shape)}.")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, found {tensor.device}.")
    if labels.is_floating_point() or ids.is_floating_point() or not logprobs.is_floating_point():
        raise ValueError(
            "labels and topk_ids must be integers and topk_logprobs floating point, "
            f"found {labels.dtype}, {ids.dtype}, {logprobs.dtype}."
        )


class _Faults:
    """Faults in the values, of the positions that count. On a GPU they are looked for first and read last, so that
    nothing waits: by then that part of the queue is long done. Kernels stay inside their memory whatever the values."""

    KINDS = (
        "labels must be in [0, {vocab}) or ignore_index",
        "topk_ids must be under {vocab} (the vocabulary; negative ids are padding)",
        "topk_ids must be another one each within a row (a repeated id would count the teacher's mass twice)",
        "topk_logprobs must be logarithms of probabilities, at most 0 and not NaN",
    )

    def __init__(self, labels: Tensor, ids: Tensor, logprobs: Tensor, counts: Tensor, vocab: int) -> None:
        self.vocab, self.tokens = vocab, len(labels)
        if not self.tokens:
            return
        ordered = ids.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        bad = (ids >= 0) & ~(logprobs <= 1e-3)  # low precision may round up
        faulty = ((labels < 0) | (labels >= vocab), (ids >= vocab).any(1), twice.any(1), bad.any(1))
        places = torch.arange(self.tokens, device=labels.device)
        first = torch.stack([torch.where(one & counts, places, self.tokens).min() for one in faulty])
        self.done: torch.cuda.Event | None = None
        if first.is_cuda:
            self.first = torch.empty(len(first), dtype=first.dtype, pin_memory=True)
            self.first.copy_(first, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            self.first = first

    def settle(self) -> None:
        """Raise ValueError for the first fault."""
        if not self.tokens:
            return
        if self.done:
            self.done.synchronize()
        for kind, row in zip(self.KINDS, self.first.tolist(), strict=True):
            if row < self.tokens:
                raise ValueError(f"{kind.format(vocab=self.vocab)}; row {row} breaks this (rows count from 0).")
