"""The Triton kernels without a GPU: run in the interpreter, compiled for one that isn't there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        Path(__file__).with_name("interpreted.py"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


LOSS = {"BUCKET": True, "GRADIENT": True, "BLOCK_K": 64}
KERNELS = [
    ("topk_kl", {**LOSS, "TEMPERED": False}),
    ("topk_kl", {**LOSS, "TEMPERED": True, "BLOCK_K": 256}),
    ("topk_kl", {**LOSS, "TEMPERED": True, "BUCKET": False, "GRADIENT": False}),
    ("token_scores", {"GROUP": 32}),
]


@pytest.mark.parametrize(("kernel", "constants"), KERNELS, ids=str)
def test_compiled_for_a_gpu_it_keeps_to_its_registers(kernel, constants, tmp_path, monkeypatch):
    """Machine code for the H100 by Triton's own compiler and assembler: nothing spills, two programs fit a
    multiprocessor, rows are read 16 bytes at a time."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget

    from r1distill.kernels import row

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    fused = importlib.import_module(f"r1distill.kernels.{kernel}.fused")
    constants = {**constants, "BLOCK": row.BLOCK}
    types = {
        **dict.fromkeys(("LOGITS", "MAXIMA"), "*bf16"),
        **dict.fromkeys(("LABELS", "IDS"), "*i64"),
        **dict.fromkeys(("LOGPROBS", "SCALE", "LOSSES", "ENTROPY", "LSE"), "*fp32"),
        **dict.fromkeys(("stride", "vocab", "k", "groups"), "i32"),
        **dict.fromkeys(("rate", "kl_weight", "ce_weight"), "fp32"),
    }
    names = fused._row.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    aligned |= {(names.index(name),): [["tt.divisibility", 16]] for name in ("stride", "vocab")}
    source = triton.compiler.ASTSource(fused._row, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": row.WARPS})
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert stack == 0 and 2 * registers * row.WARPS * 32 <= 65536, usage
    assert re.search(r"ld\.global\S*\.v4", made.asm["ptx"])
