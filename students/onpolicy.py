"""TRL's trainers that learn from the student's own answers, with our prompts, seeds, verdicts, log and checkpoints; and
the teacher of on-policy distillation. Runs in the worker of ``beyond``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r1distill.data import models
from r1distill.data.errors import R1DistillError
from r1distill.students import checkpoints, logits, rollouts, worker
from r1distill.students.catalogue import Grpo, OnPolicy
from r1distill.students.layout import Layout

NO_TOKEN = -1e9  # the logit of a row that one of two vocabularies lacks


def teacher(settings: OnPolicy, student: Any, folder: Path, tokenizer: Any, spread: Layout) -> Any:
    """The model whose probabilities are learned, with as many rows of vocabulary as the student.

    Raises RequestError where its vocabulary is another; one that is padded otherwise is none.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    title = models.title(settings.teacher)
    logits.check_vocabulary(tokenizer, AutoTokenizer.from_pretrained(folder), title, "beyond")
    dtype = torch.float32 if spread.cpu else torch.bfloat16
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    same_rows(student, found)
    return found.eval()


def same_rows(student: Any, teacher: Any) -> None:
    """Cut or pad the teacher's embeddings to the student's rows. Those that the teacher has no token for are left out
    of both probabilities: a logit of zero would give them a share, and one of minus infinity would make KL infinite.
    """
    rows, known = student.config.vocab_size, teacher.config.vocab_size
    if rows == known:
        return
    teacher.resize_token_embeddings(rows, mean_resizing=False)
    if known < rows:
        for model in (student, teacher):
            _leave_out(model.get_output_embeddings(), known, rows)


def _leave_out(head: Any, first: int, rows: int) -> None:
    """Give an output embedding a bias that keeps its rows from ``first`` on from being chosen; it is saved nowhere."""
    import torch

    bias = torch.zeros(rows, device=head.weight.device)
    bias[first:] = NO_TOKEN
    if hasattr(head, "bias"):
        del head.bias
    head.register_buffer("bias", bias, persistent=False)


def trainer_class(settings: Grpo | OnPolicy) -> Any:
    """TRL's trainer with our prompts, seeds, verdicts, log and checkpoints; made here, as it needs TRL."""
    import numpy as np
    import torch
    from trl import DistillationTrainer, GRPOTrainer

    from r1distill.students.trainer import complete_head

    stem: Any = GRPOTrainer if isinstance(settings, Grpo) else DistillationTrainer

    class Trainer(checkpoints.Kept, stem):
        def __init__(
            self,
            *,
            order: rollouts.Order,
            judge: rollouts.Judge,
            log: rollouts.Log,
            weights: Mapping[str, float],
            **kwargs: Any,
        ):
            super().__init__(**kwargs)
            self.order, self.judge, self.rollouts, self.weights = order, judge, log, weights
            complete_head(self.model)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return self.order

        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            """The ids that were compared with the chat template's; nothing is added to them."""
            return [self.processing_class.encode(text, add_special_tokens=False) for text in prompts], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            """Seeded by step and process, so that a repeated step gives the same answers; without dropout; in the
            precision that the loss is computed in."""
            key = [self.args.seed, self.state.global_step, self.args.process_index]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
            training = self.model.training
            self.model.eval()
            try:
                with self.accelerator.autocast():  # entered once: weights are cast once, and not for every token
                    return super()._generate_single_turn(*args, **kwargs)
            finally:
                self.model.train(training)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with self.accelerator.autocast():  # else TRL's distillation, which goes around the model's own forward,
                return super().compute_loss(*args, **kwargs)  # would compute in the master weights' float32

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
            found = super()._generate_and_score_completions(inputs)
            pairs = zip(found["completion_ids"], found["completion_mask"], strict=True)
            answers = self.judge(inputs, [ids[kept.bool()].tolist() for ids, kept in pairs])
            learned = found["advantages"].tolist() if "advantages" in found else [None] * len(inputs)
            if "advantages" not in found:  # TRL tells no rewards: what is right is told all the same
                own = [[answer.reward(check) for check in self.weights] for answer in answers]
                shares = self.accelerator.gather(torch.tensor(own, device=self.args.device)).mean(dim=0)
                for check, share in zip(self.weights, shares.tolist(), strict=True):
                    self._metrics["train"][f"rewards/{check}/mean"].append(share)
            step, first = self.state.global_step + 1, self.args.process_index * len(inputs)
            rows = [
                {
                    "step": step,
                    "number": first + place,
                    "prompt_id": answer.prompt_id,
                    "completion": answer.completion,
                    "token_ids": answer.token_ids,
                    "finish_reason": answer.finish_reason,
                    "verdicts": [{key: row[key] for key in ("check", "outcome", "reason")} for row in answer.verdicts],
                    "reward": None if advantage is None else answer.worth(self.weights),
                    "advantage": advantage,
                }
                for place, (answer, advantage) in enumerate(zip(answers, learned, strict=True))
            ]
            self.rollouts.write(step, self.args.process_index, rows)
            return found

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs and not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
                raise R1DistillError(
                    f"step {self.state.global_step} has loss {logs['loss']} and gradient norm {logs.get('grad_norm')}. "
                    f"Its answers are in {self.rollouts.folder}, nothing else of it was saved: the same command goes "
                    "on from the last whole checkpoint. A lower student.beyond.learning_rate may mend it."
                )
            super().log(logs, start_time)

    return Trainer


def progress(answers: int) -> Any:
    """A callback that tells progress for steps of so many ``answers``; made here, as it needs transformers."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.last = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if state.is_world_process_zero and "loss" in logs:
                now, tokens = time.monotonic(), answers * logs["completions/mean_length"]
                rate, self.last = tokens / max(now - self.last, 1e-9), now
                worker.tell(step=state.global_step, steps=state.max_steps, loss=logs["loss"], tokens_per_second=rate)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                control.should_save = False  # the final weights are written right away

    return Progress()
