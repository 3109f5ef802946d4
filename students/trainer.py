"""TRL's trainer for packs of ours: settings, collator, loss, checkpoints that are known to be whole.

Packed traces stay apart because position ids restart with each of them and no attention mask is given. Master weights
and optimiser states are float32. Runs in the worker of ``sft``.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.students import worker
from r1distill.students.catalogue import Adapter, Sft, Student
from r1distill.students.layout import Layout
from r1distill.students.template import IGNORE, TEMPLATES, renamed_rows

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

GOOD = "GOOD"  # written into a checkpoint once all of it is on disk


def collate(packs: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Packs as rows of one batch: input_ids, labels, and position_ids that restart with every member; each (B, T).

    No attention mask: transformers keeps members apart by the restarts alone, and a mask of ones would mix them.
    """
    import torch

    width = max(len(pack["input_ids"]) for pack in packs)

    def rows(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    return {
        "input_ids": rows([pack["input_ids"] for pack in packs], pad),
        "labels": rows([pack["labels"] for pack in packs], IGNORE),
        "position_ids": rows([[place for size in pack["seq_lengths"] for place in range(size)] for pack in packs], 0),
    }


def complete_head(model: Any) -> None:
    """Give the output embedding a bias of None where peft's wrapper of single rows has none: TRL's head reads it."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def trainer_class() -> Any:
    """SFTTrainer that on the CPU makes logits at target positions alone; TRL's fused head there makes them at all."""
    import torch
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            complete_head(self.model)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if return_outputs or inputs["input_ids"].device.type != "cpu":
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]
            targets = labels != IGNORE
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][:, :-1][targets],))
            try:  # (N, vocabulary), N the number of targets
                logits = model(inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
            finally:
                hook.remove()
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[targets], reduction="sum")
            if num_items_in_batch is None:
                return loss / targets.sum().clamp(min=1)
            return loss / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged over processes

    return Trainer


def arguments(sft: Sft, layout: Layout, folder: Path, accumulate: int) -> SFTConfig:
    """TRL's settings; the packs are taken as they are."""
    import torch
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder),
        # data
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        max_length=None,
        per_device_train_batch_size=layout.packs_per_batch,
        per_device_eval_batch_size=layout.packs_per_batch,
        gradient_accumulation_steps=accumulate,
        dataloader_pin_memory=torch.cuda.is_available(),
        # optimisation
        num_train_epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": sft.min_lr_ratio},
        warmup_steps=sft.warmup_ratio,  # under 1 it is a share of all steps
        weight_decay=sft.weight_decay,
        adam_beta1=sft.betas[0],
        adam_beta2=sft.betas[1],
        max_grad_norm=sft.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=sft.precision == "bf16_autocast",
        gradient_checkpointing=layout.checkpointing,
        seed=sft.seed,
        use_cpu=not torch.cuda.is_available(),
        # checkpoints and reports
        save_steps=sft.save_steps,
        save_total_limit=2,  # the one before the last stays until the last is whole
        logging_steps=1,
        include_num_input_tokens_seen="all",
        report_to="none",
        disable_tqdm=True,
    )


def lora(student: Student, tokenizer: PreTrainedTokenizerFast) -> LoraConfig:
    """LoRA on every linear layer of the blocks, and whole rows of both embeddings for the renamed tokens."""
    from peft import LoraConfig

    method = student.sft.method
    assert isinstance(method, Adapter)
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


def progress() -> Any:
    """A callback that tells progress and marks whole checkpoints; its class is made here, as it needs transformers."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        tokens_per_second = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began, self.seen = time.monotonic(), state.num_input_tokens_seen

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                self.tokens_per_second = (state.num_input_tokens_seen - self.seen) / (time.monotonic() - self.began)
                told = {"loss": logs["loss"], "tokens_per_second": self.tokens_per_second}
                worker.tell(step=state.global_step, steps=state.max_steps, **told)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # the final weights are written right away

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                for file in checkpoint.iterdir():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
                (checkpoint / GOOD).touch()

    return Progress()
