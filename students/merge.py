"""Merging a LoRA adapter into its base, checked: the merged student must answer as base and adapter do together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data.errors import R1DistillError
from r1distill.students import base
from r1distill.students.catalogue import Architecture

if TYPE_CHECKING:
    import torch

# Most that a logit may differ, as a share of the largest: the sum itself is exact up to float32's rounding; in bf16
# each weight keeps 8 bits.
EXACT, ROUNDED = 1e-4, 5e-2
PROBE = "What is 12 + 30? Think first, then answer."


def merge(architecture: Architecture, folder: Path, adapter: Path, tokenizer: Path, out: Path) -> None:
    """Write the base in ``folder`` with ``adapter`` merged in to ``out``, in bf16, with the tokenizer's files.

    The sum is made in float32: in bf16 most of an adapter's small updates would be rounded away. Raises R1DistillError
    where the merged logits are not the adapter's.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    model = PeftModel.from_pretrained(base.load(architecture, folder, words, torch.float32), str(adapter))
    ids = words.apply_chat_template([{"role": "user", "content": PROBE}], add_generation_prompt=True, return_dict=False)
    expected = logits(model, ids)
    merged = model.merge_and_unload(safe_merge=True)
    check(expected, logits(merged, ids), EXACT, f"the sum of base and adapter in {adapter}")
    merged = merged.to(torch.bfloat16)
    check(expected, logits(merged, ids), ROUNDED, f"the sum of base and adapter in {adapter}, in bf16,")
    merged.save_pretrained(out, max_shard_size=base.SHARD_SIZE)
    shutil.copytree(tokenizer, out, dirs_exist_ok=True)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """(T, V) in float32."""
    import torch

    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return found


def check(expected: torch.Tensor, found: torch.Tensor, tolerance: float, what: str) -> None:
    """Raise R1DistillError where two models' logits differ by more than ``tolerance`` of the largest."""
    largest = float(expected.abs().max())
    share = float((found - expected).abs().max()) / largest
    if not share <= tolerance:  # nor where it is no number
        raise R1DistillError(
            f"{what} gives logits that differ by {share:.2%} of the largest from those of base and adapter together, "
            f"expected at most {tolerance:.2%}. Nothing was written; the base or the adapter is not the one that was "
            "trained, or the installed peft merges another way (requirements/ holds the tested versions)."
        )
