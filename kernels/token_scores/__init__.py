"""What a linear head says of every token (log-probability, entropy, top-k), without its logits."""

from r1distill.kernels.token_scores.scores import TokenScores, token_scores

__all__ = ["TokenScores", "token_scores"]
