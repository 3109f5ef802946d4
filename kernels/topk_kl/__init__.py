"""Top-k distillation loss and cross-entropy of a linear head, without its logits."""

from r1distill.kernels.topk_kl.loss import topk_kl_loss

__all__ = ["topk_kl_loss"]
