"""How far a variant's next token is from its checkpoint's, on held-out traces: KL divergence in nats a token.

Computed in PyTorch from the files alone: nothing is served. One layer of each model is in memory at a time, so that a
model of 70 billion parameters goes through one GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.students.dequantise import Weights, weights

if TYPE_CHECKING:
    import torch

ROWS = 512  # positions whose logits are held at a time
SHARE = 4  # one trace gives at most this fraction of the tokens, so that several are looked at


@dataclass(frozen=True)
class Trace:
    """One held-out trace: its ids, and from which position on the next token is the student's to write."""

    ids: list[int]
    first: int


def held_out(encoded: Iterator[tuple[list[int], int]], tokens: int) -> list[Trace]:
    """Traces (ids, length of the prefix) with about ``tokens`` target tokens in all, of several traces."""
    chosen: list[Trace] = []
    left = tokens
    for ids, prefix in encoded:
        if left <= 0:
            break
        take = min(len(ids) - prefix, max(1, tokens // SHARE), left)
        chosen.append(Trace(ids[: prefix + take], prefix))
        left -= take
    return chosen


class Reference:
    """A checkpoint's own view of the held-out traces, kept as the last hidden states (tokens x hidden)."""

    def __init__(self, checkpoint: Path, sequences: Sequence[Trace]):
        self.checkpoint, self.sequences = checkpoint, list(sequences)
        self._weights = weights(checkpoint)
        self._states = last_states(checkpoint, self._weights, self.sequences)

    @property
    def tokens(self) -> int:
        return sum(len(one.ids) - one.first for one in self.sequences)

    def divergence(self, theirs: Weights) -> float:
        """The mean over target tokens of KL(checkpoint || variant), whose weights are given."""
        return self._means(self.checkpoint, theirs)[0]

    def reading(self, other: Path) -> tuple[float, float]:
        """(KL(checkpoint || other), other's cross-entropy), means over target tokens, of a model of any shape that has
        the same vocabulary but for padding."""
        return self._means(other, weights(other))

    def _means(self, model: Path, theirs: Weights) -> tuple[float, float]:
        import torch

        states = last_states(model, theirs, self.sequences)
        targets = torch.tensor([token for one in self.sequences for token in one.ids[one.first :]]).to(states.device)
        heads = [_head(which).to(states.device) for which in (self._weights, theirs)]
        vocab = min(map(len, heads))  # one of them may be padded
        ours_head, their_head = (head[:vocab] for head in heads)
        divergence = loss = 0.0
        with torch.inference_mode():
            for start in range(0, len(states), ROWS):
                here = slice(start, start + ROWS)
                p = _log_probabilities(self._states[here], ours_head)
                q = _log_probabilities(states[here], their_head)
                divergence += float((p.exp() * (p - q)).sum())
                loss -= float(q.gather(1, targets[here, None]).sum())
        return divergence / len(states), loss / len(states)


def _head(which: Weights) -> torch.Tensor:
    head = which.get("lm_head.weight")
    tied = which.get("model.embed_tokens.weight") if head is None else head
    assert tied is not None
    return tied


def _log_probabilities(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    return (states @ head.t()).float().log_softmax(-1)


def last_states(checkpoint: Path, values: Weights, sequences: Sequence[Trace]) -> torch.Tensor:
    """(tokens, hidden): the last hidden states at the positions that predict a target token, in float32.

    The architecture is the checkpoint's config.json, the numbers are ``values``, layer by layer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().model
    rotary = type(model.rotary_emb)(config=config).to(device)
    embedding = values.get("model.embed_tokens.weight")
    norm = values.get("model.norm.weight")
    assert embedding is not None and norm is not None
    with torch.inference_mode():
        states = [embedding[torch.tensor(one.ids)].unsqueeze(0).to(device) for one in sequences]
        places = [torch.arange(len(one.ids), device=device).unsqueeze(0) for one in sequences]
        turned = [rotary(state, place) for state, place in zip(states, places, strict=True)]
        for number, layer in enumerate(model.layers):
            _fill(layer, values, f"model.layers.{number}", device)
            states = [
                layer(state, attention_mask=None, position_ids=place, position_embeddings=turns)
                for state, place, turns in zip(states, places, turned, strict=True)
            ]
            layer.to("meta")
        model.norm.load_state_dict({"weight": norm.to(device)}, assign=True)
        found = [model.norm(state[0, one.first - 1 : -1]) for state, one in zip(states, sequences, strict=True)]
    return torch.cat(found)


def _fill(layer: Any, values: Weights, name: str, device: torch.device) -> None:
    """Put a layer's numbers into it, and the rounding of inputs where the variant has one."""
    import torch

    tensors = {key: values.get(f"{name}.{key}") for key, _ in layer.named_parameters()}
    layer.load_state_dict({key: value.to(device) for key, value in tensors.items() if value is not None}, assign=True)
    for key, module in layer.named_modules():
        rounding = values.inputs(f"{name}.{key}") if isinstance(module, torch.nn.Linear) else None
        if rounding is not None:
            module.register_forward_pre_hook(lambda _, inputs, rounding=rounding: (rounding(inputs[0]), *inputs[1:]))
