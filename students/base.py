"""The base model, loaded as the student it becomes."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data.errors import RequestError
from r1distill.students.catalogue import Adapter, Architecture, QloraMethod, Student
from r1distill.students.layout import Layout

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

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


def load_to_train(
    student: Student, folder: Path, tokenizer: PreTrainedTokenizerFast, layout: Layout
) -> PreTrainedModel:
    """Load the base in the precision that training wants: float32 master weights; where DeepSpeed keeps those itself,
    or the base is frozen on a GPU, bf16; under QLoRA 4 bits."""
    import torch

    frozen = isinstance(student.sft.method, Adapter) and not layout.cpu
    sharded = layout.strategy == "zero3" and student.sft.precision == "bf16_autocast"
    dtype = torch.bfloat16 if frozen or sharded else torch.float32
    options: dict[str, Any] = {"attn_implementation": layout.attention_used}
    if isinstance(student.sft.method, QloraMethod):
        options["quantization_config"] = four_bits(sharded=layout.strategy == "fsdp2")
    return load(student.architecture, folder, tokenizer, dtype, **options)


def four_bits(*, sharded: bool) -> BitsAndBytesConfig:
    """NF4 with double quantisation (arXiv:2305.14314); to be sharded it is kept in elements of bf16, not of bytes.

    Raises RequestError where bitsandbytes is not installed.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise RequestError("qlora needs bitsandbytes, which is not installed. Install it: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
    )


def load(
    architecture: Architecture,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
    attn_implementation: str = "sdpa",
    **options: Any,
) -> PreTrainedModel:
    """Load the base in ``folder`` as ``config`` has it. Raises what that raises.

    Raises RequestError also where the base lacks weights, which transformers would make up.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    student = config(architecture, folder, tokenizer)
    untie = AutoConfig.from_pretrained(folder).tie_word_embeddings and not architecture.tied
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report calls the output embedding of an untied base newly initialised
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder,
            config=student,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **options,
        )
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(set(told["missing_keys"]) - ({"lm_head.weight"} if untie else set())):
        raise RequestError(
            f"the base in {folder} lacks {len(missing)} weights, {missing[0]} for one. Download it again, or correct "
            "'base' in the student's file."
        )
    if untie:  # the checkpoint holds one matrix; the output embedding starts as a copy of it
        untied(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    model.generation_config = GenerationConfig(**SAMPLING, **marks(tokenizer))
    return model


def untied(source: torch.Tensor, copy: torch.Tensor) -> None:
    """Fill ``copy`` with what ``source`` holds; where ZeRO-3 has sharded them, the first process does, for all."""
    import torch

    whole: AbstractContextManager[Any] = nullcontext()
    if hasattr(source, "ds_id"):
        import deepspeed

        whole = deepspeed.zero.GatheredParameters([source, copy], modifier_rank=0)
    with torch.no_grad(), whole:
        copy.copy_(source)
