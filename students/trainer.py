"""TRL's trainer for packs of ours: settings, collator, loss, and the hooks of saving and telling.

Packed traces stay apart because position ids restart with each of them and no attention mask is given. Master weights
and optimiser states are float32. The loss is the mean over the target tokens of the whole step, whoever computed them.
Runs in the worker of ``sft``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r1distill.students import checkpoints, tracking, worker
from r1distill.students.catalogue import Adapter, Sft, Student
from r1distill.students.layout import Layout
from r1distill.students.schedule import Packs, Places, places
from r1distill.students.template import IGNORE, TEMPLATES, renamed_rows

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig


def collate(packs: list[dict[str, Any]], pad: int, *, flat: bool = False, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Packs as one batch: input_ids, labels, and position_ids that restart with every member; each (B, T).

    ``flat`` lays the packs end to end in a single row, up to a ``multiple`` of its length; else each is a row.
    No attention mask: transformers keeps members apart by the restarts alone, and a mask of ones would mix them.
    """
    columns = {
        "input_ids": ([pack["input_ids"] for pack in packs], pad),
        "labels": ([pack["labels"] for pack in packs], IGNORE),
        "position_ids": ([np.concatenate([np.arange(n) for n in pack["seq_lengths"]]) for pack in packs], 0),
    }
    return _laid(columns, flat, multiple)


def _laid(columns: dict[str, tuple[list[Any], int]], flat: bool, multiple: int) -> dict[str, torch.Tensor]:
    """(rows, filling) of each column as a tensor (B, T)."""
    import torch

    if flat:
        columns = {name: ([np.concatenate(rows)], fill) for name, (rows, fill) in columns.items()}
    width = max(len(row) for rows, _ in columns.values() for row in rows)
    width += -width % multiple

    def padded(rows: list[Any], fill: int) -> torch.Tensor:
        out = np.full((len(rows), width), fill, np.int64)
        for target, row in zip(out, rows, strict=True):
            target[: len(row)] = row
        return torch.from_numpy(out)

    return {name: padded(rows, fill) for name, (rows, fill) in columns.items()}


def collator(layout: Layout, pad: int, process: int = 0) -> Any:
    """The layout's collator for a ``process``: ``collate``'s batch and the packs' numbers.

    Attention by borders gets them. Under Ulysses a process gets its part of the sequence and of the shifted labels, and
    no borders: the whole position ids, which the parts bring together, must do.
    """

    def together(packs: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        degree, numbers = layout.sequence_parallel, [pack["pack"] for pack in packs]
        batch: dict[str, Any] = collate(packs, pad, flat=layout.flat, multiple=degree)
        of = [np.repeat(pack["domains"], pack["seq_lengths"]) for pack in packs]
        batch |= _laid({"domains": (of, 0)}, layout.flat, degree)
        if degree > 1:
            batch["shift_labels"] = shifted(batch.pop("labels"))
            part = batch["input_ids"].shape[1] // degree
            start = process % degree * part
            return {name: value[:, start : start + part] for name, value in batch.items()} | {"packs": numbers}
        if layout.flat:
            lengths = np.concatenate([pack["seq_lengths"] for pack in packs])
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            longest = int(lengths.max())
            batch |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
            batch |= {"max_length_q": longest, "max_length_k": longest}
        return batch | {"packs": numbers}

    return together


def shifted(labels: Any) -> Any:
    """(B, T) labels, each where its prediction is made."""
    import torch

    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def complete_head(model: Any) -> None:
    """Give the output embedding a bias of None where peft's wrapper of single rows has none: TRL's head reads it."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def token_losses(model: Any, head: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """(losses, targets) of a batch: the loss of every target, (N,) in float32, and the (B, T) mask of where they stand.

    On GPUs by TRL's fused head. On the CPU that makes logits of all positions; ours makes them at targets alone. Labels
    are shifted here, unless they come as ``shift_labels``, which a cut sequence needs.
    """
    import torch

    rest = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
    labels = inputs["shift_labels"] if "shift_labels" in inputs else shifted(inputs["labels"])
    targets = labels != IGNORE
    if inputs["input_ids"].device.type != "cpu":
        scored = model(**rest, shift_labels=labels, fused_lm_head=True, use_cache=False)
        return -scored.log_probs[targets].float(), targets
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][targets],))
    try:  # (N, vocabulary)
        logits = model(**rest, use_cache=False).logits
    finally:
        hook.remove()
    return torch.nn.functional.cross_entropy(logits.float(), labels[targets], reduction="none"), targets


def trainer_class() -> Any:
    """SFTTrainer with our order of packs, loss, checkpoints and reports; made here, as it needs TRL."""
    import torch
    from accelerate.utils import gather_object
    from torch.utils.data import SequentialSampler
    from trl import SFTTrainer

    class Trainer(checkpoints.Kept, SFTTrainer):
        loss_is_scaled_for_ga = True  # it is divided by the targets of the whole step

        def __init__(self, *, packs: Packs, places: np.ndarray, meter: tracking.Meter, layout: Layout, **kwargs: Any):
            super().__init__(**kwargs)
            self.packs, self.places, self.meter, self.layout = packs, places, meter, layout
            # of the step under way: (domains, 2) of summed loss and targets, and (pack, loss) of each micro-batch
            self.sums = torch.zeros(max(1, len(packs.domains)), 2, device=self.args.device)
            self.micro: list[tuple[list[int], Any]] = []
            complete_head(self.model)
            if layout.sequence_parallel > 1:
                self.accelerator.parallelism_config.sp_handler.sp_attn_implementation = layout.attention_used
                # The collator cuts the sequences: DeepSpeed's adapter would send them round, and gloo can't.
                self.accelerator.deepspeed_ulysses_dl_adapter = lambda loader, model: loader
            if layout.strategy == "fsdp2":  # bf16 weights are computed with, gradients are summed in float32
                from torch.distributed.fsdp import MixedPrecisionPolicy

                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy

        def get_train_dataloader(self) -> Any:
            data = Places(self.packs, self.places)
            return self._get_dataloader(
                data, "Training", self._train_batch_size, sampler_fn=SequentialSampler, is_training=True
            )

        def get_sp_size(self) -> int:
            return 1  # the loader gives each process all its batches: none are to be multiplied

        def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
            counts = [
                (batch["shift_labels"] if "shift_labels" in batch else batch["labels"][:, 1:]).ne(IGNORE).sum()
                for batch in batch_samples
            ]
            own = torch.stack(counts).sum().to(device)
            return self.accelerator.reduce(own, "sum") if self.args.world_size > 1 else own

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """This process's share of the step's mean, times the processes that gradients are averaged over."""
            where, packs = inputs.pop("domains"), inputs.pop("packs")
            losses, targets = token_losses(model, self.model.get_output_embeddings(), inputs)
            self.count(losses.detach(), where[targets], packs)
            return losses.sum() / num_items_in_batch * self.layout.processes

        def count(self, losses: Any, where: Any, packs: list[int]) -> None:
            """Add a micro-batch's losses to the step's sums by domain."""
            both = torch.stack([losses, torch.ones_like(losses)], dim=1)
            self.sums.index_add_(0, where, both)
            self.micro.append((packs, losses.sum()))

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                step = self.state.global_step
                sums = self.accelerator.reduce(self.sums, "sum") if self.args.world_size > 1 else self.sums
                loss, targets = sums.sum(dim=0).tolist()
                logs["loss"] = loss / targets
                if len(self.packs.domains) > 1:
                    for name, (part, count) in zip(self.packs.domains, sums.tolist(), strict=True):
                        logs |= {f"loss_{name}": part / count} if count else {}
                logs |= self.meter.read(step)
                self.stop_where_it_is_no_number(step, logs)
                self.sums, self.micro = torch.zeros_like(self.sums), []
            super().log(logs, start_time)

        def stop_where_it_is_no_number(self, step: int, logs: dict[str, float]) -> None:
            if np.isfinite(logs["loss"]) and np.isfinite(logs.get("grad_norm", 0.0)):
                return  # every process sees the same two figures
            own = [(pack, float(loss)) for packs, loss in self.micro for pack in packs]
            everywhere = gather_object(own) if self.args.world_size > 1 else own
            everywhere += [(int(pack), 0.0) for pack in np.unique(self.places[step - 1])]
            folder = Path(self.args.output_dir).parent / "not-finite"
            tracking.stop(step, logs, everywhere, self.packs, folder, write=self.is_world_process_zero())

        def validate(self, packs: Packs) -> None:
            """Log the mean loss over the target tokens of all validation packs, by domain where there are several."""
            self.model.eval()
            # Whole sequences, also under Ulysses, which is off in evaluation.
            apart = self.layout.model_copy(update={"sequence_parallel": 1, "attention": self.layout.attention_used})
            table = places([list(range(len(packs)))], len(packs), apart)
            together = collator(apart, self.processing_class.pad_token_id)
            sums = torch.zeros(max(1, len(packs.domains)), 2, device=self.args.device)
            kept, self.sums = self.sums, sums
            mine = table[:, :, self.args.process_index].reshape(-1, table.shape[-1])
            with torch.no_grad():
                for numbers in mine:
                    inputs = self._prepare_inputs(together([packs[int(number)] for number in numbers]))
                    where, _ = inputs.pop("domains"), inputs.pop("packs")
                    losses, targets = token_losses(self.model_wrapped, self.model.get_output_embeddings(), inputs)
                    self.count(losses, where[targets], [])
            self.sums, self.micro = kept, []
            sums = self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums
            loss, targets = sums.sum(dim=0).tolist()
            told = {"eval_loss": loss / targets}
            if len(packs.domains) > 1:
                parts = zip(packs.domains, sums.tolist(), strict=True)
                told |= {f"eval_loss_{name}": part / count for name, (part, count) in parts if count}
            self.log(told)

    return Trainer


def arguments(sft: Sft, layout: Layout, folder: Path, micro_batches: int, name: str) -> SFTConfig:
    """TRL's settings; the packs are taken as they are, one pass over ``Places`` being the whole training."""
    from trl import SFTConfig

    return SFTConfig(
        **common(sft, layout, folder, name),
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        max_length=None,
        per_device_train_batch_size=layout.packs_per_batch,
        gradient_accumulation_steps=micro_batches,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": sft.min_lr_ratio},
        warmup_steps=sft.warmup_ratio,  # under 1 it is a share of all steps
    )


def common(sft: Sft, layout: Layout, folder: Path, name: str) -> dict[str, Any]:
    """What TRL's trainers are told alike."""
    return {
        "output_dir": str(folder),
        "remove_unused_columns": False,
        "num_train_epochs": 1,
        "dataloader_pin_memory": not layout.cpu,
        # optimisation
        "learning_rate": sft.learning_rate,
        "weight_decay": sft.weight_decay,
        "adam_beta1": sft.betas[0],
        "adam_beta2": sft.betas[1],
        "max_grad_norm": sft.max_grad_norm,
        "optim": "adamw_torch_fused",
        "bf16": sft.precision == "bf16_autocast",
        "gradient_checkpointing": layout.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False, "offload": layout.offload_activations},
        "use_liger_kernel": layout.liger,
        "seed": sft.seed,
        "use_cpu": layout.cpu,
        # checkpoints and reports
        "save_steps": sft.save_steps,
        "save_total_limit": 2,  # the one before the last stays until the last is whole
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide what must stop the training
        "report_to": sft.tracking or "none",
        "project": "r1distill",
        "run_name": name,
        "trackio_static_space_id": False,  # nothing is put on the Hub
        "disable_tqdm": True,
    }


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


def progress(meter: tracking.Meter) -> Any:
    """A callback that tells progress; its class is made here, as it needs transformers."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.start(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                rate = meter.mean_tokens_per_second(state.global_step)
                worker.tell(step=state.global_step, steps=state.max_steps, loss=logs["loss"], tokens_per_second=rate)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # the final weights are written right away

    return Progress()
