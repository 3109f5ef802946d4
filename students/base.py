"""The base model, loaded as the student it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from r1distill.data.errors import RequestError
from r1distill.students.catalogue import Architecture

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SHARD_SIZE = "5GB"  # of safetensors: an upload that is cut off sends the shard again that it was at, and no other
SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


# What DeepSeek publishes with its students: sampling, since greedy reasoning falls into loops.
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}


def marks(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The ids that a model's settings repeat from its tokenizer."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def config(architecture: Architecture, folder: Path | None, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The base's config.json with the student's rotary frequencies, context and untying, and its special tokens.

    Without ``folder`` it is what the student's file says alone.

    Raises RequestError where the base has another shape than the student's file says.
    """
    from transformers import AutoConfig

    wanted = architecture.to_config()
    found = AutoConfig.from_pretrained(folder) if folder else architecture.to_config()
    for key in SHAPE:
        if getattr(found, key) != getattr(wanted, key):
            raise RequestError(
                f"the base in {folder} has {key} {getattr(found, key)}, "
                f"the student's file says {getattr(wanted, key)}. "
                "Correct 'base' or 'architecture'."
            )
    found.tie_word_embeddings = architecture.tied
    found.rope_parameters = wanted.rope_parameters
    found.max_position_embeddings = architecture.max_position
    found.rms_norm_eps = architecture.rms_eps
    for name, token in marks(tokenizer).items():
        setattr(found, name, token)
    return found


def load(
    architecture: Architecture, folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the base in ``folder`` as ``config`` has it. Raises what that raises."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    student = config(architecture, folder, tokenizer)
    untie = AutoConfig.from_pretrained(folder).tie_word_embeddings and not architecture.tied
    model = AutoModelForCausalLM.from_pretrained(folder, config=student, dtype=dtype, attn_implementation="sdpa")
    if untie:  # the checkpoint holds one matrix; the output embedding starts as a copy of it
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    model.generation_config = GenerationConfig(**SAMPLING, **marks(tokenizer))
    return model
