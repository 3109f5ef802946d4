"""What a student answers while it learns from its own answers: which prompts, what each answer is worth, and the log.

An answer is judged by the very checks that judge a teacher's trace.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from r1distill.data import schema, verdicts
from r1distill.data.dataset import split_of
from r1distill.data.errors import R1DistillError
from r1distill.data.prompts import user_message
from r1distill.data.settings import VerdictSettings
from r1distill.data.thinking import split_thinking
from r1distill.data.verify import verifiers
from r1distill.students.catalogue import Grpo, Student
from r1distill.students.template import TEMPLATES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]


def draw(
    student: Student,
    table: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    instruction: str | dict[str, str],
    validation_share: float,
) -> tuple[list[Row], Counter[str]]:
    """(prompts to ask, the others by reason) of a PROMPT table: as many as all steps take, in the order of a lot.

    A row has the prompt's columns and ``prompt``, the text that the student goes on with, whose ids are
    ``prompt_ids``. Raises R1DistillError where the shipped chat template would ask with other ids.
    """
    settings, rejected = student.beyond, Counter[str]()
    assert settings
    usable = []
    for number, row in enumerate(schema.rows(table, ["prompt_id", "verifier", "reference_answer"])):
        if split_of(row["prompt_id"], validation_share) != "train":
            rejected["held out for validation"] += 1
        elif isinstance(settings, Grpo) and not verifiers.has_rule(row["verifier"], row["reference_answer"]):
            rejected["no rule can judge its answers"] += 1
        else:
            usable.append(number)
    random.Random(settings.seed).shuffle(usable)
    context = student.packs.context_tokens
    room = context - (settings.max_completion_tokens or context // 2)
    drawn: list[Row] = []
    for place, number in enumerate(usable):
        if len(drawn) == settings.steps * settings.prompts_per_step:
            rejected["not needed for so many steps"] += len(usable) - place
            break
        (row,) = table.slice(number, 1).to_pylist()
        told = {"role": "user", "content": user_message(row, instruction)}
        if any(mark in told["content"] for mark in TEMPLATES[student.template].controls):
            rejected["control token inside the text"] += 1
            continue
        text, ids = _prompt(student, tokenizer, told)
        if len(ids) > room:
            rejected["longer than the context leaves"] += 1
        else:
            drawn.append({**row, "prompt": text, "prompt_ids": ids})
    return drawn, rejected


def _prompt(student: Student, tokenizer: PreTrainedTokenizerFast, told: Mapping[str, str]) -> tuple[str, list[int]]:
    """The generation prompt and its ids, which must be those of the chat template that the student ships."""
    text = TEMPLATES[student.template].prefix([told])
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    shipped = tokenizer.apply_chat_template([dict(told)], add_generation_prompt=True, return_dict=False)
    if ids != list(shipped):
        raise R1DistillError(
            f"the checkpoint's chat template asks with other tokens than the training taught: expected {ids[:8]} … "
            f"{ids[-8:]}, found {list(shipped)[:8]} … {list(shipped)[-8:]}. Its tokenizer is not the one that was "
            "packed with: delete the checkpoint and run again to rebuild it."
        )
    return text, ids


class Order:
    """Rows of the drawn prompts in the order in which they are asked: a sampler for TRL's loader.

    Each step asks ``prompts_per_step`` of them ``group`` times each; once all were asked they come again, in another
    order. TRL wants a step's rows once for each of its ``rounds`` of gradient accumulation.
    """

    def __init__(self, prompts: int, steps: int, prompts_per_step: int, group: int, rounds: int, seed: int) -> None:
        self.prompts, self.steps, self.prompts_per_step = prompts, steps, prompts_per_step
        self.group, self.rounds, self.seed = group, rounds, seed

    def __len__(self) -> int:
        return self.steps * self.prompts_per_step * self.group * self.rounds

    def __iter__(self) -> Iterator[int]:
        coming = self._endless()
        for _ in range(self.steps):
            asked = [next(coming) for _ in range(self.prompts_per_step)]
            for _ in range(self.rounds):
                for prompt in asked:
                    yield from [prompt] * self.group

    def _endless(self) -> Iterator[int]:
        lot, rows = random.Random(self.seed), list(range(self.prompts))
        while True:
            yield from rows
            lot.shuffle(rows)


@dataclass(frozen=True)
class Answer:
    """One answer as its row of the log will have it."""

    prompt_id: str
    completion: str
    token_ids: list[int]
    finish_reason: str
    verdicts: list[Row]

    def reward(self, check: str) -> float:
        """1 for a check that it passes, else 0: what isn't shown to be right earns nothing, and what was cut off is
        wrong."""
        outcomes = {row["check"]: row["outcome"] for row in self.verdicts}
        cut_off = check == "correctness" and outcomes["truncation"] == "fail"
        return float(outcomes[check] == "pass" and not cut_off)

    def worth(self, weights: Mapping[str, float]) -> float:
        """The weighted sum of its rewards."""
        return sum(weight * self.reward(check) for check, weight in weights.items())


class Judge:
    """Judges answers as the verdicts stage judges traces, in processes that can be killed."""

    def __init__(self, rules: VerdictSettings, tokenizer: PreTrainedTokenizerFast, ends: Sequence[int], sharing: int):
        cores = max(1, len(os.sched_getaffinity(0)) // sharing)  # with the other processes of this machine
        self.rules = rules.model_copy(update={"workers": min(verdicts.workers(rules), cores)})
        self.tokenizer, self.ends = tokenizer, set(ends)
        self._last: tuple[Any, list[Answer]] = None, []  # what was judged: prompts and ids

    def __call__(self, prompts: Sequence[Row], ids: list[list[int]]) -> list[Answer]:
        """The answers to rows of PROMPT with their verdicts; those that were judged last are not judged again."""
        asked = [prompt["prompt_id"] for prompt in prompts], ids  # a collapsed student gives many prompts one answer
        if self._last[0] != asked:
            self._last = asked, self._judged(prompts, ids)
        return self._last[1]

    def _judged(self, prompts: Sequence[Row], ids: list[list[int]]) -> list[Answer]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)  # as vLLM does by default
        finished = ["stop" if one and one[-1] in self.ends else "length" for one in ids]
        items = (
            verdicts.item(prompt, _trace(prompt, number, text, finish, len(one)))
            for number, (prompt, text, finish, one) in enumerate(zip(prompts, texts, finished, ids, strict=True))
        )
        judged = verdicts.judge(self.rules, items)
        rows = zip(prompts, texts, ids, finished, judged, strict=True)
        return [Answer(prompt["prompt_id"], text, one, finish, its.verdicts) for prompt, text, one, finish, its in rows]


def _trace(prompt: Row, number: int, text: str, finish: str, tokens: int) -> Row:
    reasoning, response = split_thinking(text, opened=True)
    return {
        "prompt_id": prompt["prompt_id"],
        "sample": number,
        "completion": text,
        "reasoning": reasoning,
        "response": response,
        "state": "done" if finish == "stop" else "truncated",
        "finish_reason": finish,
        "error": None,
        "completion_tokens": tokens,
    }


class Reward:
    """One check as TRL's kind of reward function, which goes by the check's name."""

    def __init__(self, judge: Judge, check: str) -> None:
        self.judge, self.__name__ = judge, check

    def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        names = schema.PROMPT.names
        prompts = [dict(zip(names, row, strict=True)) for row in zip(*(columns[name] for name in names), strict=True)]
        return [answer.reward(self.__name__) for answer in self.judge(prompts, completion_ids)]


class Log:
    """The answers of a training under way: a file for each step and process, whole or not there.

    A step that is repeated after a kill writes its files again, so that nothing is counted twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, process: int, rows: Sequence[Row]) -> None:
        """Put a process's rows of a step (ROLLOUT) on disk."""
        file = self.folder / f"{step:08}-{process:05}.arrow"
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("wb") as handle:
            with pa.ipc.new_stream(handle, schema.ROLLOUT) as writer:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema.ROLLOUT))
            handle.flush()
            os.fsync(handle.fileno())
        unfinished.rename(file)

    def forget_after(self, step: int) -> None:
        """Delete what later steps left: a training that goes on from ``step`` repeats them."""
        for file in self.folder.iterdir():
            if file.suffix != ".arrow" or int(file.name[:8]) > step:
                file.unlink()

    def gather(self, out: Path, steps: int, each: int) -> Counter[str]:
        """Write all of it as one table, and count answers, their tokens and how they ended.

        Raises R1DistillError where a step has not exactly the ``each`` answers that it took.
        """
        counts = Counter[str]()
        with schema.writing(out, schema.ROLLOUT) as table:
            for step in range(1, steps + 1):
                rows = [row for file in sorted(self.folder.glob(f"{step:08}-*.arrow")) for row in _read(file)]
                if [row["number"] for row in rows] != list(range(each)):
                    raise R1DistillError(
                        f"step {step} took {each} answers, {self.folder} has {len(rows)} of it. Its files were touched "
                        f"from outside: delete {self.folder.parent} and run again."
                    )
                for row in rows:
                    counts.update({"answers": 1, "tokens": len(row["token_ids"]), row["finish_reason"]: 1})
                    table.append(row)
        return counts


def _read(file: Path) -> list[Row]:
    with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as stream:
        rows: list[Row] = stream.read_all().to_pylist()
    return rows
