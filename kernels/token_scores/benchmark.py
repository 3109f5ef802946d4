"""What is measured for the scores: the function, and the bare product. The runner is ``r1distill.kernels.bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from r1distill.kernels import head
from r1distill.kernels.token_scores import reference, token_scores

Call = Callable[[], Any]


def scores(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    return lambda: token_scores(hidden, weight, ids, k=64)


def scores_without_topk(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    return lambda: token_scores(hidden, weight, ids, k=0)


def product(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    """The logits alone, in the same chunks, thrown away."""

    def run() -> None:
        for _ in head.chunks(hidden, weight, 2048):
            pass

    return run


def sort(hidden: Tensor, weight: Tensor, ids: Tensor) -> Call:
    """The logits and torch.topk of all of them: what the groups save."""

    def run() -> None:
        for _, _, logits in head.chunks(hidden, weight, 2048):
            logits.topk(64, 1)

    return run


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Call]] = {
    "token_scores": scores,
    "product": product,
    "token_scores, k = 0": scores_without_topk,
    "product and torch.topk": sort,
}


def check(device: str) -> list[str]:
    """The kernel against float64 on the same logits: what is wrong, in words."""
    step = reference.scores
    if device == "cuda":
        from r1distill.kernels.token_scores import fused

        step = fused.scores
    faults = []
    for dtype, tokens, vocab, k in (
        (torch.bfloat16, 200, 152_064, 64),
        (torch.bfloat16, 70, 151_665, 256),
        (torch.float32, 33, 507, 1),
    ):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, 64, device=device, dtype=dtype)
        weight = torch.randn(vocab if device == "cuda" else 1003, 64, device=device, dtype=dtype) * 0.5
        ids = torch.randint(len(weight), (tokens,), device=device)
        for rows, _, logits in head.chunks(hidden, weight, 64):
            log_q = (logits.double() / 0.8).log_softmax(1)
            logprobs, entropy, topk_ids, topk_logprobs = step(logits, ids[rows], k, 0.8)
            for name, mine, other in (
                ("log-probability", logprobs, log_q.gather(1, ids[rows, None]).squeeze(1)),
                ("entropy", entropy, -(log_q.exp() * log_q).sum(1)),
                ("top-k", topk_logprobs, log_q.topk(k, 1).values),
                ("top-k ids", log_q.gather(1, topk_ids.long()), log_q.topk(k, 1).values),
            ):
                error = (mine.double() - other).abs().max().item()
                if not error < 1e-4:
                    faults.append(f"token_scores, V = {vocab}, k = {k}, {dtype}: {name} is off by {error:.2g}")
    return faults
