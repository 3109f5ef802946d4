"""Merging a LoRA adapter into its base."""

from __future__ import annotations

import shutil
from pathlib import Path

from r1distill.students import base
from r1distill.students.catalogue import Architecture


def merge(architecture: Architecture, folder: Path, adapter: Path, tokenizer: Path, out: Path) -> None:
    """Write the base in ``folder`` with ``adapter`` merged in to ``out``, in bf16, with the tokenizer's files.

    The sum is made in float32: in bf16 most of an adapter's small updates would be rounded away.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = base.load(architecture, folder, AutoTokenizer.from_pretrained(tokenizer), torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True).to(torch.bfloat16)
    merged.save_pretrained(out, max_shard_size=base.SHARD_SIZE)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)
