"""Supervised fine-tuning with TRL under accelerate: full or LoRA, resumable, ending in a bf16 checkpoint.

``build`` runs this very module as a worker; ``main`` is what the worker does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from tqdm import tqdm

from r1distill.data import models, schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.students import checkpoints, layout, schedule, tracking, worker
from r1distill.students.base import SHARD_SIZE
from r1distill.students.catalogue import Adapter, Sft, Student
from r1distill.students.layout import Layout
from r1distill.students.schedule import Packs


def build(
    student: Student, packs: Path, out: Path, home: Path, spread: Layout, *, logits: Path | None = None
) -> Result:
    """Train on ``packs`` and write the checkpoint: safetensors, tokenizer, loss.json, loss.png; for LoRA also adapter/.

    ``spread`` says over which processes; ``logits`` is where a teacher's top-k lies for a student that learns from it.
    Rows are traces. A run that was cut off goes on from its last whole checkpoint, which lies in ``out/.work``.
    """
    layout.check(spread, student)
    tracking.check_tracker(student.sft.tracking)
    if logits and spread.sequence_parallel > 1:
        raise RequestError("a student with 'distill' can't be trained with sequence_parallel over 1: leave one out.")
    train = schema.read(packs / "train", schema.PACK)
    if not train.num_rows:
        raise RequestError(f"{packs} holds no training packs: every trace was rejected. Its manifest says why.")
    traces = sum(pc.sum(pc.list_value_length(chunk)).as_py() for chunk in train["members"].chunks)
    job = {
        "student": student.model_dump(mode="json"),
        "base": str(models.materialise(student.base, home)),
        "packs": str(packs),
        "out": str(out),
        "logits": str(logits) if logits else None,
        "tracking": str(home / "tracking" / out.name.removeprefix(".").removesuffix(".partial")),
        "layout": spread.model_dump(mode="json"),
        "packs_per_step": packs_per_step(student.sft, train.num_rows, traces),
    }
    told = launched("r1distill.students.sft", job, out / ".work", student, spread)
    batch = {"batch_traces": student.sft.batch_traces, "packs_per_step": job["packs_per_step"]}
    return Result(traces, traces, {}, {**told["metrics"], **batch, "layout": str(spread)}, unit="traces")


def launched(module: str, job: dict[str, Any], work: Path, student: Student, spread: Layout) -> dict[str, Any]:
    """Train in workers of ``module``, over the processes of ``spread``, with a progress bar; returns what the last
    message told. Raises R1DistillError where that has no metrics, and what ``check_states`` does."""
    check_states(spread, work)
    config = layout.write(spread, student.sft, work / "launch")
    cores, options = len(os.sched_getaffinity(0)), student.sft.launch
    launchers = [
        ["accelerate.commands.launch", *layout.launch_arguments(spread, options, config, rank, cores)]
        for rank in range(spread.nodes)
    ]
    told: dict[str, Any] = {}
    with tqdm(desc=f"training {student.name}", unit="step", disable=None, delay=2) as bar:
        for told in worker.run(module, job, work, launchers=launchers, hosts=spread.hosts):
            if "step" in told:
                bar.total, bar.n = told["steps"], told["step"]
                bar.set_postfix_str(f"loss {told['loss']:.3f}, {told['tokens_per_second']:.0f} tokens/s")
    if "metrics" not in told:
        raise R1DistillError(f"the training ended without a result; {work / module.rpartition('.')[2]}.log says more.")
    return told


def check_states(spread: Layout, work: Path) -> None:
    """Note in which layout the checkpoints in ``work`` are written.

    Raises RequestError where there are some of another layout that this one can't go on from: transformers would take
    what it finds, perhaps the weights alone, and begin optimiser and learning rate anew without a word.
    """
    file, saved = work / "layout.json", work / "checkpoints"
    if file.is_file() and checkpoints.whole(saved):
        before, step = Layout.model_validate_json(file.read_bytes()), checkpoints.number(checkpoints.whole(saved)[-1])
        if before.states != spread.states:
            raise RequestError(
                f"this training is at step {step} by {before}, and {spread} can't go on from its states. Take the "
                f"hardware and student.sft.launch that it had, or delete {saved} to train from the beginning."
            )
    work.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(spread.model_dump_json(), encoding="utf-8")
    unfinished.rename(file)


def packs_per_step(sft: Sft, packs: int, traces: int) -> int:
    """Whole packs that hold ``batch_traces`` traces on average: the same for every layout."""
    return max(1, round(sft.batch_traces * packs / traces))


def main(job: dict[str, Any]) -> None:
    """In the worker: train as the job says, resuming from the last whole checkpoint."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    from r1distill.students import attention, base, kd, topk, trainer

    student, out, packs = Student.model_validate(job["student"]), Path(job["out"]), Path(job["packs"])
    spread, per_step, adapter = Layout.model_validate(job["layout"]), job["packs_per_step"], adapter_of(student)
    folder = out / ".work" / "checkpoints"
    tokenizer = AutoTokenizer.from_pretrained(packs / "tokenizer")
    pad = tokenizer.pad_token_id
    data = Packs(schema.read(packs / "train", schema.PACK), pad)
    steps = schedule.order(len(data), per_step, student.sft.epochs, student.sft.seed)
    places = schedule.places(steps, per_step, spread)
    meter = tracking.Meter(student.architecture, data, places, layout=spread, adapter=bool(adapter))
    attention.register()
    os.environ.update({**tracking.environment(Path(job["tracking"])), **os.environ})
    # Before the model: under ZeRO-3 they make weights come sharded as they are loaded.
    settings = trainer.arguments(student.sft, spread, folder, spread.rounds(per_step), Path(job["tracking"]).name)
    make, together = trainer.trainer_class, trainer.collator(spread, pad, settings.process_index)
    if job["logits"]:
        assert student.distill
        rows = topk.TopK(Path(job["logits"]) / "train", data.table)
        make, together = (
            partial(kd.trainer_class, student.distill, student.architecture.vocab),
            kd.with_rows(together, rows),
        )
    training = make()(
        packs=data,
        places=places,
        meter=meter,
        layout=spread,
        model=base.load_to_train(student, Path(job["base"]), tokenizer, spread),
        args=settings,
        train_dataset=load_from_disk(str(packs / "train")),
        data_collator=together,
        processing_class=tokenizer,
        peft_config=trainer.lora(student, tokenizer) if adapter else None,
        callbacks=[trainer.progress(meter)],
    )
    training.train(resume_from_checkpoint=last_good(folder, training))
    if (packs / "validation").is_dir() and (held := schema.read(packs / "validation", schema.PACK)).num_rows:
        training.validate(Packs(held, pad))
    save(training, student, Path(job["base"]), packs / "tokenizer", out)
    if training.is_world_process_zero():
        history = [row for row in training.state.log_history if "loss" in row or "eval_loss" in row]
        write_curve(history, out)
        worker.tell(metrics=_metrics(training, history, meter))


def adapter_of(student: Student) -> Adapter | None:
    return student.sft.method if isinstance(student.sft.method, Adapter) else None


def last_good(folder: Path, training: Any) -> str | None:
    """The checkpoint to go on from; one process looks, since what is not whole is deleted."""
    from accelerate.utils import broadcast_object_list

    found = [checkpoints.last_good(folder) if training.is_world_process_zero() else None]
    return str(found[0]) if broadcast_object_list(found)[0] else None


def save(training: Any, student: Student, base: Path, tokenizer: Path, out: Path) -> None:
    """The final weights in bf16, generation settings and tokenizer; a LoRA adapter is kept and merged."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # one process alone loads no shards

    from r1distill.students.merge import merge

    if adapter_of(student):
        if training.is_fsdp_enabled:  # sharded, the trainer would save no adapter at all
            training.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        training.save_model(str(out / "adapter"))
        unset_hf_deepspeed_config()
        if training.is_world_process_zero():
            _tidy(out / "adapter", models.title(student.base))
            merge(student.architecture, base, out / "adapter", tokenizer, out)
        return
    state = training.accelerator.get_state_dict(training.model_wrapped)  # gathered where it is sharded
    unset_hf_deepspeed_config()
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


def _metrics(training: Any, history: list[dict[str, float]], meter: tracking.Meter) -> dict[str, Any]:
    losses = [row["loss"] for row in history if "loss" in row]
    steps = training.state.global_step
    return {
        "steps": steps,
        **({"resumed_from_step": meter.first} if meter.first else {}),
        "tokens": int(meter.tokens[:steps].sum()),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "validation_loss": next((row["eval_loss"] for row in reversed(history) if "eval_loss" in row), None),
        "tokens_per_second": round(meter.mean_tokens_per_second(steps), 1),
        **tracking.summary(history, meter),
    }


CURVES = {"loss": ("-", "training"), "eval_loss": ("o", "validation")}


def write_curve(
    history: list[dict[str, float]],
    out: Path,
    curves: Mapping[str, tuple[str, str]] = CURVES,
    title: str = "loss (nats per target token)",
) -> None:
    """What was told of every step as numbers (loss.json) and its ``curves`` as a picture (loss.png)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (out / "loss.json").write_text(json.dumps(history, indent=1))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for key, (style, label) in curves.items():
        if points := [(row["step"], row[key]) for row in history if key in row]:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel=title)
    axes.legend()
    figure.savefig(out / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


if __name__ == "__main__":
    worker.perform(main)
