"""One training step of the small student on the CPU beside plain TRL's SFTTrainer on the same packs.

Same model, optimiser, precision and packs; two packs of 512 tokens a step, one at a time. Both run in this process, in
turns, after a step to warm up; the fastest of each counts.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS, PER_STEP, ROUNDS = 2, 2, 3


def rows(count: int) -> list[dict[str, Any]]:
    """Worked sums, long enough to fill packs."""
    rng = random.Random(0)
    made = []
    for number in range(count):
        terms = [rng.randrange(10, 99) for _ in range(12)]
        thinking = "\n".join(f"{sum(terms[:n])} + {terms[n]} = {sum(terms[: n + 1])}" for n in range(1, len(terms)))
        messages = [
            {"role": "user", "content": " + ".join(map(str, terms)) + " = ?", "thinking": None},
            {"role": "assistant", "content": f"\\boxed{{{sum(terms)}}}", "thinking": thinking},
        ]
        about = {"domain": "math", "source": "bench", "license": "mit", "completion_tokens": 1, "pass_rate": 1.0}
        made.append({"prompt_id": f"p{number}", "sample": 0, "messages": messages, **about})
    return made


def measure() -> Iterator[dict[str, Any]]:
    """Seconds of a step, ours and TRL's."""
    import logging

    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from r1distill.data import models, schema
    from r1distill.data.config import load
    from r1distill.students import base, packing, schedule, tracking, trainer
    from r1distill.students.catalogue import Student
    from r1distill.students.layout import Layout

    logging.disable(logging.WARNING)
    student = load("students", "smollm2-135m", Student)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = Path(os.environ.get("R1DISTILL_HOME") or folder)
        schema.write(folder / "rows" / "train", schema.TRAINING_ROW, rows(40))
        packing.build(student, folder / "rows", folder / "packs", home)
        words = AutoTokenizer.from_pretrained(folder / "packs" / "tokenizer")
        table = schema.read(folder / "packs" / "train", schema.PACK)
        packs = schedule.Packs(table, words.pad_token_id)
        steps = schedule.order(len(packs), PER_STEP, 1, seed=0)[:STEPS]
        layout = Layout(checkpointing=False)
        weights = models.materialise(student.base, home)
        places = schedule.places(steps, PER_STEP, layout)
        meter = tracking.Meter(student.architecture, packs, places, layout=layout, adapter=False)
        data = load_from_disk(str(folder / "packs" / "train"))

        def model() -> Any:
            return base.load_to_train(student, weights, words, layout)

        settings = trainer.arguments(student.sft, layout, folder / "ours", PER_STEP, "bench")
        settings.save_strategy = "no"
        mine = trainer.trainer_class()(
            packs=packs,
            places=places,
            meter=meter,
            layout=layout,
            model=model(),
            args=settings,
            train_dataset=data,
            data_collator=trainer.collator(layout, words.pad_token_id),
            processing_class=words,
            callbacks=[trainer.progress(meter)],
        )
        same = {key: getattr(settings, key) for key in ("learning_rate", "optim", "bf16", "use_cpu", "seed")}
        order = [pack for step in steps for pack in step]
        theirs = SFTTrainer(
            model=model(),
            args=SFTConfig(
                output_dir=str(folder / "theirs"),
                dataset_kwargs={"skip_prepare_dataset": True},
                max_length=None,
                packing=False,
                padding_free=True,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=PER_STEP,
                num_train_epochs=1,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                **same,
            ),
            train_dataset=data.select(order).select_columns(["input_ids", "labels", "seq_lengths"]),
            processing_class=words,
        )
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS + 1):
            for who, training in (("ours", mine), ("theirs", theirs)):
                began = time.perf_counter()
                training.train()
                seconds[who].append((time.perf_counter() - began) / len(steps))
        tokens = int(meter.tokens.sum()) / len(steps)
        best = {who: min(taken[1:]) for who, taken in seconds.items()}
    yield {
        "what": "one training step of smollm2-135m on the CPU",
        "ours": tokens / best["ours"],
        "peer": tokens / best["theirs"],
        "unit": "tokens/s",
        "peer_name": "TRL's SFTTrainer",
        "goal": 0.97,
        "note": f"({tokens:,.0f} tokens, {torch.get_num_threads()} threads)",
    }
