"""What is measured for the top-k loss: ours, and every peer that can be imported, forward and backward.

Each takes the same inputs and returns a call that ends with gradients of hidden states and head. Peers that know no
teacher do the cross-entropy alone, which is less work. The runner is ``r1distill.kernels.bench``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from r1distill.kernels import head
from r1distill.kernels.topk_kl import reference, topk_kl_loss
from r1distill.kernels.topk_kl.reference import Terms, token_losses

MASS = 0.98  # of the teacher's top-k, the same for every token, so that losses of other definitions can be compared
CE_WEIGHT = 0.1

Call = Callable[[], Tensor]


@dataclass
class Inputs:
    hidden: Tensor  # (T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (T,)
    ids: Tensor  # (T, K)
    logprobs: Tensor  # (T, K)


def inputs(tokens: int, width: int, vocab: int, k: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random ones; ids of a row differ by at least one, labels are all counted."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(width**-0.5).requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)
    spread = torch.arange(k, device=device) * (vocab // max(1, k))
    ids = spread + torch.randint(max(1, vocab // max(1, k)), (tokens, k), device=device)
    logprobs = torch.randn(tokens, k, device=device).log_softmax(1) + torch.tensor(MASS).log().item()
    return Inputs(hidden, weight, labels, ids, logprobs)


def step(one: Inputs, loss: Call) -> Call:
    """A forward and a backward pass from no gradients."""

    def run() -> Tensor:
        one.hidden.grad = one.weight.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return run


def ours(one: Inputs, **options: Any) -> Call:
    arguments = (one.hidden, one.weight, one.labels, one.ids, one.logprobs)
    return step(one, lambda: topk_kl_loss(*arguments, **{"ce_weight": CE_WEIGHT, **options}))


def ours_float32_sum(one: Inputs) -> Call:
    one.weight.grad_dtype = torch.float32
    return ours(one)


def ours_cross_entropy(one: Inputs) -> Call:
    one.ids, one.logprobs = one.ids[:, :0], one.logprobs[:, :0]
    return ours(one, ce_weight=1.0)


def dense(one: Inputs, losses: Callable[..., Tensor] = token_losses) -> Call:
    terms = Terms(1.0, 1.0, CE_WEIGHT, "bucket")

    def loss() -> Tensor:
        logits = (one.hidden @ one.weight.t()).float()
        return losses(logits, one.labels, one.ids, one.logprobs, terms).mean()

    return step(one, loss)


def compiled(one: Inputs) -> Call:
    terms = Terms(1.0, 1.0, CE_WEIGHT, "bucket")

    @torch.compile
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
        return token_losses((hidden @ weight.t()).float(), labels, ids, logprobs, terms).mean()

    return step(one, lambda: loss(one.hidden, one.weight, one.labels, one.ids, one.logprobs))


def veomni(one: Inputs) -> Call:
    """Its own default chunk; the term of the tail, which it doesn't have, is left away."""
    function = _veomni().chunk_topk_distill_function

    def loss() -> Tensor:
        log_q, _, kl, _, _ = function(
            one.hidden, one.weight, one.labels, one.ids, one.logprobs, shift_labels=one.labels
        )
        return (kl - CE_WEIGHT * log_q).mean()

    return step(one, loss)


def _veomni() -> ModuleType:
    """Its module; where the package itself does not import, its two files with the rest of it left out.

    R1DISTILL_VEOMNI names the folder that holds ``veomni`` where it is not installed.
    """
    name = "veomni.ops.kernels.cross_entropy.chunk_topk_distill"
    if place := os.environ.get("R1DISTILL_VEOMNI"):
        sys.path.append(place)
    try:
        return importlib.import_module(name)
    except Exception as error:
        found = importlib.util.find_spec("veomni") if "veomni" not in sys.modules else sys.modules["veomni"].__spec__
        if found is None or not found.submodule_search_locations:
            raise
        root = Path(next(iter(found.submodule_search_locations)))
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "veomni"]:
            del sys.modules[loaded]
        for parent in ("", "ops", "ops.kernels", "ops.kernels.cross_entropy", "distributed"):
            stub = ModuleType("veomni" + ("." + parent if parent else ""))
            stub.__path__ = [str(root.joinpath(*parent.split(".")))]
            sys.modules[stub.__name__] = stub
        state = ModuleType("veomni.distributed.parallel_state")
        state.get_parallel_state = lambda: SimpleNamespace(sp_enabled=False)  # type: ignore[attr-defined]
        sys.modules[state.__name__] = state
        print(f"veomni does not import whole ({error}); its two files are used alone.", file=sys.stderr)
        return importlib.import_module(name)


def liger(one: Inputs) -> Call:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return step(one, lambda: loss(one.weight, one.hidden, one.labels))


def quack(one: Inputs) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return step(one, lambda: chunked_linear_cross_entropy(one.hidden, one.weight, one.labels))


def cut_cross_entropy(one: Inputs) -> Call:
    """Exact: its default leaves small gradients out."""
    from cut_cross_entropy import linear_cross_entropy

    return step(one, lambda: linear_cross_entropy(one.hidden, one.weight, one.labels, filter_eps=None))


def torch_chunked(one: Inputs) -> Call:
    options = torch.nn.LinearCrossEntropyOptions()
    function = torch.nn.functional.linear_cross_entropy
    return step(one, lambda: function(one.hidden, one.weight, one.labels, options=options))


# name -> (how it is made, what it computes); in the order of their importance, should time run out.
CONTENDERS: dict[str, tuple[Callable[[Inputs], Call], str]] = {
    "ours": (ours, "kl + ce"),
    "VeOmni": (veomni, "kl without tail + ce"),
    "Liger": (liger, "ce"),
    "ours, K = 0": (ours_cross_entropy, "ce"),
    "ours, dW in float32": (ours_float32_sum, "kl + ce"),
    "torch linear_cross_entropy": (torch_chunked, "ce"),
    "cut-cross-entropy": (cut_cross_entropy, "ce"),
    "QuACK": (quack, "ce"),
    "torch.compile": (compiled, "kl + ce"),
    "dense": (dense, "kl + ce"),
    "ours, reference": (lambda one: ours(one, implementation="reference"), "kl + ce"),
}


def expected(one: Inputs, what: str) -> float:
    """The loss that a contender should find, from ours."""
    arguments = (one.hidden.detach(), one.weight.detach(), one.labels)
    cross_entropy = topk_kl_loss(*arguments, one.ids[:, :0], one.logprobs[:, :0], ce_weight=1.0).item()
    if what == "ce":
        return cross_entropy
    tail = "bucket" if what == "kl + ce" else "renormalise"
    kl = topk_kl_loss(*arguments, one.ids, one.logprobs, tail=tail).item()  # type: ignore[arg-type]
    if what != "kl + ce":  # Σ p (log p - log q) with Σ p = m is m (KL + log m)
        kl = MASS * (kl + torch.tensor(MASS).log().item())
    return kl + CE_WEIGHT * cross_entropy


CASES = (  # dtype, T, H, V, K
    (torch.bfloat16, 300, 256, 152_064, 64),
    (torch.bfloat16, 77, 264, 151_665, 256),  # no multiple of anything
    (torch.float32, 130, 64, 32_003, 1),
    (torch.float32, 50, 64, 507, 16),
)
TERMS = [Terms(temperature, 0.7, 0.3, tail) for tail in ("bucket", "renormalise") for temperature in (1.0, 2.0)]


def check(device: str) -> list[str]:
    """Ours against float64 on small problems, a fifth of the tokens ignored: what is wrong, in words.

    The kernel is held to its logits' precision on the same logits; the function to what bfloat16 leaves of a product.
    """
    faults = []
    for dtype, tokens, width, vocab, k in CASES:
        one = (
            inputs(tokens, width, vocab, k, device, dtype)
            if device == "cuda"
            else inputs(33, 16, 507, k, device, dtype)
        )
        kept = torch.arange(len(one.labels), device=device) % 5 != 2
        for terms in TERMS:
            for name, error, limit in (*_kernel_errors(one, kept, terms), *_function_errors(one, kept, terms)):
                if not error < limit:
                    faults.append(
                        f"{dtype}, V = {vocab}, K = {k}, {terms}: {name} is off by {error:.2g}, over {limit:.2g}"
                    )
    return faults


def _kernel_errors(one: Inputs, kept: Tensor, terms: Terms) -> list[tuple[str, float, float]]:
    step = reference.losses_
    if one.hidden.is_cuda:
        from r1distill.kernels.topk_kl import fused

        step = fused.losses_
    worst = [0.0, 0.0]
    for rows, _, logits in head.chunks(one.hidden.detach(), one.weight.detach(), 64):
        wide, scale = logits.double(), kept[rows].float() * 0.1
        aims = (one.labels[rows], one.ids[rows])
        true = reference.losses_(wide, *aims, one.logprobs[rows].double(), scale.double(), terms, gradient=True)
        mine = step(logits, *aims, one.logprobs[rows], scale, terms, gradient=True)
        for place, (a, b) in enumerate(((mine, true), (logits, wide))):
            worst[place] = max(worst[place], ((a.double() - b).abs().max() / b.abs().max()).item())
    return [
        ("kernel's loss", worst[0], 1e-5),
        ("kernel's gradient", worst[1], torch.finfo(one.hidden.dtype).eps + 1e-5),
    ]


def _function_errors(one: Inputs, kept: Tensor, terms: Terms) -> list[tuple[str, float, float]]:
    limit = 0.05 if one.hidden.dtype == torch.bfloat16 else 5e-3  # float32 products may be TF32
    found = []
    for reduction in ("mean", "none"):
        hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (one.hidden, one.weight))
        losses = token_losses(hidden @ weight.t(), one.labels, one.ids, one.logprobs.double(), terms)
        true = (losses * kept).sum() / (kept.sum() if reduction == "mean" else 1)
        true.backward()
        one.hidden.grad = one.weight.grad = None
        arguments = (one.hidden, one.weight, one.labels.masked_fill(~kept, -100), one.ids, one.logprobs)
        options: dict[str, Any] = {**asdict(terms), "reduction": reduction, "chunk_tokens": 64}
        value = topk_kl_loss(*arguments, **options).sum()
        value.backward()
        pairs = ((value.detach(), true.detach()), (one.hidden.grad, hidden.grad), (one.weight.grad, weight.grad))
        for name, (mine, other) in zip(("loss", "dH", "dW"), pairs, strict=True):
            assert mine is not None and other is not None
            found.append((f"{name} ({reduction})", ((mine - other).abs().max() / other.abs().max()).item(), limit))
    return found
