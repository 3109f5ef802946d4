"""Pieces of Triton kernels in which a program reads a row of logits, block by block, with a running maximum and sum."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # columns that a program holds at a time
WARPS = 16  # two programs fit a multiprocessor's registers: one computes while the other waits for memory


@triton.jit
def exp(x, shift):
    """exp(x - shift); x and shift may be minus infinity, shift only where x is."""
    return tl.exp(x - tl.where(shift == float("-inf"), 0.0, shift))


@triton.jit
def log(x):
    """log(x), minus infinity for 0."""
    return tl.where(x > 0, tl.log(tl.where(x > 0, x, 1.0)), float("-inf"))


@triton.jit
def logaddexp(a, b):
    top = tl.maximum(a, b)
    return tl.where(top == float("-inf"), top, top + log(exp(a, top) + exp(b, top)))


def check(hidden: Tensor) -> None:
    """Raise ValueError for what the kernels can't take."""
    if hidden.element_size() > 4:
        raise ValueError("the fused kernel computes in float32: pass bfloat16 or float32, or take 'reference'.")
    if not hidden.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError("implementation='fused' needs a GPU: take 'reference', or set TRITON_INTERPRET=1 to test it.")
