"""Hardware: what the planner has to know of a machine or a cluster, read from a file or off the machine itself."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from r1distill.data.config import Settings, execution, load

GIB = 1 << 30

# What nvidia-smi does not tell: (part of the product's name, dense bf16 TFLOPS, memory bandwidth in TB/s), the vendor's
# data sheets, without sparsity. The first match counts.
GPUS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 8.0),
    ("H200", 989, 4.8),
    ("H100 PCIe", 756, 2.0),
    ("H100 NVL", 835, 3.9),
    ("H100", 989, 3.35),
    ("H800", 989, 3.35),
    ("A100", 312, 2.0),
    ("L40S", 362, 0.864),
    ("RTX PRO 6000", 503, 1.8),
    ("RTX 5090", 209, 1.79),
    ("RTX 4090", 165, 1.01),
    ("RTX 3090", 71, 0.94),
)

NVLINKED = ("A100", "H100", "H200", "B200")

Link = Literal["none", "pcie", "nvlink"]


class Hardware(Settings):
    """A machine, or several of one kind. Memory and disk are one node's; without GPUs the CPU does the work."""

    name: str = execution("local")
    nodes: int = Field(1, ge=1)
    cores: int = Field(1, ge=1)  # per node
    memory_gib: float = Field(gt=0)  # per node
    disk_gib: float = Field(gt=0)  # free, per node
    gpu: str | None = None
    gpus_per_node: int = Field(0, ge=0)
    gpu_memory_gib: float = Field(0, ge=0)  # of one GPU, as nvidia-smi counts it
    gpu_bf16_tflops: float = Field(0, ge=0)  # of one GPU, dense
    gpu_bandwidth_tb_per_second: float = Field(0, ge=0)  # of one GPU's memory
    link: Link = "none"  # between the GPUs of a node
    ray_address: str | None = execution(None)  # a Ray cluster's head ("auto": this machine's) that judges and samples
    price_usd_per_gpu_hour: Decimal | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _complete(self) -> Hardware:
        if self.gpus_per_node and not self.gpu_memory_gib:
            raise ValueError("a machine with GPUs needs gpu_memory_gib")
        return self

    @property
    def gpus(self) -> int:
        """GPUs of all nodes together."""
        return self.nodes * self.gpus_per_node

    @property
    def title(self) -> str:
        """The hardware in the words a person would use."""
        nodes = f"{self.nodes} nodes, each " if self.nodes > 1 else ""
        gpus = f"{self.gpus_per_node} x {self.gpu or 'GPU'} of {self.gpu_memory_gib:.0f} GiB" if self.gpus else "no GPU"
        return (
            f"{nodes}{gpus}, {self.cores} cores, {self.memory_gib:.0f} GiB of memory, {self.disk_gib:.0f} GiB of disk"
        )


def named(name: str | None, home: Path | None = None) -> Hardware:
    """The hardware of that name in ``configs/hardware``; this machine for None and 'local'."""
    return detect(home) if name in (None, "local") else load("hardware", str(name), Hardware)


def detect(home: Path | None = None) -> Hardware:
    """This machine, within milliseconds and without torch. ``home`` is where artifacts go: its disk counts."""
    gpus = _gpus()
    model, memory_gib = gpus[0] if gpus else (None, 0.0)
    tflops, bandwidth = next(((t, b) for part, t, b in GPUS if model and part.lower() in model.lower()), (0.0, 0.0))
    return Hardware(
        name="local",
        cores=_cores(),
        memory_gib=_memory_gib(),
        disk_gib=max(shutil.disk_usage(_existing(home or Path.cwd())).free / GIB, 0.01),
        gpu=model,
        gpus_per_node=len(gpus),
        gpu_memory_gib=min((memory for _, memory in gpus), default=memory_gib),
        gpu_bf16_tflops=tflops,
        gpu_bandwidth_tb_per_second=bandwidth,
        link=("nvlink" if any(part in model for part in ("A100", "H100", "H200", "B200")) else "pcie")
        if model
        else "none",
    )


def _gpus() -> list[tuple[str, float]]:
    """(product name, memory in GiB) of each visible NVIDIA GPU; CUDA_VISIBLE_DEVICES is respected."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    found = _ask_nvidia_smi() if shutil.which("nvidia-smi") else []
    if visible is None:
        return found
    wanted = [part.strip() for part in visible.split(",")]
    return [gpu for index, gpu in enumerate(found) if str(index) in wanted] or found[: len(wanted)]


def _ask_nvidia_smi() -> list[tuple[str, float]]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without its driver, as in many containers
    return [
        (row[0].strip(), int(row[1]) / 1024)
        for row in csv.reader(answer.splitlines())
        if len(row) == 2 and row[1].strip().isdigit()
    ]


def _cores() -> int:
    """Cores this process may use: a container or taskset may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    """The machine's memory, or the limit of the control group that this process lives in where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total / GIB


def _existing(path: Path) -> Path:
    """The nearest folder that exists already: ``path`` itself, or one above it."""
    return next(folder for folder in (path, *path.resolve().parents) if folder.is_dir())
