"""The loss on the CPU against the same written out in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch

from r1distill.kernels import head
from r1distill.kernels.topk_kl import reference, topk_kl_loss

TERMS = [
    {"tail": "bucket"},
    {"tail": "renormalise"},
    {"tail": "bucket", "temperature": 2.0, "kl_weight": 0.7, "ce_weight": 0.3},
    {"tail": "renormalise", "temperature": 0.5, "kl_weight": 0.7, "ce_weight": 0.3},
    {"tail": "bucket", "ce_weight": 0.1},
]
SHAPES = [(7, 123, 33, 8), (20, 507, 33, 1), (5, 507, 8, 256), (1, 123, 1, 3), (7, 252, 16, 0)]


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(problem, truth, ours, error, shape, terms):
    for number, reduction in enumerate(("mean", "sum", "none")):
        case = problem(*shape, padded=number * 5, seed=number)
        options = {"reduction": reduction, "weighted": number != 1, **terms}
        assert max(error(ours(case, chunk_tokens=3, **options), truth(case, **options))) < 1e-5


def test_the_definition_is_the_same_loss(problem, truth):
    """``token_losses``, which the benchmarks take for the dense path, through autograd."""
    for terms in TERMS:
        case = problem(9, 123, 33, 8)
        case.labels.clamp_(min=0)
        logits = case.hidden.double() @ case.weight.double().t()
        parts = reference.Terms(
            terms.get("temperature", 1.0), terms.get("kl_weight", 1.0), terms.get("ce_weight", 0.0), terms["tail"]
        )
        losses = reference.token_losses(logits, case.labels, case.ids, case.logprobs.double(), parts)
        losses.mean().backward()
        loss, to_hidden, to_weight = truth(case, **terms)
        torch.testing.assert_close(losses.mean(), loss)
        torch.testing.assert_close(case.hidden.grad, to_hidden.float())
        torch.testing.assert_close(case.weight.grad, to_weight.float())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("terms", TERMS[2:4], ids=str)
def test_gradcheck(problem, reduction, terms):
    case = problem(4, 17, 3, 5, padded=2, dtype=torch.float64)

    def loss(hidden, weight):
        inputs = (hidden, weight, case.labels, case.ids, case.logprobs)
        return topk_kl_loss(*inputs, vocab_size=case.vocab, reduction=reduction, chunk_tokens=3, **terms)

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight), fast_mode=True)


def test_without_entries_it_is_cross_entropy(problem, ours):
    case = problem(20, 507, 33, 0)
    loss, to_hidden, to_weight = ours(case, kl_weight=0.5, ce_weight=1.0)
    case.hidden.grad = case.weight.grad = None
    expected = torch.nn.functional.cross_entropy(case.hidden @ case.weight.t(), case.labels)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(to_hidden, case.hidden.grad)
    torch.testing.assert_close(to_weight, case.weight.grad)


def test_a_teacher_that_is_the_student_costs_nothing(problem, ours):
    for k in (1, 8, 123):  # 123: all of the vocabulary, no tail is left
        case = problem(7, 123, 33, 1)
        case.logprobs, case.ids = (case.hidden @ case.weight.t()).detach().log_softmax(1).topk(k, 1)
        loss, to_hidden, _ = ours(case)
        assert abs(loss) < 1e-6 and to_hidden.abs().max() < 1e-6


def test_all_ignored(problem, ours):
    for reduction in ("mean", "sum", "none"):
        case = problem()
        case.labels[:] = -100
        case.ids[:] = 10**6  # whatever stands at an ignored position
        case.logprobs[:] = float("nan")
        assert all((one == 0).all() for one in ours(case, reduction=reduction, ce_weight=1.0))


def test_no_tokens(problem, ours):
    loss, to_hidden, to_weight = ours(problem(0, 123, 33, 4, ragged=False), ce_weight=1.0)
    assert loss == 0 and to_hidden.shape == (0, 33) and (to_weight == 0).all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_extreme_logits_stay_finite(problem, ours, size, tail, temperature):
    """Also where the student has practically no mass outside the top-k, or practically none in it."""
    case = problem(6, 123, 4, 8, ragged=False)
    with torch.no_grad():
        case.hidden.zero_()[:, 0] = 1
        case.weight.zero_()[:, 0] = -size
        case.weight[case.ids[0], 0] = size
    for sign in (1, -1):
        with torch.no_grad():
            case.hidden.mul_(sign)
        assert all(one.isfinite().all() for one in ours(case, tail=tail, temperature=temperature, ce_weight=1.0))


def test_mass_over_one_counts_as_one(problem, ours):
    """Log-probabilities that were rounded up."""
    case = problem(7, 123, 33, 8, ragged=False)
    case.logprobs = case.logprobs.log_softmax(1) + 5e-4
    loss, *_ = ours(case)
    case.logprobs -= 5e-4
    torch.testing.assert_close(loss, ours(case)[0])


def test_padding_columns_never_count(problem, ours):
    plain, padded = problem(7, 123, 33, 8), problem(7, 123, 33, 8)
    padded.weight = torch.cat([plain.weight.detach(), torch.full((5, 33), 100.0)]).requires_grad_()
    one, other = ours(plain, ce_weight=0.5), ours(padded, ce_weight=0.5)
    for a, b in zip(one[:2], other[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert (other[2][123:] == 0).all()


def test_bfloat16_is_as_exact_as_its_logits(problem, truth, ours, error):
    """Ours beside bfloat16 logits through autograd, both against float64."""
    case = problem(64, 507, 33, 16, dtype=torch.bfloat16, padded=5)
    terms = {"ce_weight": 0.3, "temperature": 2.0, "kl_weight": 1.0}
    kept = case.labels != -100
    true = truth(case, **terms)
    case.hidden.grad = case.weight.grad = None
    logits = (case.hidden @ case.weight[:507].t())[kept].float()
    parts = reference.Terms(2.0, 1.0, 0.3, "bucket")
    plain = reference.token_losses(logits, case.labels[kept], case.ids[kept], case.logprobs[kept], parts).mean()
    plain.backward()
    low = error((plain.detach(), case.hidden.grad, case.weight.grad), true)
    mine = error(ours(case, chunk_tokens=16, **terms), true)
    assert all(a < 2 * b + 2e-3 for a, b in zip(mine, low, strict=True)), (mine, low)


def test_the_heads_gradient_is_summed_in_float32_where_asked(problem, truth, ours):
    """Many chunks: rounding the sum to bfloat16 at each costs accuracy that ``grad_dtype`` buys back."""
    case = problem(256, 123, 16, 8, dtype=torch.bfloat16)
    true = truth(case)
    low = ours(case, chunk_tokens=4)[2]
    case.weight.grad = None
    case.weight.grad_dtype = torch.float32
    high = ours(case, chunk_tokens=4)[2]
    assert low.dtype == torch.bfloat16 and high.dtype == torch.float32
    mean = [float((one.double() - true[2]).abs().mean()) for one in (low, high)]
    assert mean[1] < 0.7 * mean[0], mean


def test_float32_weights_under_autocast(problem, truth, ours, error):
    case = problem(64, 123, 33, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(case, chunk_tokens=16)
    assert found[1].dtype == found[2].dtype == torch.float32
    assert max(error(found, truth(case))) < 0.03
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    again = ours(case, chunk_tokens=16)
    assert again[1].dtype == torch.bfloat16 and again[2].dtype == torch.float32
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="too narrow"):
        ours(case)


def test_only_what_needs_a_gradient_gets_one(problem, ours):
    case = problem()
    whole = ours(case)
    frozen = problem()
    frozen.weight.requires_grad_(False)
    loss, to_hidden, to_weight = ours(frozen)
    assert to_weight is None and loss == whole[0] and torch.equal(to_hidden, whole[1])
    with torch.no_grad():
        arguments = (case.hidden, case.weight, case.labels, case.ids, case.logprobs)
        assert not topk_kl_loss(*arguments).requires_grad


def test_scaled_backward(problem, ours):
    case = problem()
    _, to_hidden, to_weight = ours(case)
    case.hidden.grad = case.weight.grad = None
    (3 * topk_kl_loss(case.hidden, case.weight, case.labels, case.ids, case.logprobs)).backward()
    torch.testing.assert_close(case.hidden.grad, 3 * to_hidden)
    torch.testing.assert_close(case.weight.grad, 3 * to_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: case.ids[4].fill_(5), "row 4 breaks this"),
        (lambda case: case.ids[4].copy_(torch.tensor([1, 2, 3, 1, -1, -1, -1, -1])), "another one each"),
        (lambda case: case.ids[5, 0].fill_(123), "under 123"),
        (lambda case: case.labels[3].fill_(123), "labels must be in"),
        (lambda case: case.labels[3].fill_(-1), "labels must be in"),
        (lambda case: case.logprobs[6, 2].fill_(0.5), "at most 0"),
        (lambda case: case.logprobs[6, 2].fill_(float("nan")), "not NaN"),
        (lambda case: setattr(case, "labels", case.labels[1:]), r"labels must be \[7\]"),
        (lambda case: setattr(case, "logprobs", case.logprobs[:, 1:]), "both be"),
        (lambda case: setattr(case, "weight", case.weight[:, 1:]), "hidden .T, H. and weight"),
        (lambda case: setattr(case, "vocab", 124), "vocab_size"),
        (lambda case: setattr(case, "hidden", case.hidden.half()), "float16"),
    ],
)
def test_faulty_inputs_are_refused(problem, ours, change, message):
    case = problem(7, 123, 33, 8, ragged=False)
    case.labels.clamp_(min=0)
    change(case)
    with pytest.raises(ValueError, match=message):
        ours(case)


def test_faulty_options_are_refused(problem, ours):
    for options in (
        {"tail": "drop"},
        {"reduction": "max"},
        {"temperature": 0.0},
        {"chunk_tokens": 0},
        {"implementation": "fast"},
        {"implementation": "fused"},  # not without a GPU
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ours(problem(), **options)


def test_padding_may_repeat(problem, ours):
    case = problem()
    case.ids[:, 2:], case.logprobs[:, 2:] = -1, 0.0  # whatever stands beside padding
    assert ours(case)[0].isfinite()


def test_chunks_stay_within_their_size(problem, ours, monkeypatch):
    """No step sees more logits than chunk_tokens and the reference's own limit allow."""
    seen = []
    real = reference.losses_

    def step(logits, *inputs, **options):
        seen.append(logits.shape)
        return real(logits, *inputs, **options)

    case = problem(50, 123, 8, 4)
    whole = ours(case)
    monkeypatch.setattr(reference, "losses_", step)
    ours(case, chunk_tokens=16)
    assert [rows for rows, _ in seen] == [16, 16, 16, 2]
    seen.clear()
    monkeypatch.setattr(head, "REFERENCE_LOGITS", 123 * 7)
    for one, other in zip(ours(case), whole, strict=True):
        torch.testing.assert_close(one, other)
    assert max(rows for rows, _ in seen) == 7 and sum(rows for rows, _ in seen) == 50
