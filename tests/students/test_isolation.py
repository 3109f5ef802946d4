"""Packed traces don't see each other, whichever attention computes them; what mixes them is caught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.students import attention, isolation, trainer
from r1distill.students.layout import Layout
from r1distill.students.schedule import Packs

LAYOUTS = {
    "sdpa": Layout(packs_per_batch=2, checkpointing=False),
    "varlen": Layout(packs_per_batch=2, checkpointing=False, attention="varlen"),
}


def packs(folder: Path, vocabulary: int) -> list[dict]:
    """Two packs of five and three random traces, whose first tokens are only read."""
    chance = np.random.default_rng(0)

    def row(lengths: list[int]) -> dict:
        ids = chance.integers(0, vocabulary, sum(lengths))
        labels = ids.copy()
        for start in np.cumsum([0, *lengths[:-1]]):
            labels[start : start + 3] = -100
        members = [{"prompt_id": f"p{n}", "sample": 0, "domain": "math"} for n in range(len(lengths))]
        return {"input_ids": ids, "labels": labels, "seq_lengths": lengths, "members": members}

    schema.write(folder, schema.PACK, [row([7, 30, 12, 5, 9]), row([20, 11, 8])])
    table = Packs(schema.read(folder, schema.PACK), pad=0)
    return [table[0], table[1]]


def tiny(kind: str, implementation: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation).train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_packed_traces_learn_as_each_alone(kind: str, name: str, checkpointing: bool, tmp_path: Path) -> None:
    model = tiny(kind, LAYOUTS[name].attention_used)
    if checkpointing:
        model.gradient_checkpointing_enable()
    isolation.check(model, packs(tmp_path, 97), trainer.collator(LAYOUTS[name], pad=0))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_what_mixes_them_is_caught(kind: str, tmp_path: Path) -> None:
    import torch

    right = trainer.collator(LAYOUTS["sdpa"], pad=0)

    def masked(rows: list[dict]) -> dict:
        batch = right(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    def counted_on(rows: list[dict]) -> dict:
        batch = right(rows)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    model, rows = tiny(kind, "sdpa"), packs(tmp_path, 97)
    for wrong in (masked, counted_on):
        with pytest.raises(R1DistillError, match="packed traces see each other: their losses differ"):
            isolation.check(model, rows, wrong)


def test_varlen_borders_are_where_positions_restart() -> None:
    import torch

    ids = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert attention.borders(ids).tolist() == [0, 3, 5, 6, 10]


def test_flash_attention_gets_one_row_whose_borders_are_the_members(tmp_path: Path) -> None:
    """transformers' flash attention keeps the members of a batch of several rows apart by nothing at all."""
    flat = Layout(strategy="ddp", processes_per_node=2, packs_per_batch=2, cpu=False, attention="flash_attention_2")
    batch = trainer.collator(flat, pad=0)(packs(tmp_path, 97))
    assert batch["input_ids"].shape == batch["position_ids"].shape == batch["domains"].shape == (1, 102)
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 37, 49, 54, 63, 83, 94, 102] and batch["max_length_q"] == 30
    assert attention.borders(batch["position_ids"]).tolist() == batch["cu_seq_lens_q"].tolist()


def test_under_ulysses_each_process_gets_its_part(tmp_path: Path) -> None:
    four = Layout(strategy="zero3", processes_per_node=4, sequence_parallel=4, cpu=False)
    (pack, _), whole = packs(tmp_path, 97), {}
    for process in range(4):
        part = trainer.collator(four, 0, process)([pack])
        assert set(part) == {"input_ids", "position_ids", "shift_labels", "domains", "packs"}
        assert part["input_ids"].shape == (1, 16)  # 63 tokens, in four equal parts
        for name in ("input_ids", "position_ids", "shift_labels"):
            whole[name] = [*whole.get(name, []), *part[name][0].tolist()]
    assert whole["input_ids"] == [*pack["input_ids"], 0]
    assert whole["shift_labels"] == [*pack["labels"][1:], -100, -100]
    assert whole["position_ids"][62:] == [8, 0]  # the padding is a member of its own


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_torchs_kernel_keeps_them_apart_on_a_gpu(kind: str, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    from trl.trainer.utils import add_fused_lm_head

    model = tiny(kind, "varlen").to("cuda", torch.bfloat16)
    add_fused_lm_head(model)
    layout = Layout(packs_per_batch=2, cpu=False)
    isolation.check(model, packs(tmp_path, 97), trainer.collator(layout, pad=0), tolerance=2e-2)
