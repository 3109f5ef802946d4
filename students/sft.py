"""Supervised fine-tuning with TRL under accelerate: full or LoRA, resumable, ending in a bf16 checkpoint.

``build`` runs this very module as a worker; ``main`` is what the worker does. Packed traces stay apart because position
ids restart with each of them and no attention mask is given. Master weights and optimiser states are float32.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data import models, schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.students import worker
from r1distill.students.catalogue import Launch, LoraMethod, Sft, Student
from tqdm import tqdm

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

GOOD = "GOOD"  # written into a checkpoint once all of it is on disk


def build(student: Student, packs: Path, out: Path, home: Path) -> Result:
    """Train on ``packs`` and write the checkpoint: safetensors, tokenizer, loss.json, loss.png, for LoRA adapter/."""
    train = schema.read(packs / "train", schema.PACK)
    if not train.num_rows:
        raise RequestError(f"{packs} holds no training packs: every trace was rejected. Its manifest says why.")
    traces = sum(len(row["members"]) for row in schema.rows(train, ["members"]))
    job = {
        "student": student.model_dump(mode="json"),
        "base": str(models.materialise(student.base, home)),
        "packs": str(packs),
        "out": str(out),
        "accumulate": accumulation(student.sft, train.num_rows, traces),
    }
    told: dict[str, Any] = {}
    launcher = ["accelerate.commands.launch", *launch_arguments(student.sft.launch)]
    with tqdm(desc=f"training {student.name}", unit="step", disable=None, delay=2) as bar:
        for told in worker.run("r1distill.students.sft", job, out / ".work", launcher=launcher):
            if "step" in told:
                bar.total, bar.n = told["steps"], told["step"]
                bar.set_postfix_str(f"loss {told['loss']:.3f}, {told['tokens_per_second']:.0f} tokens/s")
                bar.refresh()
    if "metrics" not in told:
        raise R1DistillError(f"the training ended without a word; see {out / '.work' / 'sft.log'}.")
    return Result(traces, traces, {}, told["metrics"], unit="traces")


def accumulation(sft: Sft, packs: int, traces: int) -> int:
    """Packs a process takes a step, so that a step holds ``batch_traces`` traces on average."""
    return max(1, round(sft.batch_traces * packs / traces / sft.launch.processes))


def launch_arguments(launch: Launch) -> list[str]:
    """The command line of `accelerate launch`, up to the module."""
    if launch.config_file:
        return ["--config_file", launch.config_file]
    options = {"num_processes": launch.processes, "num_machines": 1, "dynamo_backend": "no", **launch.options}
    options.setdefault("mixed_precision", "no")  # SFTConfig says it
    if launch.processes > 1:
        options.setdefault("multi_gpu", True)
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items() if value is not False]


# What follows runs in the worker.


def main() -> None:
    """Train as the job says, resuming from the last checkpoint that was written whole."""
    job = worker.begin()
    import torch
    from datasets import load_from_disk
    from r1distill.students import base
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    student, out, packs = Student.model_validate(job["student"]), Path(job["out"]), Path(job["packs"])
    tokenizer = AutoTokenizer.from_pretrained(packs / "tokenizer")
    model = base.load(student.architecture, Path(job["base"]), tokenizer, torch.float32)
    validation = load_from_disk(str(packs / "validation")) if (packs / "validation").is_dir() else None
    progress = _progress()
    trainer = SFTTrainer(
        model=model,
        args=arguments(student.sft, out / ".work" / "checkpoints", job["accumulate"]),
        train_dataset=load_from_disk(str(packs / "train")),
        eval_dataset=validation if validation else None,
        processing_class=tokenizer,
        peft_config=lora(student, tokenizer) if isinstance(student.sft.method, LoraMethod) else None,
        callbacks=[progress],
    )
    trainer.train(resume_from_checkpoint=last_good(out / ".work" / "checkpoints"))
    if validation:
        trainer.evaluate()
    _save(trainer, student, tokenizer, Path(job["base"]), out)
    if trainer.is_world_process_zero():
        history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
        write_curve(history, out)
        worker.tell(metrics=_metrics(trainer, history, progress.tokens_per_second))


def arguments(sft: Sft, folder: Path, accumulate: int) -> SFTConfig:
    """TRL's settings for packs of ours: one a micro-batch, nothing prepared, padded or truncated."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        # data
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=True,
        max_length=None,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=accumulate,
        # optimisation
        num_train_epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": sft.min_lr_ratio},
        warmup_steps=sft.warmup_ratio,
        weight_decay=sft.weight_decay,
        adam_beta1=sft.betas[0],
        adam_beta2=sft.betas[1],
        max_grad_norm=sft.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=sft.precision == "bf16_autocast",
        gradient_checkpointing=sft.gradient_checkpointing,
        seed=sft.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        # checkpoints and reports
        save_steps=sft.save_steps,
        save_total_limit=2,  # the one before the last stays until the last is whole
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def lora(student: Student, tokenizer: PreTrainedTokenizerFast) -> LoraConfig:
    """LoRA on every linear layer of the blocks, and whole rows of both embeddings for the renamed tokens."""
    from peft import LoraConfig
    from r1distill.students.template import TEMPLATES, renamed_rows

    method = student.sft.method
    assert isinstance(method, LoraMethod)
    rows = renamed_rows(TEMPLATES[student.template], tokenizer) if method.train_renamed_rows else []
    places = ["embed_tokens"] if student.architecture.tied else ["embed_tokens", "lm_head"]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear",
        trainable_token_indices=dict.fromkeys(places, rows) if rows else None,
    )


def last_good(folder: Path) -> str | None:
    """The newest checkpoint that was written whole, or None; what was cut off while being written is deleted."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / GOOD).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _progress() -> Any:
    """A callback that tells progress and marks whole checkpoints; its class is made here, as it needs transformers."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        tokens_per_second = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                self.tokens_per_second = logs["num_tokens"] / (time.monotonic() - self.began)
                told = {"loss": logs["loss"], "tokens_per_second": self.tokens_per_second}
                worker.tell(step=state.global_step, steps=state.max_steps, **told)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                for file in checkpoint.iterdir():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                (checkpoint / GOOD).touch()

    return Progress()


def _save(trainer: Any, student: Student, tokenizer: PreTrainedTokenizerFast, base: Path, out: Path) -> None:
    """The final weights in bf16 with tokenizer and generation settings; a LoRA adapter is kept and merged."""
    import torch
    from r1distill.students.merge import merge

    if isinstance(student.sft.method, LoraMethod):
        trainer.save_model(str(out / "adapter"))
        if trainer.is_world_process_zero():
            merge(student.architecture, base, out / "adapter", tokenizer, out)
        return
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered where it is sharded
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.config.dtype = torch.bfloat16
        model.config.use_cache = True
        model.save_pretrained(out, state_dict={name: tensor.to(torch.bfloat16) for name, tensor in state.items()})
        tokenizer.save_pretrained(out)


def _metrics(trainer: Any, history: list[dict[str, float]], tokens_per_second: float) -> dict[str, Any]:
    losses = [row["loss"] for row in history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "packs_per_step": trainer.args.gradient_accumulation_steps * trainer.args.world_size,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
        "tokens_per_second": round(tokens_per_second, 1),
    }


def write_curve(history: list[dict[str, float]], out: Path) -> None:
    """The loss of every step as numbers (loss.json) and as a picture (loss.png)."""
    (out / "loss.json").write_text(json.dumps(history, indent=1))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for key, style in (("loss", "-"), ("eval_loss", "o")):
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label={"loss": "training", "eval_loss": "validation"}[key])
    axes.set(xlabel="step", ylabel="loss (nats per target token)")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    main()
