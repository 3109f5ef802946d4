"""Peak memory of one distillation step, ours beside TRL's two trainers: GKD, which holds whole logits of student and
teacher, and the stable DistillationTrainer, which tiles them.

Each trainer takes one real optimiser step through its own ``train()`` in a process of its own: one sequence of T = 4,096
tokens, all of them targets, V = 152,064, the same tiny student (two layers of 64: what is measured is the loss) in the
same precision, bf16 autocast over float32 weights. Peak memory is the high-water mark of the process's resident set
(VmHWM, reset when the step begins) less what was resident then: models, libraries and a step of 16 tokens that warmed
up. Ours reads its teacher's top-k from the files of the stage ``logits``; TRL's run the teacher beside the student, an
equally tiny one. What DistillationTrainer would generate first is given to it: generating costs it memory of its own.
A step that wants more than the machine has free is stopped where it asks for it, and what it held by then counts: its
figure is then a lower bound, and the note says so.
"""

from __future__ import annotations

import gc
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOKENS, VOCAB, K, WARM_UP = 4096, 152_064, 64, 16
FREE_SHARE = 0.7  # of the free memory that a step may take
LOW = 1000  # the sequence's tokens are below, the teacher's top-k above: rows are checked to stand with their labels
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "vocab_size": VOCAB, "tie_word_embeddings": True, "max_position_embeddings": 8192,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ALIKE = {"learning_rate": 1e-4, "optim": "adamw_torch_fused", "bf16": True, "use_cpu": True, "report_to": "none",
         "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
         "per_device_train_batch_size": 1, "max_steps": 1, "remove_unused_columns": False}  # fmt: skip


def model(seed: int) -> Any:
    """A tiny Llama with the large vocabulary, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), dtype=torch.float32)


def tokenizer() -> Any:
    """Hardly any words: the trainers want one, and read no text with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "x": 3}, unk_token="x"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sequence(tokens: int) -> Any:
    """(tokens + 1,) ids: the first is given, the others are predicted."""
    import torch

    return torch.randint(3, LOW, (tokens + 1,), generator=torch.Generator().manual_seed(tokens))


def gkd(tokens: int, folder: Path) -> Any:
    import torch
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ids = sequence(tokens)[None]
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    batch["labels"][:, 0] = -100
    # lmbda 0: it learns from the text that it is given; beta 0: by the forward KL, as ours does
    settings = GKDConfig(output_dir=str(folder), lmbda=0.0, beta=0.0, max_length=None, **ALIKE)
    return GKDTrainer(
        model=model(0),
        teacher_model=model(1),
        args=settings,
        data_collator=lambda rows: {name: value.clone() for name, value in batch.items()},
        train_dataset=Dataset.from_dict({"row": [0]}),
        processing_class=tokenizer(),
    )


def chunked(tokens: int, folder: Path) -> Any:
    import torch
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    ids = sequence(tokens)[None]

    class Given(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            masks = {"prompt_mask": torch.ones_like(ids[:, :1]), "completion_mask": torch.ones_like(ids[:, 1:])}
            return {"prompt_ids": ids[:, :1], "completion_ids": ids[:, 1:], **masks,
                    "num_items_in_batch": torch.tensor(float(tokens))}  # fmt: skip

    settings = DistillationConfig(output_dir=str(folder), beta=0.0, max_completion_length=tokens, **ALIKE)
    return Given(
        model=model(0),
        teacher_model=model(1),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["x"]}),
        processing_class=tokenizer(),
    )


def ours(tokens: int, folder: Path) -> Any:
    import numpy as np
    from datasets import load_from_disk

    from r1distill.data import schema
    from r1distill.data.config import load
    from r1distill.students import kd, schedule, topk, tracking, trainer
    from r1distill.students.catalogue import Distill, Student
    from r1distill.students.layout import Layout

    ids = sequence(tokens).tolist()
    member = {"prompt_id": "p", "sample": 0, "domain": "math"}
    pack = {"input_ids": ids, "labels": [-100, *ids[1:]], "seq_lengths": [len(ids)], "members": [member]}
    schema.write(folder / "packs", schema.PACK, [pack])
    table = schema.read(folder / "packs", schema.PACK)
    draw = np.random.default_rng(0)
    its_ids = LOW + (draw.integers(0, VOCAB - LOW, (tokens, 1)) + 997 * np.arange(K)) % (VOCAB - LOW)
    logprobs = np.log(draw.dirichlet(np.ones(K + 1), tokens)[:, :K])
    topk.write(folder / "rows", 0, 0, table, K, iter([(its_ids, logprobs, np.full(tokens, -9.0))]))
    whole = load("students", "smollm2-135m", Student)
    student = whole.model_copy(update={"architecture": whole.architecture.model_copy(update={"vocab": VOCAB})})
    distill = Distill.model_validate({"kind": "topk_kl", "teacher": {"kind": "folder", "path": "."}, "k": K})
    packs, layout = schedule.Packs(table, 0), Layout(checkpointing=False)
    places = schedule.places([[0]], 1, layout)
    meter = tracking.Meter(student.architecture, packs, places, layout=layout, adapter=False)
    settings = trainer.arguments(student.sft, layout, folder / "checkpoints", 1, "bench")
    settings.save_strategy = "no"
    return kd.trainer_class(distill, VOCAB)(
        packs=packs,
        places=places,
        meter=meter,
        layout=layout,
        model=model(0),
        args=settings,
        train_dataset=load_from_disk(str(folder / "packs")),
        data_collator=kd.with_rows(trainer.collator(layout, 0), topk.TopK(folder / "rows", table)),
        processing_class=tokenizer(),
        callbacks=[trainer.progress(meter)],
    )


KINDS: dict[str, Callable[[int, Path], Any]] = {"ours": ours, "gkd": gkd, "chunked": chunked}


def kernel_says(name: str, file: str = "/proc/self/status") -> int:
    """Bytes of VmRSS, VmHWM, VmSize or MemAvailable."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())[1])  # type: ignore[index]


def step(kind: str) -> None:
    """In a process of its own: one step, and how much memory it took at most."""
    import logging

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        KINDS[kind](WARM_UP, Path(name) / "warm-up").train()
        training = KINDS[kind](TOKENS, Path(name) / "step")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = kernel_says("VmRSS")
        free = int(FREE_SHARE * kernel_says("MemAvailable", "/proc/meminfo"))
        resource.setrlimit(resource.RLIMIT_AS, (kernel_says("VmSize") + free, resource.RLIM_INFINITY))
        try:
            training.train()
            whole = True
        except RuntimeError as error:
            if "allocate" not in str(error):
                raise
            whole = False
        peak = kernel_says("VmHWM") - before
    losses = [row["loss"] for row in training.state.log_history if "loss" in row]
    assert losses or not whole
    print(json.dumps({"bytes": peak, "whole": whole, "losses": losses}))


def measure() -> Iterator[dict[str, Any]]:
    found = {}
    for kind in KINDS:
        command = [sys.executable, "-P", str(Path(__file__)), kind]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[kind] = json.loads(out.splitlines()[-1])
    gib = {kind: one["bytes"] / 2**30 for kind, one in found.items()}
    shape = f"T = {TOKENS:,}, V = {VOCAB:,}, k = {K}, bf16 autocast"
    for kind, peer, goal in (("gkd", "TRL's GKDTrainer", 3.0), ("chunked", "TRL's DistillationTrainer", 1.0)):
        yield {
            "what": "top-k distillation: tokens of a training step a GiB of peak memory",
            "ours": TOKENS / gib["ours"],
            "peer": TOKENS / gib[kind],
            "unit": "tokens/GiB",
            "peer_name": peer,
            "goal": goal,
            "note": f"{shape}: {gib['ours']:.2f} GiB beside {gib[kind]:.2f}"
            + ("" if found[kind]["whole"] else ", which is where it was out of memory: it needs more"),
        }


if __name__ == "__main__":
    step(sys.argv[1])
