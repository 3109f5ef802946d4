"""Top-k distillation loss on the CPU, forward and backward, beside the same loss on whole logits through autograd.

Peak memory is what a process of its own needed beyond inputs and gradients (the kernel's high-water mark of its resident
set), so more tokens a GiB is better; losses are asserted to agree. Time is CPU time, which other work on the machine
sways less. At T = 2,048, H = 1,536, V = 152,064, float32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

TOKENS, WIDTH, VOCAB, K = 2048, 1536, 152_064, 64
ONE = """
import json, resource, sys, time
import torch
from r1distill.kernels.topk_kl import topk_kl_loss
from r1distill.kernels.topk_kl.reference import Terms, token_losses
kind, tokens, width, vocab, k = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
hidden = torch.randn(tokens, width).requires_grad_()
weight = torch.randn(vocab, width).mul_(width ** -0.5).requires_grad_()
labels = torch.randint(vocab, (tokens,))
ids = torch.arange(k).repeat(tokens, 1) * 997 + torch.arange(tokens)[:, None]
logprobs = torch.randn(tokens, k).log_softmax(1) - 0.1

def loss(rows):
    if kind == "ours":
        return topk_kl_loss(hidden[:rows], weight, labels[:rows], ids[:rows], logprobs[:rows], ce_weight=0.1)
    logits = hidden[:rows] @ weight.t()
    return token_losses(logits, labels[:rows], ids[:rows], logprobs[:rows], Terms(1.0, 1.0, 0.1, "bucket")).mean()

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
loss(8).backward()
hidden.grad = weight.grad = None
before = peak() - 4 * vocab * width  # less the warm-up's gradient, which is freed
began = time.process_time()
value = loss(tokens)
value.backward()
seconds = time.process_time() - began
gradients = 4 * (vocab + tokens) * width
print(json.dumps({"loss": value.item(), "seconds": seconds, "bytes": peak() - before - gradients}))
"""


def run(kind: str) -> dict[str, float]:
    command = [sys.executable, "-P", "-c", ONE, kind, *map(str, (TOKENS, WIDTH, VOCAB, K))]
    done: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return done


def measure() -> Iterator[dict]:
    ours, dense = run("ours"), run("dense")
    if abs(ours["loss"] - dense["loss"]) > 1e-4 * abs(dense["loss"]):
        raise AssertionError(f"another loss than the dense one: {ours['loss']}, {dense['loss']}")
    shape = f"T = {TOKENS:,}, V = {VOCAB:,}, H = {WIDTH:,}, k = {K}, float32"
    yield {
        "what": "top-k KL + CE: tokens a GiB beyond inputs and gradients",
        "ours": TOKENS / (ours["bytes"] / 2**30),
        "peer": TOKENS / (dense["bytes"] / 2**30),
        "unit": "tokens/GiB",
        "peer_name": "whole logits through autograd",
        "goal": 5.0,
        "note": f"{shape}: {ours['bytes'] / 2**30:.2f} GiB beside {dense['bytes'] / 2**30:.2f}",
    }
    yield {
        "what": "top-k KL + CE: forward and backward",
        "ours": TOKENS / ours["seconds"],
        "peer": TOKENS / dense["seconds"],
        "unit": "tokens/CPU s",
        "peer_name": "whole logits through autograd",
        "goal": 1.0,
        "note": shape,
    }
