"""The Triton kernels on CPU tensors, in Triton's interpreter. ``test_fused`` runs this file in a process of its own, since
the interpreter must be chosen before Triton is imported."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from r1distill.kernels.token_scores import fused as scores_fused
from r1distill.kernels.token_scores import reference as scores_reference
from r1distill.kernels.token_scores import token_scores
from r1distill.kernels.topk_kl import fused, reference

TERMS = [
    {"tail": "bucket"},
    {"tail": "renormalise"},
    {"tail": "bucket", "temperature": 2.0, "kl_weight": 0.7, "ce_weight": 0.3},
    {"tail": "renormalise", "temperature": 0.5, "kl_weight": 0.7, "ce_weight": 0.3},
]
SHAPES = [(7, 123, 33, 8), (5, 507, 33, 1), (4, 507, 8, 256), (5, 252, 16, 0)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of several blocks, the last one not full."""
    monkeypatch.setattr(fused, "losses_", partial(fused.losses_, block=128))
    monkeypatch.setattr(scores_fused, "scores", partial(scores_fused.scores, block=128))


@pytest.fixture(autouse=True)
def rounding(monkeypatch):
    """The interpreter cuts float32 off where it makes bfloat16; a GPU rounds to the nearest."""
    cut = interpreter._convert_float

    def convert(values, source, target, mode):
        if source != tl.float32 or target != tl.bfloat16:
            return cut(values, source, target, mode)
        return torch.from_numpy(values.view(np.float32).copy()).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_beside_the_reference_and_the_truth(problem, truth, ours, error, shape, terms):
    """The kernel's error is at most about the reference's in the same precision, both measured from float64."""
    number = TERMS.index(terms) + SHAPES.index(shape)
    dtype = torch.bfloat16 if number % 2 else torch.float32
    case = problem(*shape, padded=number * 5, seed=number, dtype=dtype)
    options = {"reduction": ("mean", "sum", "none")[number % 3], "weighted": number % 4 < 2, **terms}
    true = truth(case, **options)
    plain = error(ours(case, chunk_tokens=3, **options), true)
    kernel = error(ours(case, chunk_tokens=3, implementation="fused", **options), true)
    slack = 1e-6 if dtype == torch.float32 else 1e-4
    assert all(mine <= 1.5 * other + slack for mine, other in zip(kernel, plain, strict=True)), (kernel, plain)


@pytest.mark.parametrize("gradient", [True, False])
def test_poison(problem, gradient):
    """What stands in rows that take no part and in columns of alignment is never used."""
    case = problem(6, 100, 8, 4)
    buffer = torch.full((6, 128), float("nan"))
    logits = buffer[:, :100]
    logits.copy_(case.hidden.detach() @ case.weight.detach().t())
    scale = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 1.0])
    labels = torch.arange(6)
    ids, logprobs = case.ids.clone(), case.logprobs.clone()
    plain = logits.clone()
    expected = reference.losses_(
        plain, labels, ids, logprobs, scale, reference.Terms(1.0, 1.0, 0.1, "bucket"), gradient=True
    )
    logits[scale == 0] = float("nan")
    ids[1], logprobs[1], labels[3] = 10**9, float("nan"), 10**9
    inputs = (labels, ids, logprobs, scale, reference.Terms(1.0, 1.0, 0.1, "bucket"))
    torch.testing.assert_close(fused.losses_(logits, *inputs, gradient=gradient), expected)
    if gradient:
        torch.testing.assert_close(logits, plain)


def test_values_outside_the_vocabulary_stay_inside_the_memory(problem):
    """On a GPU they are reported after the kernels ran."""
    case = problem(3, 100, 8, 4, ragged=False)
    logits = torch.full((3, 128), 7.0)
    case.ids[0, 0], case.ids[1, 0] = 10**12, -(10**12)
    labels = torch.tensor([10**12, -(10**12), 3])
    terms = reference.Terms(1.0, 1.0, 0.1, "bucket")
    fused.losses_(logits[:, :100], labels, case.ids, case.logprobs, torch.ones(3), terms, gradient=True)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_extreme_logits_stay_finite(problem, ours, size, tail):
    case = problem(4, 123, 4, 8, ragged=False)
    with torch.no_grad():
        case.hidden.zero_()[:, 0] = 1
        case.weight.zero_()[:, 0] = -size
        case.weight[case.ids[0], 0] = size
    for sign in (1, -1):
        with torch.no_grad():
            case.hidden.mul_(sign)
        found = ours(case, tail=tail, temperature=3.0, ce_weight=1.0, implementation="fused")
        assert all(one.isfinite().all() for one in found)


def test_all_ignored_and_all_of_the_vocabulary(problem, ours):
    case = problem(3, 123, 33, 1)
    case.labels[:] = -100
    assert all((one == 0).all() for one in ours(case, ce_weight=1.0, implementation="fused"))
    case = problem(3, 123, 33, 1)
    case.logprobs, case.ids = (case.hidden @ case.weight.t()).detach().log_softmax(1).topk(123, 1)
    loss, to_hidden, _ = ours(case, implementation="fused")
    assert abs(loss) < 1e-6 and to_hidden.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 123, 33, 1), (5, 507, 33, 30), (4, 507, 8, 507), (3, 1000, 8, 0)], ids=str)
def test_scores_beside_the_reference(problem, shape, dtype):
    case = problem(*shape[:3], 0, dtype=dtype, padded=6)
    for temperature in (0.7,) if dtype == torch.float32 else (1.0,):
        options = {"k": shape[3], "temperature": temperature, "vocab_size": case.vocab, "chunk_tokens": 3}
        plain = token_scores(case.hidden, case.weight, case.labels, implementation="reference", **options)
        found = token_scores(case.hidden, case.weight, case.labels, implementation="fused", **options)
        for name in ("logprobs", "entropy", "topk_logprobs"):
            torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-5, atol=2e-5)
        logits = (case.hidden @ case.weight[: case.vocab].t()).float() / temperature
        chosen = logits.log_softmax(1).gather(1, found.topk_ids.long())
        if dtype == torch.float32:
            torch.testing.assert_close(chosen, found.topk_logprobs, rtol=1e-4, atol=1e-4)
        assert all(len(set(row)) == shape[3] for row in found.topk_ids.tolist())


def test_scores_survive_extreme_logits():
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.linspace(-1e30, 1e30, 300)[:, None]
    ids = torch.tensor([0, 5])
    plain = token_scores(hidden, weight, ids, k=3, implementation="reference")
    found = token_scores(hidden, weight, ids, k=3, implementation="fused")
    for one, other in zip(found, plain, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)
    assert scores_reference.scores(hidden @ weight.t(), ids, 3, 1.0)[1].tolist() == [0.0, 0.0]
