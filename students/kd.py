"""Training on a teacher's top-k: the same packs, trainer and checkpoints as plain training, with ``topk_kl_loss``.

The loss is computed inside the output embedding's own forward, in place of its logits: there a sharded weight is
gathered, an adapter's rows are merged, and autocast is on, as for the logits that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from r1distill.students import topk, trainer
from r1distill.students.catalogue import Distill
from r1distill.students.schedule import EMPTY
from r1distill.students.template import IGNORE

if TYPE_CHECKING:
    import torch


def with_rows(together: Callable[[list[dict[str, Any]]], dict[str, Any]], rows: topk.TopK) -> Any:
    """The training's collator, whose batches also get the teacher's rows; a place without a pack has none."""

    def collate(packs: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        ids, logprobs = topk.concatenated(rows, [pack["pack"] for pack in packs if pack["pack"] != EMPTY])
        return together(packs) | {"topk_ids": torch.from_numpy(ids), "topk_logprobs": torch.from_numpy(logprobs)}

    return collate


def trainer_class(distill: Distill, vocab: int) -> Any:
    """``trainer``'s trainer, whose loss is kl_weight · KL + ce_weight · cross-entropy; the validation's is plain."""
    plain = trainer.trainer_class()

    class Distilling(plain):  # type: ignore[misc, valid-type]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            where, packs = inputs.pop("domains"), inputs.pop("packs")
            losses = token_losses(model, self.model.get_output_embeddings(), inputs, distill, vocab)
            self.count(losses.detach(), where[trainer.shifted(inputs["labels"]) != IGNORE], packs)
            return losses.sum() / num_items_in_batch * self.layout.processes  # that gradients are averaged over

    return Distilling


def token_losses(model: Any, head: Any, inputs: Any, distill: Distill, vocab: int) -> torch.Tensor:
    """(N,) losses of a batch's labels, in order."""
    from r1distill.kernels.topk_kl import topk_kl_loss

    labels = inputs["labels"][:, 1:]
    learned = labels != IGNORE

    def loss_for_logits(hidden: torch.Tensor) -> torch.Tensor:
        weight = head.weight
        return topk_kl_loss(
            hidden[:, :-1][learned],
            weight,
            labels[learned],
            inputs["topk_ids"],
            inputs["topk_logprobs"],
            temperature=distill.temperature,
            kl_weight=distill.kl_weight,
            ce_weight=distill.ce_weight,
            tail=distill.tail,
            vocab_size=min(vocab, len(weight)),
            reduction="none",
        )

    head.forward = loss_for_logits  # before its class's own
    try:
        losses: torch.Tensor = model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    finally:
        del head.forward
    return losses
