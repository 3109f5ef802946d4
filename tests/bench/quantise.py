"""Quantising SmolLM2-135M, checks of the files included, beside AutoRound called plainly with the same settings.

At most 1.1 times its time: the ratio of the rates is at least 1 / 1.1.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1distill.data import models
from r1distill.data.config import load
from r1distill.students import base, quantise
from r1distill.students.catalogue import Student
from r1distill.students.dequantise import weights
from r1distill.students.soundness import problems
from r1distill.students.template import TEMPLATES, write_tokenizer

ROUNDS = 2
KINDS = ("q4_k_m", "gptq-4bit", "int8")  # the default chain's; none of them calibrates


def measure() -> Iterator[dict[str, Any]]:
    home = Path(os.environ.get("R1DISTILL_HOME") or "runs")
    student = load("students", "smollm2-135m", Student)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = _checkpoint(student, home, Path(scratch) / "checkpoint")
        for name in KINDS:
            ours: list[float] = []
            peers: list[float] = []
            for number in range(ROUNDS + 1):  # the first loads the libraries
                for times, work in ((ours, _ours), (peers, _plain))[:: 1 if number % 2 else -1]:
                    folder = Path(scratch) / f"{name}-{number}"
                    began = time.perf_counter()
                    work(student, name, checkpoint, folder)
                    times.append(time.perf_counter() - began)
                    shutil.rmtree(folder)
            parameters = student.architecture.parameters / 1e6
            yield {
                "what": f"quantising SmolLM2-135M to {name}",
                "ours": parameters / statistics.median(ours[1:]),
                "peer": parameters / statistics.median(peers[1:]),
                "unit": "M parameters/s",
                "peer_name": "AutoRound called plainly",
                "goal": round(1 / 1.1, 3),
                "note": f"with its files checked, median of {ROUNDS}",
            }


def _checkpoint(student: Student, home: Path, folder: Path) -> Path:
    import torch

    source = models.materialise(student.base, home)
    most = student.architecture.max_position
    tokenizer = write_tokenizer(TEMPLATES[student.template], source, folder, max_tokens=most)
    base.load(student.architecture, source, tokenizer, torch.bfloat16).save_pretrained(folder)
    return folder


def _ours(student: Student, name: str, checkpoint: Path, folder: Path) -> None:
    made = quantise.make(student, name, None, checkpoint, folder)
    if wrong := problems(made, checkpoint, weights(made)):
        raise SystemExit(f"{name}: {wrong}")


def _plain(student: Student, name: str, checkpoint: Path, folder: Path) -> None:
    from auto_round import AutoRound

    scheme, form, settings = quantise.recipe(student.variants[name])
    plain = AutoRound(str(checkpoint), scheme=scheme, iters=0, disable_opt_rtn=True, device_map="cpu", **settings)
    plain.quantize_and_save(output_dir=str(folder), format=form)
