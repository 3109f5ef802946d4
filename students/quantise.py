"""Variants: quantised forms of a checkpoint made with AutoRound, in a worker of their own, checked without serving.

Checked here: that the files are sound (``students.soundness``), and how far the variant's next token is from the
checkpoint's on held-out traces (``students.divergence``). What a variant is worth in its runtime is measured later, by
serving it; ``prompts.json`` holds the conversations that both are then asked to tokenise, with the checkpoint's ids.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm import tqdm

from r1distill.data import schema
from r1distill.data.errors import R1DistillError
from r1distill.data.result import Result
from r1distill.students import worker
from r1distill.students.catalogue import AwqVariant, Fp8Variant, GgufVariant, GptqVariant, Int8Variant, Student, Variant
from r1distill.students.soundness import KEPT_FILES, problems
from r1distill.students.template import TEMPLATES, Unusable, encode
from r1distill.students.usage import modelfile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from r1distill.students.divergence import Reference

PROBES = "prompts.json"
PROCESS_BYTES = 3 << 30  # of a process beside the weights
TOKENS_AT_ONCE = 16_384  # of calibration: eight pieces of 2,048 tokens, or fewer that are longer

SEARCHED_AT_ONCE = 1 << 17  # weights whose scales a CPU looks for at a time: with all that is worked out, 2 to 4 MB

# How llama.cpp calls the ways to cut text into words before its bytes are merged, by the pattern that does it.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {QWEN2: "qwen2", LLAMA3: "llama-bpe", "": "gpt-2", "digits": "smollm"}


def build(student: Student, checkpoint: Path, dataset: Path, out: Path, gpus: int = 0) -> Result:
    """Write every variant of ``checkpoint`` to ``out/<name>``; what a cut-off run finished is kept.

    Several are made at a time: one on each of the ``gpus``, or on the CPU as many as it has cores and free memory for.
    """
    work = out / ".work"
    missing = [name for name in student.variants if not (_facts(work, name).is_file() and (out / name).is_dir())]
    if missing or not (out / PROBES).is_file():
        for name in missing:
            shutil.rmtree(work / name, ignore_errors=True)
            shutil.rmtree(out / name, ignore_errors=True)
        job = {
            "student": student.model_dump(mode="json"),
            "variants": missing,
            "checkpoint": str(checkpoint),
            "dataset": str(dataset),
            "out": str(out),
        }
        done = len(student.variants) - len(missing)
        bar = tqdm(total=len(student.variants), initial=done, desc="variants", unit="variant", disable=None, delay=2)
        with bar:
            processes = max(1, min(len(missing), gpus or _fit(checkpoint)))
            launcher = ["torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
            for message in worker.run("r1distill.students.quantise", job, work, launchers=[launcher]):
                bar.update("made" in message)
    metrics = {name: json.loads(_facts(work, name).read_text()) for name in student.variants}
    return Result(len(metrics), len(metrics), {}, metrics, unit="variants")


def _fit(checkpoint: Path) -> int:
    """How many processes the machine's cores and free memory are enough for; one holds the weights in float32 twice."""
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return min(len(os.sched_getaffinity(0)), psutil.virtual_memory().available // (4 * weights + PROCESS_BYTES))


def _facts(work: Path, name: str) -> Path:
    return work / f"{name}.json"


def main(job: dict[str, Any]) -> None:
    """In a worker: the variants that no other took, quantised, given the checkpoint's files and checked."""
    import torch
    from transformers import AutoTokenizer

    from r1distill.students.dequantise import weights
    from r1distill.students.divergence import Reference, held_out

    student = Student.model_validate(job["student"])
    checkpoint, dataset, out = Path(job["checkpoint"]), Path(job["dataset"]), Path(job["out"])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    if rank == 0:
        unfinished = out / ".work" / PROBES
        unfinished.write_text(json.dumps(probes(student, tokenizer, dataset), ensure_ascii=False), encoding="utf-8")
        unfinished.rename(out / PROBES)
    references: dict[int, Reference] = {}
    for name in job["variants"]:
        try:
            (out / ".work" / name).mkdir()
        except FileExistsError:
            continue
        variant, began = student.variants[name], time.monotonic()
        pieces = calibration(student, variant, tokenizer, dataset) if variant.calibrated else None
        made = make(student, name, pieces, checkpoint, out / ".work" / name)
        quantised = time.monotonic()
        values = weights(made)
        wrong = problems(made, checkpoint, values)
        kl, tokens = None, variant.kl_tokens
        if tokens and not wrong:
            if tokens not in references:
                traces = (_target(student, tokenizer, row["messages"]) for row in _rows(dataset, "validation"))
                references[tokens] = Reference(checkpoint, held_out((one for one in traces if one), tokens))
            if references[tokens].tokens:
                kl = references[tokens].divergence(values)
        made.rename(out / name)
        facts = {
            "kind": variant.kind,
            "bytes": sum(file.stat().st_size for file in (out / name).iterdir()),
            "seconds": round(time.monotonic() - began, 1),
            "quantising_seconds": round(quantised - began, 1),
            "problems": wrong,
            "kl": kl,
            "kl_tokens": references[tokens].tokens if tokens in references else 0,
        }
        told = out / ".work" / name / "facts.json"
        told.write_text(json.dumps(facts))
        told.rename(_facts(out / ".work", name))  # whole or not there
        worker.tell(made=name)


def make(student: Student, name: str, pieces: torch.Tensor | None, checkpoint: Path, scratch: Path) -> Path:
    """Quantise, and put the checkpoint's own files in the place of AutoRound's; returns the variant's folder."""
    variant = student.variants[name]
    os.environ["AR_WORK_SPACE"] = str(scratch / "aside")  # weights put out of memory: else into the user's folder
    made, out = quantise(variant, checkpoint, pieces, scratch / "raw"), scratch / "made"
    if isinstance(variant, GgufVariant):
        out.mkdir()
        file = f"{student.name}-{variant.scheme.upper()}.gguf"
        next(made.glob("*.gguf")).rename(out / file)
        (out / "Modelfile").write_text(modelfile(student, file), encoding="utf-8")
    else:
        made.rename(out)
        for file in KEPT_FILES:
            shutil.copyfile(checkpoint / file, out / file)
        _set_dtype(out / "config.json")
    for folder in ("raw", "aside"):
        shutil.rmtree(scratch / folder, ignore_errors=True)
    return out


def recipe(variant: Variant) -> tuple[str, str, dict[str, Any]]:
    """AutoRound's scheme, export format and further settings for a variant."""
    match variant:
        case GgufVariant(scheme=scheme):
            return f"gguf:{scheme}", f"gguf:{scheme}", {}
        case GptqVariant(bits=bits, group_size=size):
            return f"W{bits}A16", "auto_gptq", {"group_size": size, "sym": True}
        case AwqVariant(group_size=size):
            return "W4A16", "auto_awq", {"group_size": size, "sym": False}
        case Int8Variant():
            return "INT8", "llm_compressor", {}
        case Fp8Variant(scheme=scheme):
            return {"channel": "FP8_STATIC", "block": "FP8_BLOCK"}[scheme], "llm_compressor", {}
    raise AssertionError(variant)


def _rows(dataset: Path, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split; of the training split where there is no other."""
    folder = dataset / split if (dataset / split).is_dir() else dataset / "train"
    yield from schema.rows(schema.read(folder, schema.TRAINING_ROW), ["messages"])


def _target(student: Student, tokenizer: PreTrainedTokenizerFast, messages: Any) -> tuple[list[int], int] | None:
    """A trace's ids in the student's own layout and the length of its prefix; None for one that can't be laid out."""
    try:
        ids, labels = encode(TEMPLATES[student.template], tokenizer, messages)
    except Unusable:
        return None
    return ids, sum(one < 0 for one in labels)


def calibration(student: Student, variant: Variant, tokenizer: PreTrainedTokenizerFast, dataset: Path) -> torch.Tensor:
    """(pieces, ``calibration_tokens``) ids of training traces in the student's layout, thinking and end included.

    Traces spread over the training split are laid end to end and cut, so a long trace gives its middle and its end too.
    """
    import torch

    table = schema.read(dataset / "train", schema.TRAINING_ROW)
    step = max(1, table.num_rows // variant.calibration_traces)
    some = table.take(list(range(0, table.num_rows, step))[: variant.calibration_traces])
    stream: list[int] = []
    for row in schema.rows(some, ["messages"]):
        if trace := _target(student, tokenizer, row["messages"]):
            stream += trace[0]
    length = min(variant.calibration_tokens, len(stream))
    pieces = torch.tensor(stream[: len(stream) // max(length, 1) * length]).reshape(-1, length)
    if not pieces.numel():
        raise R1DistillError(f"{dataset / 'train'} has no trace to calibrate variants on.")
    return pieces[:: max(1, len(pieces) // variant.calibration_pieces)][: variant.calibration_pieces]


def quantise(variant: Variant, checkpoint: Path, pieces: torch.Tensor | None, out: Path) -> Path:
    """Run AutoRound and return the one folder that it made; ``pieces`` (pieces, tokens) are what it calibrates on."""
    import gc

    import torch
    from auto_round import AutoRound

    scheme, form, settings = recipe(variant)
    count, length = pieces.shape if pieces is not None else (1, 1)
    at_once = max(1, min(8, count, TOKENS_AT_ONCE // length))
    if isinstance(variant, AwqVariant):
        settings["alg_configs"] = "awq" if variant.tuning_steps == 0 else ["awq", "auto_round"]
    if variant.tuning_steps == 0:
        # Without a search for scales each weight is rounded to the nearest level of its own group: seconds.
        settings["disable_opt_rtn"] = not (isinstance(variant, GgufVariant) and variant.weighted)
    else:
        settings["gradient_accumulate_steps"] = max(1, min(8, count) // at_once)
    if isinstance(variant, GgufVariant):
        _prepare_converter(checkpoint)
    gc.collect()
    cuda = torch.cuda.is_available()
    rounding = AutoRound(
        str(checkpoint),
        scheme=scheme,
        iters=variant.tuning_steps,
        dataset=list(pieces.split(1)) if pieces is not None else None,
        nsamples=count,
        seqlen=length,
        batch_size=at_once,
        device_map=torch.cuda.current_device() if cuda else "cpu",
        low_gpu_mem_usage=cuda,  # one block on the GPU at a time, and its inputs in the machine's memory
        enable_torch_compile=cuda,  # which takes longer on a CPU than it saves
        trust_remote_code=False,
        **settings,
    )
    with contextlib.nullcontext() if cuda else _suited_to_cpu():
        rounding.quantize_and_save(output_dir=str(out), format=form)
    return out if (out / "config.json").is_file() else next(path for path in out.iterdir() if path.is_dir())


@contextlib.contextmanager
def _suited_to_cpu() -> Iterator[None]:
    """AutoRound with nothing done for a GPU's sake, and the same weights made.

    Its searches for scales go over a whole tensor at each try; in pieces that stay in a core's cache they take a
    quarter of the time, and blocks don't know of each other. It also collects garbage after every layer, walking all
    the libraries' objects, where reference counts and the collector's own rounds leave none.
    """
    import gc
    from unittest import mock

    from auto_round.data_type import gguf

    def in_pieces(search: Callable[..., Any]) -> Callable[..., Any]:
        def within(data: torch.Tensor, *args: Any, split_num: int = 1, **kwargs: Any) -> Any:
            return search(data, *args, split_num=max(split_num, data.numel() // SEARCHED_AT_ONCE), **kwargs)

        return within

    names = ("make_qx_quants_chunk", "iterative_wls_quant_search")
    searches: dict[str, Any] = {name: in_pieces(getattr(gguf, name)) for name in names}
    with mock.patch.multiple(gguf, **searches), mock.patch.object(gc, "collect", lambda *_: 0):
        yield


def pre_tokenizer(checkpoint: Path) -> str:
    """llama.cpp's name of how the checkpoint's tokenizer cuts text; raises R1DistillError where it knows no such way.

    Read from tokenizer.json: the converter looks for the hash of a sample's ids, which other special tokens change.
    """
    spec = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    parts = spec.get("pretokenizers", [spec])
    patterns = [part["pattern"].get("Regex", "") for part in parts if part.get("type") == "Split"]
    if any(part.get("type") == "Digits" and part.get("individual_digits") for part in parts):
        patterns.append("digits")
    whole = "".join(patterns)
    if whole not in PRE_TOKENIZERS or not any(part.get("type") == "ByteLevel" for part in parts):
        raise R1DistillError(
            f"{checkpoint / 'tokenizer.json'} cuts text in a way that llama.cpp has no name for here ({spec}). "
            "Leave the GGUF variants out of the student's file."
        )
    return PRE_TOKENIZERS[whole]


def _prepare_converter(checkpoint: Path) -> None:
    """Have AutoRound's copy of llama.cpp's converter load, and write our name of the pre-tokenizer into the file."""
    import gguf
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    if not hasattr(gguf.MODEL_ARCH, "DFLASH"):  # named in the file that holds Qwen2, and unknown to gguf 0.19
        gguf.MODEL_ARCH.DFLASH = None
    name, converter = pre_tokenizer(checkpoint), get_conversion(checkpoint)
    importlib.import_module(f"{converter.module.__name__}.base").TextModel.get_vocab_base_pre = lambda *_: name


def _set_dtype(file: Path) -> None:
    """Activations in bf16, which the student was trained in; GPTQ's export says float16."""
    config = json.loads(file.read_text())
    config.pop("torch_dtype", None)
    file.write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))


def probes(student: Student, tokenizer: PreTrainedTokenizerFast, dataset: Path) -> dict[str, Any]:
    """What a runtime is asked to tokenise, with the checkpoint's own ids: conversations, and a whole trace as text."""
    first = next(_rows(dataset, "train"), None)
    question = first["messages"][-2]["content"] if first else "What is 2 + 2?"
    asked = {"role": "user", "content": question}
    talks = [
        [asked],
        [{"role": "system", "content": "Answer briefly."}, asked],
        [asked, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why? Ünïcödé 数学 \n\n  x² ≤ 5"}],
    ]
    template = TEMPLATES[student.template]
    text = template.prefix([asked]) + template.target({"role": "assistant", "thinking": "2 + 2 = 4", "content": "4"})
    return {
        "conversations": [
            {"messages": talk, "ids": tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]}
            for talk in talks
        ],
        "texts": [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}],
    }


if __name__ == "__main__":
    worker.perform(main)
