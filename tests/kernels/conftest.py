"""Random problems of odd shapes, and the loss written out token by token in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


def make_problem(tokens=7, vocab=123, width=33, k=8, *, padded=0, dtype=torch.float32, seed=0, spread=3.0, ragged=True):
    """Random inputs; about a fifth of the positions ignored, rows of 0 to k entries, weights; labels often in the top-k."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=rng)
    weight = torch.randn(vocab + padded, width, generator=rng) * spread / width**0.5
    labels = torch.randint(vocab, (tokens,), generator=rng)
    teacher = (torch.randn(tokens, vocab, generator=rng) * spread).log_softmax(1)
    logprobs, ids = teacher.topk(k, 1)
    if ragged and k:
        for row in range(tokens):
            left = int(torch.randint(k + 1, (), generator=rng))
            ids[row, left:], logprobs[row, left:] = -1, float("-inf")
            if row % 3 == 0 and left:
                labels[row] = ids[row, left // 2]
    labels[torch.rand(tokens, generator=rng) < 0.2] = -100
    return SimpleNamespace(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.to(dtype).requires_grad_(),
        labels=labels,
        ids=ids,
        logprobs=logprobs,
        token_weights=torch.rand(tokens, generator=rng) + 0.1,
        vocab=vocab,
    )


def true_losses(hidden, weight, problem, *, temperature=1.0, kl_weight=1.0, ce_weight=0.0, tail="bucket"):
    """A list of scalars, 0 for ignored positions; hidden and weight in float64."""
    losses = []
    for state, label, ids, logprobs in zip(hidden, problem.labels, problem.ids, problem.logprobs, strict=True):
        if label == -100:
            losses.append((state * 0).sum())
            continue
        z = weight[: problem.vocab] @ state
        q = (z / temperature).log_softmax(0)
        inside = ids[ids >= 0]
        p = logprobs[ids >= 0].double().exp()
        if tail == "renormalise" and len(p):
            p = p / p.sum()
        kl = (p * (p.log() - q[inside])).sum()
        if tail == "bucket":
            outside = torch.ones(problem.vocab, dtype=torch.bool)
            outside[inside] = False
            rest = 1 - p.sum()
            if outside.any() and rest > 1e-12:
                kl = kl + rest * (rest.log() - q[outside].logsumexp(0))
        losses.append(kl_weight * kl - ce_weight * z.log_softmax(0)[label])
    return losses


def true_result(problem, *, reduction="mean", weighted=False, **terms):
    """(loss, gradient of hidden, gradient of weight) in float64; "none" is summed with the weights 1, 2, 3, …"""
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    losses = torch.stack(true_losses(hidden, weight, problem, **terms))
    kept = (problem.labels != -100).double()
    weights = kept * problem.token_weights.double() if weighted else kept
    loss = losses * weights
    if reduction == "mean":
        loss = loss.sum() / weights.sum().clamp(min=1e-30)
    elif reduction == "sum":
        loss = loss.sum()
    outer = torch.ones(()) if loss.dim() == 0 else torch.arange(1, len(loss) + 1)
    (loss * outer).sum().backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.fixture
def problem():
    return make_problem


@pytest.fixture
def truth():
    return true_result


@pytest.fixture
def ours():
    """As ``truth``, by topk_kl_loss."""
    from r1distill.kernels.topk_kl import topk_kl_loss

    def run(problem, *, reduction="mean", weighted=False, **options):
        problem.hidden.grad = problem.weight.grad = None
        loss = topk_kl_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            problem.ids,
            problem.logprobs,
            reduction=reduction,
            token_weights=problem.token_weights if weighted else None,
            vocab_size=problem.vocab,
            **options,
        )
        outer = torch.ones(()) if loss.dim() == 0 else torch.arange(1, len(loss) + 1)
        (loss * outer).sum().backward()
        return loss.detach(), problem.hidden.grad, problem.weight.grad

    return run


@pytest.fixture
def error():
    """The largest relative error over (loss, gradients), each relative to the largest magnitude of its truth."""

    def measure(found, true):
        assert all(torch.isfinite(one).all() for one in found)
        return [
            float((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3))
            for one, other in zip(found, true, strict=True)
        ]

    return measure
