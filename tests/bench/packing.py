"""Tokenising, masking and packing beside TRL's own preparation of the same rows with packing.

Speed: real traces of DeepSeek-R1 with the tokenizer of Qwen2.5 where the folder beside the project is there, else made-up
ones; the ids of every trace are asserted to be the same. Efficiency: lengths of the published domains and means, log-normal
within each. Memory: 800,000 rows whose lengths and context are a sixty-fourth of the real ones, so that the number of
rows and packs is real and the bench takes minutes.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from r1distill.data import schema
from r1distill.data.config import ROOT
from r1distill.students import packing
from r1distill.students.template import TEMPLATES, Unusable, write_tokenizer
from r1distill.students.tokens import tokenise

SHARED = ROOT / ".." / "shared" / "data"
CONTEXT = 32_768
DOMAINS = {"math": (395_285, 6094), "code": (211_129, 7436), "stem": (10_124, 4929), "logic": (10_395, 2739)}
DOMAINS["general"] = (177_812, 1419)  # samples and mean tokens: arXiv:2501.12948 v2, supplement B.4.3
SPREAD = 0.8  # of the lengths' logarithm: an assumption
SMALL = 64  # how much smaller lengths and context are where memory is measured
ROWS = 800_000


def traces() -> tuple[list[dict[str, Any]], str]:
    """Rows of the dataset."""
    file = SHARED / "traces" / "mip_deepseek_r1.jsonl.gz"
    if file.is_file():
        told = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        pairs = [
            (one["prompt"], *one["response"].split("</think>", 1)) for one in told if "</think>" in one["response"]
        ]
        return [row(number, *map(str.strip, pair)) for number, pair in enumerate(pairs)], "real R1 traces"
    rng = random.Random(0)
    lexicon = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(5000)]
    texts = [" ".join(rng.choices(lexicon, k=rng.randrange(300, 4000))) for _ in range(1000)]
    return [row(number, "What is it?", text, "It is so.") for number, text in enumerate(texts)], "made-up traces"


def row(number: int, question: str, thinking: str, response: str) -> dict[str, Any]:
    """One trace as the dataset has it."""
    messages = [
        {"role": "user", "content": question, "thinking": None},
        {"role": "assistant", "content": response, "thinking": thinking},
    ]
    about = {"domain": "math", "source": "bench", "license": "mit", "completion_tokens": 1, "pass_rate": 1.0}
    return {"prompt_id": f"p{number}", "sample": 0, "messages": messages, **about}


def tokenizer(folder: Path) -> Any:
    """Qwen2.5's with R1's names, or one of bytes alone."""
    base = folder / "base"
    base.mkdir()
    file = SHARED / "tokenizers" / "qwen2.5" / "tokenizer.json.gz"
    if file.is_file():
        (base / "tokenizer.json").write_bytes(gzip.decompress(file.read_bytes()))
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        names = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytes_alone = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
        bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bytes_alone.decoder = decoders.ByteLevel()
        bytes_alone.add_special_tokens([name for name, _ in TEMPLATES["r1"].renames["<|endoftext|>"].values()])
        bytes_alone.add_special_tokens(["<|vision_pad|>"])
        bytes_alone.save(str(base / "tokenizer.json"))
    return write_tokenizer(TEMPLATES["r1"], base, folder / "tokenizer", max_tokens=CONTEXT)


def ours(words: Any, rows: list[dict[str, Any]], folder: Path) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds from the dataset on disk to packs on disk, and the ids of every trace."""
    schema.write(folder / "rows", schema.TRAINING_ROW, rows)
    began = time.perf_counter()
    tokens = tokenise(TEMPLATES["r1"], words, folder / "rows", folder / "work", CONTEXT, "bench")
    packing._write_packs(tokens, CONTEXT, folder / "packs")
    seconds = time.perf_counter() - began
    packs = list(schema.rows(schema.read(folder / "packs", schema.PACK)))
    return seconds, [tuple(packing.member(pack, n)[0]) for pack in packs for n in range(len(pack["seq_lengths"]))]


def trls(words: Any, rows: list[dict[str, Any]]) -> tuple[float, list[tuple[int, ...]]]:
    """The same by SFTTrainer's own preparation, with its defaults."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    talks = [
        {
            "prompt": [{"role": "user", "content": one["messages"][0]["content"]}],
            "completion": [{key: one["messages"][1][key] for key in ("role", "content", "thinking")}],
        }
        for one in rows
    ]
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(talks).save_to_disk(folder)
        data = datasets.load_from_disk(folder)
        datasets.disable_caching()
        settings = SFTConfig(output_dir=folder, packing=True, max_length=CONTEXT, use_cpu=True, bf16=False)
        trainer = SimpleNamespace(_tokenizer=words, chat_template=None, completion_only_loss=True)
        began = time.perf_counter()
        packed = SFTTrainer._prepare_dataset(trainer, data, words, settings, True, None, "train")
        seconds = time.perf_counter() - began
        found = []
        for pack in packed:
            ends = np.cumsum(pack["seq_lengths"])
            starts = ends - np.array(pack["seq_lengths"])
            found += [tuple(pack["input_ids"][a:b]) for a, b in zip(starts, ends, strict=True)]
    return seconds, found


def lengths(count: int) -> np.ndarray:
    """(count,) tokens of traces up to the context, the published shares and means of every domain."""
    rng = np.random.default_rng(0)
    total = sum(samples for samples, _ in DOMAINS.values())
    parts = []
    for samples, mean in DOMAINS.values():
        wanted = round(count * samples / total)
        center = np.log(mean) - SPREAD**2 / 2
        for _ in range(20):  # cutting off what is too long lowers the mean: the center goes up until it is right
            drawn = rng.lognormal(center, SPREAD, 4 * wanted)
            drawn = drawn[drawn <= CONTEXT][:wanted]
            center += np.log(mean / drawn.mean())
        parts.append(np.maximum(drawn.astype(np.int64), 8))
    drawn = np.concatenate(parts)
    rng.shuffle(drawn)
    return drawn


def filled(sizes: np.ndarray, packs: int) -> float:
    return float(sizes.sum() / (packs * CONTEXT))


def trl_filled(sizes: np.ndarray) -> float:
    """TRL's bfd on rows of one byte a token: their lengths are all it looks at."""
    from datasets import Dataset
    from trl import pack_dataset

    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int64())
    values = pa.array(np.zeros(int(sizes.sum()), np.int8))
    rows = pa.table({"input_ids": pa.LargeListArray.from_arrays(offsets, values)})
    packed = pack_dataset(Dataset(rows), CONTEXT, "bfd", {"batch_size": len(sizes)})
    return filled(sizes, len(packed))


def peak_gib(folder: str) -> float:
    """In a process of its own: pack ROWS small rows and give the most memory it held, the pages of files among it."""
    root = Path(folder)
    rng = random.Random(0)
    text = "".join(rng.choices("0123456789", k=4 * CONTEXT // SMALL))
    sizes = np.minimum(np.maximum(lengths(ROWS) // SMALL - 24, 1), CONTEXT // SMALL - 40)
    with schema.writing(root / "rows", schema.TRAINING_ROW) as writer:
        for number, size in enumerate(sizes.tolist()):
            writer.append(row(number, str(number), text[: int(size)], "1"))
    words = tokenizer(root)
    tokens = tokenise(TEMPLATES["r1"], words, root / "rows", root / "work", CONTEXT // SMALL, "bench")
    measures, _ = packing._write_packs(tokens, CONTEXT // SMALL, root / "packs")
    assert measures["traces"] == len(sizes), measures
    # Not getrusage's: that of a process which has started another counts there too.
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / (1 << 20)


def measure() -> Iterator[dict[str, Any]]:
    """Speed, efficiency and memory."""
    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer(Path(folder))
        rows, what = traces()
        rows = [one for one in rows if usable(words, one)]
        their_seconds, theirs = trls(words, rows)
        our_seconds, mine = ours(words, rows, Path(folder))
        assert sorted(mine) == sorted(theirs), "the ids differ"
        count = sum(map(len, mine))
        yield {
            "what": "tokenise + mask + pack, same ids",
            "ours": count / our_seconds,
            "peer": count / their_seconds,
            "unit": "tokens/s",
            "peer_name": "TRL's preparation",
            "goal": 5,
            "note": f"({len(rows):,} {what}, {count / 1e6:.1f} M tokens)",
        }
    sizes = lengths(40_000)
    yield {
        "what": "packing efficiency at 32,768 on R1's lengths",
        "ours": filled(sizes, len(packing.best_fit_decreasing(sizes, CONTEXT))),
        "peer": trl_filled(sizes),
        "unit": "filled",
        "peer_name": "TRL bfd",
        "goal": 1,
        "note": f"({len(sizes):,} lengths)",
    }
    everything = lengths(sum(samples for samples, _ in DOMAINS.values()))
    yield {
        "what": "packing efficiency of all of R1's traces",
        "ours": filled(everything, len(packing.best_fit_decreasing(everything, CONTEXT))),
        "peer": 0.999,
        "unit": "filled",
        "peer_name": "the goal",
        "goal": 1,
        "note": f"({len(everything):,} lengths)",
    }
    with tempfile.TemporaryDirectory() as folder:
        code = f"import runpy; print(runpy.run_path({__file__!r})['peak_gib']({folder!r}))"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        peak = float(done.stdout.split()[-1])
    yield {
        "what": f"memory while packing {ROWS:,} rows",
        "ours": 2 / peak,
        "peer": 1,
        "unit": "of the 2 GiB allowed",
        "peer_name": "the goal",
        "goal": 1,
        "note": f"(peak {peak:.2f} GiB)",
    }


def usable(words: Any, one: dict[str, Any]) -> bool:
    """Whether both can take a row, and cut it into the same tokens: where thinking begins with a newline, or a text
    holds a control token, the two mean different things."""
    try:
        before, after = TEMPLATES["r1"].texts(one["messages"])
    except Unusable:
        return False
    return not after.startswith("\n") and len(words.encode(before + after, add_special_tokens=False)) <= CONTEXT
