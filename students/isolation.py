"""The check that packed traces don't see each other: packed, their losses and gradients are those of each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r1distill.data.errors import R1DistillError
from r1distill.students.packing import member
from r1distill.students.trainer import token_losses

Pack = dict[str, Any]
Collator = Callable[[list[Pack]], dict[str, Any]]


def check(model: Any, packs: Sequence[Pack], together: Collator, tolerance: float = 1e-4) -> None:
    """Raise R1DistillError where ``model`` gives packed traces other losses or gradients than each trace alone.

    ``packs`` are rows as ``schedule.Packs`` gives them, of more than one member; ``together`` is the collator to be
    tried, all packs in one batch. Losses and gradients may differ by ``tolerance`` of the largest: 1e-4 fits float32,
    bf16 wants some 2e-2. What a wrong mask does is of the size of the losses themselves.
    """
    alone = [_alone(pack, number) for pack in packs for number in range(len(pack["seq_lengths"]))]
    if len(alone) == len(packs):
        raise ValueError("nothing to tell apart: every pack has one member")
    packed, gradients = _run(model, [together(list(packs))])
    apart, expected = _run(model, [together([one]) for one in alone])
    _compare("losses", packed, apart, tolerance)
    for name, gradient in expected.items():
        _compare(f"gradients of {name}", gradients[name], gradient, tolerance)


def _alone(pack: Pack, number: int) -> Pack:
    ids, labels = member(pack, number)
    domains = pack["domains"][number : number + 1]
    return {"pack": 0, "input_ids": ids, "labels": labels, "seq_lengths": np.array([len(ids)]), "domains": domains}


def _run(model: Any, batches: Sequence[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """(N,) losses of all targets in order, and the gradients of their sum by parameter."""
    import torch

    model.zero_grad()
    losses = []
    for batch in batches:
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("packs", "domains")
        }
        found, _ = token_losses(model, model.get_output_embeddings(), inputs)
        found.sum().backward()
        losses.append(found.detach())
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return torch.cat(losses), gradients


def _compare(what: str, found: Any, expected: Any, tolerance: float) -> None:
    share = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not share <= tolerance:
        raise R1DistillError(
            f"packed traces see each other: their {what} differ from those of each trace alone by {share:.2%} of the "
            f"largest, expected at most {tolerance:.2%}. Position ids must restart with every trace, and no attention "
            "mask or cache may be given; look at the attention (student.sft.launch.attention) and the collator."
        )
