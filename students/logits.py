"""The teacher's logits: a model of the student's own vocabulary reads the packs and leaves its top-k of every label.

``build`` shares the shards out: among workers of this machine, which run this very module, one a GPU, each of which
takes every n-th; or among the workers of a Ray cluster, where a shard whose worker dies goes to another.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from r1distill.data import cluster, models, schema
from r1distill.data.errors import RequestError
from r1distill.data.result import Result
from r1distill.students import topk, worker
from r1distill.students.catalogue import Distill, Student
from r1distill.students.template import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN = "train"
Job = dict[str, Any]


def require_room(student: Student, packs: Path, out: Path) -> None:
    """Raise RequestError where the disk has no room for the logits of these sealed packs, beside what of them lies in
    ``out`` already."""
    assert student.distill
    manifest = json.loads((packs / "manifest.json").read_text(encoding="utf-8"))
    tokens = manifest["metrics"][TRAIN]["target_tokens"]
    there = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    room, needed = shutil.disk_usage(packs).free + there, tokens * student.distill.bytes_per_token
    if needed > room:
        most = Distill.largest_k(room / tokens)
        raise RequestError(
            f"the logits of {tokens:,} tokens at k = {student.distill.k} take {needed / 2**30:,.1f} GiB, and there are "
            f"{room / 2**30:,.1f} GiB of free disk. "
            + (f"The largest k that fits is {most}: --set student.distill.k={most}" if most else "No k fits.")
        )


def build(
    student: Student,
    packs: Path,
    out: Path,
    home: Path,
    processes: int = 1,
    gpus_each: int = 1,
    ray_address: str | None = None,
) -> Result:
    """Score the training packs into ``out/train``. Rows are tokens that take loss. A shard that is there is kept.

    Over ``processes`` of this machine, or the Ray cluster at ``ray_address``, whose nodes see packs, out and home; each
    lays the teacher over ``gpus_each`` where there are GPUs.
    Raises RequestError where the teacher's vocabulary is not the student's; a difference in padding is none.
    """
    assert student.distill
    models.materialise(student.distill.teacher, home)  # once, before many ask for it
    job = {
        "student": student.model_dump(mode="json"),
        "packs": str(packs),
        "out": str(out),
        "home": str(home),
        "shard_tokens": topk.SHARD_TOKENS,
        "gpus_each": gpus_each,
    }
    topk.sweep(out / TRAIN)
    table = schema.read(packs / TRAIN, schema.PACK)
    began, there = time.monotonic(), topk.rows(out / TRAIN)
    scoring = _on_ray(job, table, ray_address) if ray_address else _on_this_machine(job, processes)
    with tqdm(total=table.num_rows, desc="logits", unit="pack", disable=None, delay=2) as bar:
        for done in scoring:
            bar.update(done)
    topk.sweep(out / TRAIN)  # of workers that died
    seconds = time.monotonic() - began
    rows = int(topk.TopK(out / TRAIN, table).counts.sum())
    size = sum(file.stat().st_size for file in (out / TRAIN).iterdir())
    metrics = {
        "k": student.distill.k,
        "teacher": models.title(student.distill.teacher),
        "gib": round(size / 2**30, 3),
        "tokens": rows,
        **({"tokens_per_second": round((rows - there) / seconds, 1)} if rows > there else {}),
    }
    return Result(rows, rows, {}, metrics, unit="tokens")


def _on_this_machine(job: Job, processes: int) -> Iterator[int]:
    """Packs as they are done."""
    several = [
        f"--num_processes={processes}",
        "--multi_gpu",
        "--main_process_port=0",
    ]  # without GPUs it is torchrun too
    launcher = ["accelerate.commands.launch", *several] if processes > 1 else []
    for told in worker.run("r1distill.students.logits", job, Path(job["out"]) / ".work", launchers=[launcher]):
        yield told.get("packs", 0)


def _on_ray(job: Job, table: pa.Table, address: str) -> Iterator[int]:
    """The same, a shard at a time."""
    shards = range(len(topk.ranges(table, job["shard_tokens"])))
    with cluster.connected(address):
        if 0 < cluster.gpus() < job["gpus_each"]:
            raise RequestError(f"the teacher needs {job['gpus_each']} GPUs, the Ray cluster has {cluster.gpus()}.")
        gpus = job["gpus_each"] if cluster.gpus() else 0
        yield from cluster.ordered(score_shard, shards, json.dumps(job), gpus=gpus)


def main(job: Job) -> None:
    """In a worker of this machine: score the shards that are this process's."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    table = schema.read(Path(job["packs"]) / TRAIN, schema.PACK)
    for number in range(rank, len(topk.ranges(table, job["shard_tokens"])), world):
        score_shard(number, json.dumps(job), lambda packs: worker.tell(packs=packs))


def score_shard(number: int, job: str, tell: Callable[[int], None] = lambda packs: None) -> int:
    """Score one shard, unless it is there; how many packs it has. ``job`` is JSON; ``tell`` hears of packs."""
    about = json.loads(job)
    student, out = Student.model_validate(about["student"]), Path(about["out"]) / TRAIN
    assert student.distill
    table = schema.read(Path(about["packs"]) / TRAIN, schema.PACK)
    first, last = topk.ranges(table, about["shard_tokens"])[number]
    part = table.slice(first, last - first)
    if topk.is_written(out, number, part, student.distill.k):
        tell(last - first)
    else:
        topk.write(out, number, first, part, student.distill.k, _told(scored(_teacher(job), student, part), tell))
    return last - first


def _told(rows: Iterator[topk.Rows], tell: Callable[[int], None]) -> Iterator[topk.Rows]:
    for one in rows:
        yield one
        tell(1)


@lru_cache(maxsize=1)
def _teacher(job: str) -> Any:
    """The teacher of a job, which stays in this process for the shards to come."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    about = json.loads(job)
    student = Student.model_validate(about["student"])
    assert student.distill
    ref, gpu = student.distill.teacher, torch.cuda.is_available()
    folder = models.materialise(ref, Path(about["home"]))
    tokenizer = AutoTokenizer.from_pretrained(Path(about["packs"]) / "tokenizer")
    check_vocabulary(tokenizer, AutoTokenizer.from_pretrained(folder), models.title(ref))
    each, rank = about["gpus_each"], int(os.environ.get("LOCAL_RANK", "0"))
    places: dict[str, Any] = {"device_map": {"": f"cuda:{rank}" if gpu else "cpu"}}
    if gpu and each > 1:
        mine = range(rank * each, (rank + 1) * each)
        places = {"device_map": "balanced", "max_memory": {n: torch.cuda.mem_get_info(n)[0] for n in mine}}
    dtype = torch.bfloat16 if gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **places)
    return model.eval()


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
            states = model.get_decoder()(ids, position_ids=places, use_cache=False).last_hidden_state
            hidden = states[0, :-1].to(head.device)[learned]
        found = token_scores(hidden, head, labels[learned], k=k, temperature=temperature, vocab_size=vocab)
        yield found.topk_ids.cpu().numpy(), found.topk_logprobs.cpu().numpy(), found.logprobs.cpu().numpy()


if __name__ == "__main__":
    worker.perform(main)
