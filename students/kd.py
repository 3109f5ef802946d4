"""Training on a teacher's top-k: the same packs, trainer and checkpoints as plain training, with ``topk_kl_loss``.

The loss is computed inside the output embedding's own forward, in place of its logits: there a sharded weight is
gathered, an adapter's rows are merged, and autocast is on, as for the logits that it replaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r1distill.students import topk, trainer
from r1distill.students.catalogue import Distill
from r1distill.students.template import IGNORE

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

PACK = "pack"  # a pack's number in its split, by which its rows are found


def numbered(packs: Dataset) -> Dataset:
    """The packs with their numbers."""
    return packs.add_column(PACK, list(range(len(packs))))


def collate(packs: list[dict[str, Any]], pad: int, rows: topk.TopK) -> dict[str, torch.Tensor]:
    """``trainer.collate``, and topk_ids and topk_logprobs (N, k) of the N labels that take loss, in order.

    Packs without a number (those of the validation) get none.
    """
    import torch

    batch = trainer.collate(packs, pad)
    if all(PACK in pack for pack in packs):
        ids, logprobs = topk.concatenated(rows, [pack[PACK] for pack in packs])
        batch |= {"topk_ids": torch.from_numpy(ids), "topk_logprobs": torch.from_numpy(logprobs)}
    return batch


def trainer_class(distill: Distill, vocab: int) -> Any:
    """``trainer``'s trainer, whose loss is kl_weight · KL + ce_weight · cross-entropy where a batch has logits."""
    plain = trainer.trainer_class()

    class Distilling(plain):  # type: ignore[misc, valid-type]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if "topk_ids" not in inputs:  # validation: cross-entropy, comparable with that of plain training
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            total = summed(model, self.model.get_output_embeddings(), inputs, distill, vocab)
            if num_items_in_batch is None:
                return total / (inputs["labels"][:, 1:] != IGNORE).sum().clamp(min=1)
            return total / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes

    return Distilling


def summed(model: Any, head: Any, inputs: Any, distill: Distill, vocab: int) -> torch.Tensor:
    """The loss of a batch, summed over its labels; ``head`` is the model's output embedding."""
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
            reduction="sum",
        )

    head.forward = loss_for_logits  # before its class's own
    try:
        loss: torch.Tensor = model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
    finally:
        del head.forward
    return loss
