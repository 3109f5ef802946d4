"""The stage beyond: the trained student answers prompts and learns from its own answers, with TRL's GRPO or on-policy
distillation.

``build`` runs this very module as workers; ``main`` is what one does. It starts from the checkpoint (an adapter goes on
where it stood), and ends in one of the same form.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1distill.data import models, schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.result import Result
from r1distill.data.settings import VerdictSettings
from r1distill.students import checkpoints, layout, onpolicy, rollouts, sft, tracking, worker
from r1distill.students.catalogue import OnPolicy, Student
from r1distill.students.layout import Layout
from r1distill.students.template import TOKENIZER_FILES

TRACKED = {"correctness": 1.0, "format": 1.0}  # what is told of the answers where nothing is rewarded
CURVES = {
    "loss": ("-", "loss"),
    "rewards/correctness/mean": ("-", "right answers, share"),
    "completions/clipped_ratio": ("-", "cut off, share"),
}


def build(
    student: Student,
    prompts: Path,
    checkpoint: Path,
    out: Path,
    home: Path,
    spread: Layout,
    *,
    rules: VerdictSettings,
    instruction: str | dict[str, str],
    validation_share: float,
) -> Result:
    """Train ``checkpoint`` on its own answers and write the next one, as ``sft`` does; ``rollouts`` holds the answers.

    Rows are prompts: kept are those that were asked. ``rules`` judge the answers. A run that was cut off goes on from
    its last whole checkpoint. Raises RequestError where the ``spread`` can't carry it.
    """
    settings = student.beyond
    assert settings
    check(student, spread)
    tracking.check_tracker(student.sft.tracking)
    tokenizer = out / ".work" / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for pattern in TOKENIZER_FILES:
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, tokenizer / file.name)
    base = models.materialise(student.base, home) if sft.adapter_of(student) else checkpoint
    teacher = models.materialise(settings.teacher, home) if isinstance(settings, OnPolicy) else None
    job = {
        "student": student.model_dump(mode="json"),
        "base": str(base),
        "checkpoint": str(checkpoint),
        "tokenizer": str(tokenizer),
        "teacher": str(teacher) if teacher else None,
        "prompts": str(prompts),
        "out": str(out),
        "tracking": str(home / "tracking" / out.name.removeprefix(".").removesuffix(".partial")),
        "layout": spread.model_dump(mode="json"),
        "rules": rules.model_dump(mode="json"),
        "instruction": instruction,
        "validation_share": validation_share,
    }
    told = sft.launched("r1distill.students.beyond", job, out / ".work", student, spread)
    asked, rejected = told["metrics"].pop("prompts"), told["metrics"].pop("rejected")
    read = schema.read(prompts, schema.PROMPT).num_rows
    who = {"teacher": models.title(settings.teacher)} if isinstance(settings, OnPolicy) else {}
    return Result(read, asked, rejected, {**told["metrics"], **who, "layout": str(spread)}, unit="prompts")


def check(student: Student, spread: Layout) -> None:
    """Raise RequestError where the processes of ``spread`` can't carry the stage."""
    settings = student.beyond
    assert settings
    layout.check(spread, student)
    if spread.sequence_parallel > 1:
        raise RequestError(
            f"the stage beyond can't cut sequences over {spread.sequence_parallel} processes: TRL's trainers for it "
            "lay their answers out themselves. Set student.sft.launch.sequence_parallel to 1."
        )
    answers = settings.answers_per_step
    if answers % spread.processes:
        raise RequestError(
            f"{spread.processes} processes can't share out {answers} answers a step evenly: set "
            "student.beyond.prompts_per_step (or group_size) so that they do."
        )
    if settings.rollouts == "vllm" and spread.cpu:
        raise RequestError("beyond.rollouts vllm shares the training's GPUs, and there are none: take transformers.")


def main(job: dict[str, Any]) -> None:
    """In the worker: train as the job says, resuming from the last whole checkpoint."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    student, out = Student.model_validate(job["student"]), Path(job["out"])
    settings = student.beyond
    assert settings
    # Answers are padded to one length under a mask, which our attention by borders does not read.
    spread = Layout.model_validate(job["layout"]).model_copy(update={"attention": "sdpa", "liger": False})
    folder, tokenizer = out / ".work" / "checkpoints", AutoTokenizer.from_pretrained(job["tokenizer"])
    table = schema.read(Path(job["prompts"]), schema.PROMPT)
    drawn, rejected = rollouts.draw(student, table, tokenizer, job["instruction"], job["validation_share"])
    if not drawn:
        raise R1DistillError(f"no prompt can be asked: {dict(rejected)}. Look at student.beyond and the prompts.")
    longest = max(len(row["prompt_ids"]) for row in drawn)
    tokens = settings.max_completion_tokens or student.packs.context_tokens - longest
    answers = settings.answers_per_step
    own = answers // spread.processes
    at_once = micro_batch(own, student.packs.context_tokens * spread.packs_per_batch, longest + tokens)
    os.environ.update({**tracking.environment(Path(job["tracking"])), **os.environ})
    # Before the model: under ZeRO-3 they make weights come sharded as they are loaded.
    told = {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": own // at_once,
        "max_completion_length": tokens,
    }
    args = arguments(student, spread, folder, Path(job["tracking"]).name, told)
    model = load(student, job, tokenizer, spread)
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [ends]
    args.generation_kwargs = {"stop_token_ids": ends} if settings.rollouts == "vllm" else None
    rules = VerdictSettings.model_validate(job["rules"])
    judge = rollouts.Judge(rules, tokenizer, ends, sharing=spread.processes_per_node)
    log = rollouts.Log(out / ".work" / "rollouts")
    more: dict[str, Any] = {}
    if isinstance(settings, OnPolicy):
        weights = TRACKED
        more["teacher_model"] = onpolicy.teacher(settings, model, Path(job["teacher"]), tokenizer, spread)
    else:
        weights = {str(check): weight for check, weight in settings.rewards.items()}
        more["reward_funcs"] = [rollouts.Reward(judge, check) for check in weights]
    training = onpolicy.trainer_class(settings)(
        order=rollouts.Order(
            len(drawn), settings.steps, settings.prompts_per_step, settings.group, own // at_once, settings.seed
        ),
        judge=judge,
        log=log,
        weights=weights,
        model=model,
        args=args,
        train_dataset=Dataset.from_list(drawn),
        processing_class=tokenizer,
        callbacks=[onpolicy.progress(answers)],
        **more,
    )
    good = sft.last_good(folder, training)
    first = checkpoints.number(Path(good)) if good else 0
    if training.is_world_process_zero():
        log.forget_after(first)
    training.accelerator.wait_for_everyone()
    began = time.monotonic()
    training.train(resume_from_checkpoint=good)
    seconds = time.monotonic() - began
    sft.save(training, student, Path(job["base"]), Path(job["tokenizer"]), out)
    if training.is_world_process_zero():
        counts = log.gather(out / "rollouts", settings.steps, answers)
        history = [row for row in training.state.log_history if "loss" in row]
        sft.write_curve(history, out, CURVES, title="loss, and shares of a step's answers")
        metrics = _metrics(history, counts, answers, first, seconds)
        worker.tell(metrics={"kind": settings.kind, **metrics, "prompts": len(drawn), "rejected": dict(rejected)})


def micro_batch(answers: int, tokens: int, longest: int) -> int:
    """How many of a process's answers are computed at once: those that fit into ``tokens``, an even share of all."""
    room = max(1, tokens // longest)
    return max(size for size in range(1, answers + 1) if answers % size == 0 and size <= room)


def arguments(student: Student, spread: Layout, folder: Path, name: str, told: dict[str, Any]) -> Any:
    """TRL's settings. GRPO's loss is the mean over all tokens of a step (DAPO's, arXiv 2503.14476), whatever process
    has them, its advantage is scaled by its group's deviation, and nothing holds it to the checkpoint (TRL's default).
    """
    from trl import DistillationConfig, GRPOConfig

    from r1distill.students import trainer

    settings = student.beyond
    assert settings
    changes = {"learning_rate": settings.learning_rate, "seed": settings.seed, "save_steps": settings.save_steps}
    told = {
        **trainer.common(student.sft.model_copy(update=changes), spread, folder, name),
        **told,
        "lr_scheduler_type": "constant",
        "temperature": settings.temperature,
    }
    if settings.rollouts == "vllm":
        told |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": student.packs.context_tokens}
    if isinstance(settings, OnPolicy):
        return DistillationConfig(**told, beta=settings.beta)
    weights = list(settings.rewards.values())
    return GRPOConfig(
        **told,
        num_generations=settings.group_size,
        reward_weights=weights,
        loss_type="dapo",
        scale_rewards="group",
        beta=0.0,
    )


def load(student: Student, job: dict[str, Any], tokenizer: Any, spread: Layout) -> Any:
    """The checkpoint to train on: its weights, or its adapter on the base; with its own settings of generation."""
    from peft import PeftModel
    from transformers import GenerationConfig

    from r1distill.students import base

    checkpoint = Path(job["checkpoint"])
    model: Any = base.load_to_train(student, Path(job["base"]), tokenizer, spread)
    model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    if sft.adapter_of(student):
        model.name_or_path = str(checkpoint)  # what vLLM loads: the base may tie what the student does not
        wide = spread.strategy != "zero3"  # which wants all weights in one precision
        model = PeftModel.from_pretrained(
            model, str(checkpoint / "adapter"), is_trainable=True, autocast_adapter_dtype=wide
        )
    return model


def _metrics(
    history: Sequence[Mapping[str, float]], counts: Mapping[str, int], answers: int, first: int, seconds: float
) -> dict[str, Any]:
    """Means of the first step and of the last; speed is of what this run generated and learned."""
    tokens = answers * sum(row["completions/mean_length"] for row in history[first:])
    named = {
        "loss": "loss",
        "right": "rewards/correctness/mean",
        "cut_off": "completions/clipped_ratio",
        "mean_tokens": "completions/mean_length",
    }
    return {
        "steps": len(history),
        **({"resumed_from_step": first} if first else {}),
        "answers": counts["answers"],
        "tokens": counts["tokens"],
        **{
            f"{place}_{name}": round(row[key], 6)
            for place, row in (("first", history[0]), ("last", history[-1]))
            for name, key in named.items()
            if key in row
        },
        "tokens_per_second": round(tokens / seconds, 1),
    }


if __name__ == "__main__":
    worker.perform(main)
