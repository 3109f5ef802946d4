"""Supervised fine-tuning with TRL under accelerate: full or LoRA, resumable, ending in a bf16 checkpoint.

``build`` runs this very module as a worker; ``main`` is what the worker does.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from r1distill.data import models, schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.students import layout, worker
from r1distill.students.base import SHARD_SIZE
from r1distill.students.catalogue import Adapter, Sft, Student
from r1distill.students.layout import Layout


def build(
    student: Student, packs: Path, out: Path, home: Path, spread: Layout, *, logits: Path | None = None
) -> Result:
    """Train on ``packs`` and write the checkpoint: safetensors, tokenizer, loss.json, loss.png; for LoRA also adapter/.

    ``spread`` says over which processes; ``logits`` is where a teacher's top-k lies for a student that learns from it.
    Rows are traces. A run that was cut off goes on from its last whole checkpoint, which lies in ``out/.work``.
    """
    train = schema.read(packs / "train", schema.PACK)
    if not train.num_rows:
        raise RequestError(f"{packs} holds no training packs: every trace was rejected. Its manifest says why.")
    traces = sum(len(row["members"]) for row in schema.rows(train, ["members"]))
    layout.check_heads(spread, student.architecture)
    if logits and spread.sequence_parallel > 1:
        raise RequestError("a student with 'distill' can't be trained with sequence_parallel over 1: leave one out.")
    job = {
        "student": student.model_dump(mode="json"),
        "base": str(models.materialise(student.base, home)),
        "packs": str(packs),
        "out": str(out),
        "logits": str(logits) if logits else None,
        "layout": spread.model_dump(mode="json"),
        "packs_per_step": packs_per_step(student.sft, train.num_rows, traces),
    }
    config = layout.write(spread, student.sft, out / ".work" / "launch")
    cores = len(os.sched_getaffinity(0))
    launcher = ["accelerate.commands.launch", *layout.launch_arguments(spread, student.sft.launch, config, 0, cores)]
    told: dict[str, Any] = {}
    with tqdm(desc=f"training {student.name}", unit="step", disable=None, delay=2) as bar:
        for told in worker.run("r1distill.students.sft", job, out / ".work", launcher=launcher):
            if "step" in told:
                bar.total, bar.n = told["steps"], told["step"]
                bar.set_postfix_str(f"loss {told['loss']:.3f}, {told['tokens_per_second']:.0f} tokens/s")
    if "metrics" not in told:
        raise R1DistillError(f"the training ended without a result; {out / '.work' / 'sft.log'} says more.")
    return Result(traces, traces, {}, told["metrics"], unit="traces")


def packs_per_step(sft: Sft, packs: int, traces: int) -> int:
    """Whole packs that hold ``batch_traces`` traces on average: the same for every layout."""
    return max(1, round(sft.batch_traces * packs / traces))


def main(job: dict[str, Any]) -> None:
    """In the worker: train as the job says, resuming from the last whole checkpoint."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    from r1distill.students import base, kd, topk, trainer

    student, out, packs = Student.model_validate(job["student"]), Path(job["out"]), Path(job["packs"])
    spread = Layout.model_validate(job["layout"])
    checkpoints = out / ".work" / "checkpoints"
    tokenizer = AutoTokenizer.from_pretrained(packs / "tokenizer")
    validation = load_from_disk(str(packs / "validation")) if (packs / "validation").is_dir() else None
    progress = trainer.progress()
    train, pad = load_from_disk(str(packs / "train")), tokenizer.pad_token_id
    args = trainer.arguments(student.sft, spread, checkpoints, spread.rounds(job["packs_per_step"]))
    collate: Any = partial(trainer.collate, pad=pad)
    make = trainer.trainer_class
    if job["logits"]:
        assert student.distill
        rows = topk.TopK(Path(job["logits"]) / "train", schema.read(packs / "train", schema.PACK))
        train, collate = kd.numbered(train), partial(kd.collate, pad=pad, rows=rows)
        make = partial(kd.trainer_class, student.distill, student.architecture.vocab)
        args.remove_unused_columns = False
    training = make()(
        model=base.load(student.architecture, Path(job["base"]), tokenizer, torch.float32),
        args=args,
        train_dataset=train,
        eval_dataset=validation or None,
        data_collator=collate,
        processing_class=tokenizer,
        peft_config=trainer.lora(student, tokenizer) if isinstance(student.sft.method, Adapter) else None,
        callbacks=[progress],
    )
    training.train(resume_from_checkpoint=trainer.last_good(checkpoints))
    if validation:
        training.evaluate()
    _save(training, student, Path(job["base"]), packs / "tokenizer", out)
    if training.is_world_process_zero():
        history = [row for row in training.state.log_history if "loss" in row or "eval_loss" in row]
        write_curve(history, out)
        worker.tell(metrics=_metrics(training, history, progress.tokens_per_second))


def _save(training: Any, student: Student, base: Path, tokenizer: Path, out: Path) -> None:
    """The final weights in bf16, generation settings and tokenizer; a LoRA adapter is kept and merged."""
    import torch
    from transformers import AutoModelForCausalLM

    from r1distill.students.merge import merge

    if isinstance(student.sft.method, Adapter):
        training.save_model(str(out / "adapter"))
        if training.is_world_process_zero():
            _tidy(out / "adapter", models.title(student.base))
            merge(student.architecture, base, out / "adapter", tokenizer, out)
        return
    state = training.accelerator.get_state_dict(training.model_wrapped)  # gathered where it is sharded
    if training.is_world_process_zero():
        trained = training.accelerator.unwrap_model(training.model)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(trained.config, dtype=torch.bfloat16)
        model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in state.items()}, assign=True)
        model.tie_weights()
        model.config.use_cache = True
        model.generation_config = trained.generation_config
        model.save_pretrained(out, max_shard_size=SHARD_SIZE)
        shutil.copytree(tokenizer, out, dirs_exist_ok=True)


def _tidy(adapter: Path, base: str) -> None:
    """Leave the adapter's weights and settings alone, the base named by its title and not by a path of this machine."""
    for file in adapter.iterdir():
        if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
            file.unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _metrics(training: Any, history: list[dict[str, float]], tokens_per_second: float) -> dict[str, Any]:
    losses = [row["loss"] for row in history if "loss" in row]
    args = training.args
    return {
        "steps": training.state.global_step,
        "packs_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "tokens": training.state.num_input_tokens_seen,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
        "tokens_per_second": round(tokens_per_second, 1),
    }


def write_curve(history: list[dict[str, float]], out: Path) -> None:
    """The loss of every step as numbers (loss.json) and as a picture (loss.png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (out / "loss.json").write_text(json.dumps(history, indent=1))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for key, style, label in (("loss", "-", "training"), ("eval_loss", "o", "validation")):
        if points := [(row["step"], row[key]) for row in history if key in row]:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    worker.perform(main)
