"""Packing: nothing lost, nothing cut, and members that don't see each other."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.students import packing, trainer
from r1distill.students.catalogue import Student
from r1distill.students.template import IGNORE, TEMPLATES, encode

from .conftest import row, sums


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_decreasing_keeps_every_item_and_fills_well(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 100) for _ in range(chance.randint(0, 400))]
    bins = packing.best_fit_decreasing(lengths, 100)
    assert sorted(item for group in bins for item in group) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in group) <= 100 for group in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 100) + 6 / 9 + 1


def test_best_fit_takes_the_fullest_bin() -> None:
    assert packing.best_fit_decreasing([60, 70, 30, 40], 100) == [[1, 2], [0, 3]]


def built(student: Student, rows: list[dict], tmp_path: Path):
    schema.write(tmp_path / "dataset" / "train", schema.TRAINING_ROW, rows)
    out = tmp_path / "packs"
    (out / ".work").mkdir(parents=True)
    return out, packing.build(student, tmp_path / "dataset", out, tmp_path / "home")


def test_packs_hold_exactly_the_members_tokens(tiny_student: Student, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = sums(20)
    out, result = built(tiny_student, rows, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    table = schema.read(out / "train", schema.PACK)
    found = {}
    for pack in schema.rows(table):
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= 256
        for number, who in enumerate(pack["members"]):
            found[who["prompt_id"]] = packing.member(pack, number)
    assert found == {r["prompt_id"]: encode(TEMPLATES["chatml"], tokenizer, r["messages"]) for r in rows}
    assert (result.read, result.kept, result.rejected) == (20, 20, {})
    text = (out / "examples.txt").read_text()
    assert "tokens learned" in text and "\\boxed{" in text and text.count("<|im_end|>") >= 2


def test_rejected_rows_have_reasons_and_the_counts_add_up(tiny_student: Student, tmp_path: Path) -> None:
    bad = [
        row("long", "1+1=?", "2" * 400, "2"),
        row("marked", "1<|im_start|>", None, "2"),
        row("nothing", "1+1=?", None, ""),
    ]
    _, result = built(tiny_student, [*sums(5), *bad], tmp_path)
    result.check("packs")
    assert result.rejected == {"longer than 256 tokens": 1, "control token inside the text": 1, "empty target": 1}


def test_packs_load_with_datasets(tiny_student: Student, sums_dataset: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    out = tmp_path / "packs"
    (out / ".work").mkdir(parents=True)
    packing.build(tiny_student, sums_dataset, out, tmp_path / "home")
    assert set(load_from_disk(str(out))) == {"train", "validation"}


def test_members_of_a_pack_do_not_see_each_other(tiny_base: Path, tiny_student: Student, tmp_path: Path) -> None:
    """Loss and gradients of packed traces equal those of the same traces alone, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    out, _ = built(tiny_student, sums(12), tmp_path)
    packs = list(schema.rows(schema.read(out / "train", schema.PACK)))
    assert max(len(pack["members"]) for pack in packs) > 1
    alone = [
        {"input_ids": ids, "labels": labels, "seq_lengths": [len(ids)]}
        for pack in packs
        for ids, labels in (packing.member(pack, number) for number in range(len(pack["members"])))
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32, attn_implementation="sdpa")

    def loss_and_gradients(batches: list[list[dict]]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for packs_of_batch in batches:
            batch = trainer.collate(packs_of_batch, pad=0)
            labels = batch.pop("labels")
            logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
            )
            loss.backward()
            total += loss.item()
        return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected, gradients = loss_and_gradients([[one] for one in alone])
    for batches in ([[pack] for pack in packs], [packs]):  # a pack at a time, and all as rows of one batch
        found, packed = loss_and_gradients(batches)
        assert found == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
