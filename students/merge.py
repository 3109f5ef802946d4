"""Merging a LoRA adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from r1distill.students import base
from r1distill.students.catalogue import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def merge(
    architecture: Architecture, folder: Path, adapter: Path, tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """Write the base in ``folder`` with ``adapter`` merged in to ``out``, in bf16, with its tokenizer.

    The sum is made in float32: in bf16 most of an adapter's small updates would be rounded away.
    """
    import torch
    from peft import PeftModel

    model = base.load(architecture, folder, tokenizer, torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True).to(torch.bfloat16)
    merged.config.use_cache = True
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
