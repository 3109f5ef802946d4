"""Measures the kernels on a GPU beside their peers: ``make bench-gpu``, or ``python -m r1distill.kernels.bench``.

Every part (a peer, or what ours is measured for) runs in a process of its own, so that one that fails, hangs or breaks
the device takes nothing with it; what it printed so far is kept. Ours is checked against float64 first, and nothing is
measured where that fails. The table is printed and written with all runs to $R1DISTILL_HOME/bench/gpu-*.{md,json} after
each part. Exits 0; 1 where the check fails or ours can't be measured; 2 without a GPU.

``--rehearse`` goes through all of it on the CPU at tiny shapes, to try the script itself: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

TOKENS, K = 32_768, 64
SHAPES = ((1536, 151_936), (3584, 152_064), (5120, 152_064))  # (H, V) of qwen-1.5b, qwen-7b, qwen-14b and 32b
TINY_TOKENS, TINY = 96, ((32, 507), (48, 512))
PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "cut-cross-entropy", "veomni")
Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="what does not fit in is not run (default 9)")
    parser.add_argument("--only", nargs="*", default=[], help="parts to run; default all")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, to try the script")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = "cpu" if asked.rehearse else "cuda"
    if asked.part:
        return part(asked.part, device)
    if not asked.rehearse and not _has_gpu():
        print("bench-gpu needs an NVIDIA GPU and there is none here: nothing was measured.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * asked.minutes
    records: list[Record] = [{"part": "machine", **_machine(device)}]
    folder = Path(os.environ.get("R1DISTILL_HOME") or "runs") / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"gpu-{'rehearsal-' if asked.rehearse else ''}{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = _parts()
    if unknown := set(asked.only) - set(names):
        print(f"there is no part {sorted(unknown)[0]!r}; there are: {', '.join(names)}", file=sys.stderr)
        return 2
    for name in [name for name in names if not asked.only or name in asked.only]:
        left = deadline - time.monotonic()
        found = _run(name, device, left) if left > 15 else [{"part": name, "error": "not run: out of time"}]
        records += found
        stem.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(records))
        for one in found:
            print(_line(one), file=sys.stderr, flush=True)
        if name == "check" and any(one.get("faults") or one.get("error") for one in found):
            return 1
    print(table(records))
    print(f"all runs: {stem.with_suffix('.json')}", file=sys.stderr)
    return int(not any(one["part"] == "ours" and "median" in one for one in records) and not asked.only)


def _parts() -> list[str]:
    from r1distill.kernels.token_scores import benchmark as scores
    from r1distill.kernels.topk_kl import benchmark as loss

    first = ["check", "floor", "ours", "VeOmni", "Liger", *scores.CONTENDERS, "sweep"]
    return [*first, *(name for name in loss.CONTENDERS if name not in first), "ours again"]


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def _machine(device: str) -> Record:
    """The card, its driver, and the versions of what is measured."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: Record = {"device": device, "versions": versions, "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            found["nvidia_smi"] = str(error)
        found |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def _run(name: str, device: str, seconds: float) -> list[Record]:
    """The records that a part printed, and why it ended where it did not end well."""
    command = [sys.executable, "-P", "-m", "r1distill.kernels.bench", "--part", name]
    command += ["--rehearse"] if device == "cpu" else []
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    limit = min(seconds, 240.0)
    error = None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        printed = done.stdout
        if done.returncode:
            error = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
            error = f"ended with {done.returncode}: {error}"
    except subprocess.TimeoutExpired as late:
        printed = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        error = f"cut off after {limit:.0f} s"
    records = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and line.endswith("}")]
    return records + ([{"part": name, "error": error}] if error else [])


def part(name: str, device: str) -> int:
    """In the process of one part: print its records, one a line."""
    import torch

    from r1distill.kernels import timing
    from r1distill.kernels.token_scores import benchmark as scores
    from r1distill.kernels.topk_kl import benchmark as loss

    def tell(**record: Any) -> None:
        print(json.dumps({"part": name, **record}), flush=True)

    tokens, shapes = (TOKENS, SHAPES) if device == "cuda" else (TINY_TOKENS, TINY)
    seconds = 3.0 if device == "cuda" else 0.0
    if name == "check":
        tell(faults=loss.check(device) + scores.check(device))
        return 0
    if name == "floor":
        tell(**timing.gemm_flops(device))
        return 0
    for width, vocab in shapes:
        shape = {"tokens": tokens, "width": width, "vocab": vocab}
        try:
            if name in scores.CONTENDERS:
                one = loss.inputs(tokens, width, vocab, 0, device)
                call = scores.CONTENDERS[name](one.hidden.detach(), one.weight.detach(), one.labels)
                tell(**shape, **timing.measure(call, device, seconds=seconds))
                continue
            one = loss.inputs(tokens, width, vocab, K, device)
            if name == "sweep":
                _sweep(one, device, lambda **record: tell(**shape, **record))  # noqa: B023 - called at once
                return 0
            make, what = loss.CONTENDERS[name.removesuffix(" again")]
            true = loss.expected(one, what)
            call = make(one)
            found = call().item()
            done = timing.measure(call, device, seconds=seconds)
            tell(**shape, computes=what, loss=found, expected=true, **done)
        except torch.cuda.OutOfMemoryError:
            tell(**shape, error="out of memory")
        except Exception as error:
            tell(**shape, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
        one = call = None  # type: ignore[assignment]
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


def _sweep(one: Any, device: str, tell: Any) -> None:
    """The kernel alone on one chunk, for several sizes of block: what ``row.BLOCK`` and ``row.WARPS`` should be."""
    if device != "cuda":
        return
    from r1distill.kernels import timing
    from r1distill.kernels.topk_kl import fused
    from r1distill.kernels.topk_kl.reference import Terms

    rows, vocab = 2048, one.weight.shape[0]
    logits = one.hidden.new_empty(rows, vocab).normal_()
    scale = one.logprobs.new_full((rows,), 1e-3)
    inputs = (one.labels[:rows], one.ids[:rows], one.logprobs[:rows], scale, Terms(1.0, 1.0, 0.1, "bucket"))
    for block, warps in ((2048, 4), (4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32), (32768, 32)):
        call = lambda: fused.losses_(logits, *inputs, gradient=True, block=block, warps=warps)  # noqa: B023, E731
        done = timing.measure(call, device, seconds=0.3, least=10, most=100)
        moved = 3 * logits.numel() * logits.element_size()
        tell(block=block, warps=warps, bytes_per_second=moved / done["median"], **done)


def _line(one: Record) -> str:
    """A record in a line, for who watches."""
    where = f" H={one['width']} V={one['vocab']}" if "width" in one else ""
    if "error" in one:
        return f"{one['part']}{where}: {one['error']}"
    if "faults" in one:
        return f"{one['part']}: {'; '.join(one['faults']) or 'right'}"
    more = (
        f", block {one['block']} x {one['warps']} warps, {one['bytes_per_second'] / 1e12:.2f} TB/s"
        if "block" in one
        else ""
    )
    more += f", loss {one['loss']:.5f} (expected {one['expected']:.5f})" if "loss" in one else ""
    more += f", {one['flops'] / 1e12:.0f} TFLOP/s" if "flops" in one else ""
    return f"{one['part']}{where}: {1000 * one['median']:.2f} ms{more}"


def table(records: list[Record]) -> str:
    """What was measured against what was wanted, in Markdown; a line for each that could not be measured."""
    machine = next(one for one in records if one["part"] == "machine")
    times = {(one["part"], one["width"], one["vocab"]): one for one in records if "median" in one and "width" in one}
    shapes = list(dict.fromkeys((width, vocab) for _, width, vocab in times))
    flops = next((one["flops"] for one in records if "flops" in one), None)
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine["versions"].items())
    title = f"{machine.get('card', 'CPU: a rehearsal, these figures mean nothing')}, {machine['at']}: {versions}"
    lines = [title, "", "| measure | H, V | ours | peer | ratio | goal | |", "|---|---|---|---|---|---|---|"]

    def row(measure: str, shape: tuple[int, int], ours: str, peer: str, ratio: float, bound: str, met: bool) -> None:
        verdict = "met" if met else "missed"
        lines.append(
            f"| {measure} | {shape[0]:,}, {shape[1]:,} | {ours} | {peer} | {ratio:.3f} | {bound} | {verdict} |"
        )

    def beside(measure: str, shape: tuple[int, int], names: tuple[str, str], key: str, most: float) -> None:
        one, other = (times.get((name, *shape)) for name in names)
        if one and other and one[key] is not None:
            ratio = one[key] / other[key]
            row(
                measure,
                shape,
                _shown(one[key]),
                f"{_shown(other[key])} ({names[1]})",
                ratio,
                f"≤ {most:g}",
                ratio <= most,
            )

    def memory(measure: str, shape: tuple[int, int], name: str, most: float) -> None:
        one = times.get((name, *shape))
        if one and one["peak_bytes"] is not None:
            gb = one["peak_bytes"] / 1e9
            row(measure, shape, _shown(one["peak_bytes"]), f"{most:g} GB", gb / most, "≤ 1", gb <= most)

    for shape in shapes:
        beside("forward and backward", shape, ("ours", "VeOmni"), "median", 0.5)
        beside("peak memory", shape, ("ours", "VeOmni"), "peak_bytes", 1.0)
        beside("forward and backward", shape, ("ours", "Liger"), "median", 1.10)
        memory("peak memory beyond inputs and gradients", shape, "ours", 1.3)
        ours = times.get(("ours", *shape))
        if ours and flops:
            floor = 6 * ours["tokens"] * shape[0] * shape[1] / flops
            share = floor / ours["median"]
            row("share of the GEMM floor", shape, _shown(ours["median"]), _shown(floor), share, "≥ 0.75", share >= 0.75)
        most = 1.2 if shape[0] >= 3584 else 1.5
        beside("token_scores beside the product", shape, ("token_scores", "product"), "median", most)
        memory("token_scores' memory", shape, "token_scores", 1.0)
    lines += [
        "",
        "| part | computes | H, V | time | beyond inputs and gradients | loss off by |",
        "|---|---|---|---|---|---|",
    ]
    for (name, width, vocab), one in times.items():
        if "block" not in one:
            peak = "" if one["peak_bytes"] is None else _shown(one["peak_bytes"])
            off = f"{abs(one['loss'] / one['expected'] - 1):.1e}" if "loss" in one else ""
            where = f"{width:,}, {vocab:,}"
            lines.append(f"| {name} | {one.get('computes', '')} | {where} | {_shown(one['median'])} | {peak} | {off} |")
    lines += ["", *(f"- {_line(one)}" for one in records if "error" in one or one.get("faults")), ""]
    return "\n".join(lines)


def _shown(value: float) -> str:
    """Seconds (floats) in ms, bytes (integers) in GB."""
    return f"{value / 1e9:.2f} GB" if isinstance(value, int) else f"{1000 * value:.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
