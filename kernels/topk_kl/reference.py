"""The loss in plain PyTorch: its definition, and the closed form of its gradient that serves the CPU.

Shapes: N tokens of a chunk, V the vocabulary, K the teacher's entries for a token.

For a token with logits z, temperature τ, q = softmax(z/τ), label y, and the teacher's log-probabilities log p on ids S,

    loss = kl_weight · KL + ce_weight · (logsumexp(z) - z[y])

    tail="bucket":       KL = Σ_S p (log p - log q) + r (log r - log s),   r = 1 - Σ_S p,   s = 1 - Σ_S q
    tail="renormalise":  KL = Σ_S p̂ (log p̂ - log q),   p̂ = p / Σ_S p

So "bucket" compares everything outside S as one event, on both sides; "renormalise" takes the teacher to be certain
that the token is in S, and pulls all of the student's mass there. The cross-entropy is taken at temperature 1. There is
no factor τ²: put it into kl_weight. A negative id is padding, whatever stands beside it; a token without entries has
KL = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True)
class Terms:
    """What a token's loss is made of."""

    temperature: float
    kl_weight: float
    ce_weight: float
    tail: str  # bucket, renormalise


def teacher(ids: Tensor, logprobs: Tensor, tail: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(log p (N, K) with -inf at padding, r (N,)) of the teacher's distribution over S and the rest.

    Rounded log-probabilities may sum to a little over one; they are then scaled to one and nothing is left over.
    """
    known = logprobs.to(dtype).masked_fill(ids < 0, NEVER)
    mass = known.exp().sum(1)
    whole = mass.clamp(min=1) if tail == "bucket" else torch.where(mass > 0, mass, 1)
    rest = (1 - mass).clamp(min=0) if tail == "bucket" else torch.zeros_like(mass)
    return known - whole.log()[:, None], rest


def token_losses(logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, terms: Terms) -> Tensor:
    """The definition: (N,) losses of logits (N, V), for autograd. Labels must be in [0, V)."""
    scaled = logits / terms.temperature
    log_q = scaled.log_softmax(1)
    log_p, rest = teacher(ids, logprobs, terms.tail, logits.dtype)
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q.gather(1, ids.clamp(min=0))), 0).sum(1)
    if terms.tail == "bucket":
        vocab = logits.shape[1]  # padding marks a column past the last one
        inside = torch.zeros(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
        inside = inside.scatter(1, torch.where(ids < 0, vocab, ids), True)[:, :vocab]
        log_s = scaled.masked_fill(inside, NEVER).logsumexp(1) - scaled.logsumexp(1)
        kl = kl + torch.where(rest > 0, rest * (rest.log() - log_s), 0)
    ce = -logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    return terms.kl_weight * kl + terms.ce_weight * ce


def losses_(
    logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, scale: Tensor, terms: Terms, *, gradient: bool
) -> Tensor:
    """(N,) losses times ``scale`` (N,); with ``gradient``, logits (N, V) become the gradient of their sum, in place.

    Rows whose scale is 0 take no part, whatever stands in them. Without ``gradient`` the logits are spoilt too. The
    special columns (S and the label) are taken out first, so that the mass of the rest is a sum and not a difference.
    """
    z = logits if logits.dtype == scale.dtype else logits.to(scale.dtype)
    taken, tau = scale != 0, terms.temperature
    ids, label = torch.where(taken[:, None], ids.long(), -1), labels.clamp(0, logits.shape[1] - 1)[:, None]
    log_p, rest = teacher(ids, logprobs, terms.tail, z.dtype)
    p, hit = log_p.exp(), ids == label
    special = torch.cat([torch.where(ids < 0, label, ids), label], 1)
    counts = torch.cat([ids >= 0, ~hit.any(1, keepdim=True)], 1)  # the label by itself, unless it is in S
    z_label = z.gather(1, label).squeeze(1)
    z_special = z.gather(1, special).masked_fill_(~counts, NEVER)
    z.scatter_(1, special, NEVER)
    z_top, z_alone = z_special[:, :-1], z_special[:, -1]

    lse_tail = torch.logaddexp((z / tau if tau != 1 else z).logsumexp(1), z_alone / tau)
    lse = torch.logaddexp(lse_tail, (z_top / tau).logsumexp(1))
    lse_1 = lse if tau == 1 else torch.logaddexp(z.logsumexp(1), z_special.logsumexp(1))
    log_s = lse_tail - lse
    rest = torch.where(lse_tail == NEVER, 0, rest)  # S is all there is
    log_q = z_top / tau - lse[:, None]
    kl = torch.where(p > 0, p * (log_p - log_q), 0).sum(1) + torch.where(rest > 0, rest * (rest.log() - log_s), 0)
    losses = torch.where(taken, scale * (terms.kl_weight * kl + terms.ce_weight * (lse_1 - z_label)), 0)
    if not gradient:
        return losses

    kl_scale, ce_scale = scale * terms.kl_weight / tau, scale * terms.ce_weight
    mass = torch.ones_like(rest) if terms.tail == "bucket" else (p > 0).any(1).to(z.dtype)
    pull = kl_scale * (mass * log_s.exp() - rest)  # what the tail's entries share, by their share of the tail
    lse_tail = torch.where(lse_tail == NEVER, 0, lse_tail)
    g_top = kl_scale[:, None] * (mass[:, None] * log_q.exp() - p)
    g_top = g_top + ce_scale[:, None] * ((z_top - lse_1[:, None]).exp() - hit.to(z.dtype))
    g_alone = pull * (z_alone / tau - lse_tail).exp() + ce_scale * ((z_alone - lse_1).exp() - 1)
    if tau == 1:
        z.sub_(lse_tail[:, None]).exp_().mul_((pull + ce_scale * log_s.exp())[:, None])
    else:
        shares = (z / tau).sub_(lse_tail[:, None]).exp_().mul_(pull[:, None])
        z.sub_(lse_1[:, None]).exp_().mul_(ce_scale[:, None]).add_(shares)
    z.scatter_add_(1, special, torch.cat([g_top, g_alone[:, None]], 1).masked_fill_(~counts, 0))
    z.masked_fill_(~taken[:, None], 0)
    if z is not logits:
        logits.copy_(z)
    return losses
