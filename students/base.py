"""The base model, loaded as the student it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from r1distill.data.errors import RequestError
from r1distill.students.catalogue import Architecture

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def load(
    architecture: Architecture, folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the base in ``folder`` with the student's rotary frequencies, context and untying, and its special tokens.

    Raises RequestError where the base has another shape than the student's file says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    found, wanted = AutoConfig.from_pretrained(folder), architecture.to_config()
    for key in SHAPE:
        if getattr(found, key) != getattr(wanted, key):
            raise RequestError(
                f"the base in {folder} has {key} {getattr(found, key)}, "
                f"the student's file says {getattr(wanted, key)}. "
                "Correct 'base' or 'architecture'."
            )
    untie = found.tie_word_embeddings and not architecture.tied
    found.tie_word_embeddings = architecture.tied
    found.rope_parameters = wanted.rope_parameters
    found.max_position_embeddings = architecture.max_position
    found.rms_norm_eps = architecture.rms_eps
    found.bos_token_id = tokenizer.bos_token_id
    found.eos_token_id = tokenizer.eos_token_id
    found.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_pretrained(folder, config=found, dtype=dtype, attn_implementation="sdpa")
    if untie:  # the checkpoint holds one matrix; the output embedding starts as a copy of it
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(model.get_input_embeddings().weight)
    # What DeepSeek publishes with its students: sampling, since greedy reasoning falls into loops.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
