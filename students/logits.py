"""The teacher's logits: a model of the student's own vocabulary reads the packs and leaves its top-k of every label.

``build`` runs this very module as workers, one a GPU, each of which takes every n-th shard; ``main`` is what one does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from r1distill.data import models, schema
from r1distill.data.errors import RequestError
from r1distill.data.result import Result
from r1distill.students import topk, worker
from r1distill.students.catalogue import Student
from r1distill.students.template import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN = "train"


def build(student: Student, packs: Path, out: Path, home: Path, processes: int = 1) -> Result:
    """Score the training packs into ``out/train``. Rows are tokens that take loss. A shard that is there is kept.

    Raises RequestError where the teacher's vocabulary is not the student's; a difference in padding is none.
    """
    assert student.distill
    job = {
        "student": student.model_dump(mode="json"),
        "teacher": str(models.materialise(student.distill.teacher, home)),
        "packs": str(packs),
        "out": str(out),
    }
    launcher = ["accelerate.commands.launch", f"--num_processes={processes}", "--multi_gpu"] if processes > 1 else []
    table = schema.read(packs / TRAIN, schema.PACK)
    with tqdm(total=table.num_rows, desc="logits", unit="pack", disable=None, delay=2) as bar:
        for told in worker.run("r1distill.students.logits", job, out / ".work", launchers=[launcher]):
            bar.update(told.get("packs", 0))
    opened = topk.TopK(out / TRAIN, table)
    rows = int(opened.counts.sum())
    size = sum(file.stat().st_size for file in (out / TRAIN).iterdir())
    metrics = {"k": student.distill.k, "teacher": models.title(student.distill.teacher), "gib": round(size / 2**30, 3)}
    return Result(rows, rows, {}, metrics, unit="tokens")


def main(job: dict[str, Any]) -> None:
    """In a worker: score the shards that are this process's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, out = Student.model_validate(job["student"]), Path(job["out"]) / TRAIN
    assert student.distill
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(Path(job["packs"]) / "tokenizer")
    check_vocabulary(tokenizer, AutoTokenizer.from_pretrained(job["teacher"]), models.title(student.distill.teacher))
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=dtype, attn_implementation="sdpa").to(device)
    model.eval()
    table = schema.read(Path(job["packs"]) / TRAIN, schema.PACK)
    for number, (first, last) in enumerate(topk.ranges(table)):
        part = table.slice(first, last - first)
        if number % world != rank:
            continue
        if topk.is_written(out, number, part, student.distill.k):
            worker.tell(packs=last - first)
            continue
        topk.write(out, number, first, part, student.distill.k, scored(model, student, part))


def check_vocabulary(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, title: str, key: str = "distill"
) -> None:
    """Raise RequestError unless both have the same tokens at the same ids, special ones aside, which are renamed.

    ``key`` is where the student's file names the teacher.
    """
    mine, other = (one.backend_tokenizer.get_vocab(with_added_tokens=False) for one in (student, teacher))
    if mine != other:
        odd = next(token for token in {**mine, **other} if mine.get(token) != other.get(token))
        raise RequestError(
            f"{key}.teacher {title} has another vocabulary than the student: {odd!r} is {other.get(odd)} there and "
            f"{mine.get(odd)} here. Its logits say nothing about the student's tokens: name a model of the same "
            f"family, or leave '{key}' out."
        )


def scored(model: Any, student: Student, packs: pa.Table) -> Iterator[topk.Rows]:
    """The teacher's rows of each pack in turn; its members are read apart, as the training reads them."""
    import torch

    from r1distill.kernels.token_scores import token_scores

    assert student.distill
    head = model.get_output_embeddings().weight
    vocab = min(len(head), student.architecture.vocab)
    k, temperature = student.distill.k, student.distill.temperature
    for pack in schema.rows(packs):
        ids = torch.tensor([pack["input_ids"]], device=head.device)
        places = torch.tensor([[place for size in pack["seq_lengths"] for place in range(size)]], device=head.device)
        labels = torch.tensor(pack["labels"], device=head.device)[1:]
        learned = labels != IGNORE
        with torch.no_grad():
            hidden = model.get_decoder()(ids, position_ids=places, use_cache=False).last_hidden_state[0, :-1][learned]
        found = token_scores(hidden, head, labels[learned], k=k, temperature=temperature, vocab_size=vocab)
        yield found.topk_ids.cpu().numpy(), found.topk_logprobs.cpu().numpy(), found.logprobs.cpu().numpy()
        worker.tell(packs=1)


if __name__ == "__main__":
    worker.perform(main)
