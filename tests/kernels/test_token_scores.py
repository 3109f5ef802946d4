"""Scores on the CPU against the whole softmax in float64."""

from __future__ import annotations

import pytest
import torch

from r1distill.kernels import head
from r1distill.kernels.token_scores import token_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 123, 33, 1), (20, 507, 33, 64), (3, 123, 8, 123), (3, 252, 8, 0)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_beside_the_whole_softmax(problem, monkeypatch, shape, dtype, temperature):
    tokens, vocab, width, k = shape
    case = problem(tokens, vocab, width, 0, padded=5, dtype=dtype)
    monkeypatch.setattr(head, "REFERENCE_LOGITS", 3 * vocab)  # chunks of three tokens
    options = {"k": k, "temperature": temperature, "vocab_size": vocab}
    found = token_scores(case.hidden, case.weight, case.labels, **options)
    logits = (case.hidden @ case.weight[:vocab].t()).detach()
    log_q = (logits.double() / temperature).log_softmax(1)
    asked = case.labels >= 0
    close = {"rtol": 1e-5, "atol": 1e-5}
    expected = torch.where(asked, log_q.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1), 0)
    torch.testing.assert_close(found.logprobs.double(), expected, **close)
    torch.testing.assert_close(found.entropy.double(), -(log_q.exp() * log_q).sum(1), **close)
    torch.testing.assert_close(found.topk_logprobs.double(), log_q.topk(k, 1).values, **close)
    torch.testing.assert_close(log_q.gather(1, found.topk_ids.long()), log_q.topk(k, 1).values, **close)
    assert found.topk_ids.dtype == torch.int32 and not found.topk_logprobs.requires_grad


def test_what_it_captures_is_what_the_loss_takes(problem, ours):
    """A student is at its own scores' minimum, at any temperature."""
    case = problem(9, 123, 33, 1)
    for temperature in (1.0, 2.0):
        found = token_scores(case.hidden, case.weight, case.labels, k=16, temperature=temperature)
        case.ids, case.logprobs = found.topk_ids, found.topk_logprobs
        loss, to_hidden, _ = ours(case, temperature=temperature)
        assert abs(loss) < 1e-6 and to_hidden.abs().max() < 1e-6


def test_no_tokens_and_faulty_inputs(problem):
    case = problem(4, 123, 8, 0)
    hidden, weight, ids = case.hidden, case.weight, case.labels
    assert token_scores(hidden[:0], weight, ids[:0], k=3).topk_ids.shape == (0, 3)
    for message, arguments, options in (
        ("ids must be under 100", (hidden, weight, ids.fill_(110)), {"vocab_size": 100}),
        ("vocab_size", (hidden, weight, ids), {"vocab_size": 124}),
        ("k must be", (hidden, weight, ids), {"k": 124}),
        ("4 integers", (hidden, weight, ids[1:]), {}),
        ("hidden .T, H. and weight", (hidden, weight[:, 1:], ids), {}),
        ("temperature", (hidden, weight, ids), {"temperature": 0}),
        ("implementation", (hidden, weight, ids), {"implementation": "fast"}),
        ("needs a GPU", (hidden, weight, ids), {"implementation": "fused"}),
        ("float16", (hidden.half(), weight.half(), ids), {}),
    ):
        with pytest.raises(ValueError, match=message):
            token_scores(*arguments, **{"k": 3, **options})
