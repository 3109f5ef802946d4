"""Scores of a chunk's logits in plain PyTorch; it serves the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(logits: Tensor, ids: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``TokenScores`` of logits (N, V) and ids (N,); ids outside the vocabulary are taken for negative ones."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_q = (logits.to(dtype) / temperature).log_softmax(1)
    asked = (ids >= 0) & (ids < logits.shape[1])
    logprobs = log_q.gather(1, torch.where(asked, ids, 0).long()[:, None]).squeeze(1)
    entropy = -(log_q.exp() * log_q.clamp(min=torch.finfo(dtype).min)).sum(1)  # 0 · -inf is 0 here
    topk_logprobs, topk_ids = log_q.topk(k, 1)
    return torch.where(asked, logprobs, 0), entropy, topk_ids.to(torch.int32), topk_logprobs
