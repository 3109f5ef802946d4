"""Hardware: what the planner has to know of a machine or a cluster, read from a file or off the machine itself."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from r1distill.data.config import Settings, execution, load

GIB = 1 << 30

# Share of a GPU's bf16 peak that full training reaches at its best, recomputation not counted. Hopper: torchtitan's 8B
# reaches 32% at 8k and 29% at 32k (docs/performance.md), NeMo AutoModel's 70B at 8k 40% (its performance summary), the
# Llama 3 report 38-43% (arXiv 2407.21783, table 4). Ampere has less peak for its bandwidth: torchtitan's 8B at 8k on
# A100 51%, its 70B 48%. Other GPUs are taken to be like Hopper.
TRAINING_UTILISATION = 0.36
AMPERE_UTILISATION = 0.48


class Gpu(NamedTuple):
    """What nvidia-smi does not tell of a product: the vendor's data sheets, dense rates without sparsity."""

    part: str  # of the product's name
    bf16_tflops: float
    bandwidth_tb_per_second: float
    link_gb_per_second: float  # to the other GPUs of its machine, one way: NVLink, or its PCIe slot
    training_utilisation: float = TRAINING_UTILISATION


# The first match counts. NVLink moves 1,800 (B200), 900 (H100, H200), 600 (A100), 400 (H800) GB/s both ways together;
# PCIe 5 x16 64, PCIe 4 x16 32 GB/s each way.
GPUS = (
    Gpu("B200", 2250, 8.0, 900),
    Gpu("H200 NVL", 835, 4.8, 64),
    Gpu("H200", 989, 4.8, 450),
    Gpu("H100 PCIe", 756, 2.0, 64),
    Gpu("H100 NVL", 835, 3.9, 64),
    Gpu("H100", 989, 3.35, 450),
    Gpu("H800", 989, 3.35, 200),
    Gpu("A100 80GB PCIe", 312, 1.94, 32, AMPERE_UTILISATION),
    Gpu("A100-PCIE", 312, 1.56, 32, AMPERE_UTILISATION),
    Gpu("A100-SXM4-40GB", 312, 1.56, 300, AMPERE_UTILISATION),
    Gpu("A100", 312, 2.04, 300, AMPERE_UTILISATION),
    Gpu("L40S", 362, 0.864, 32),
    Gpu("RTX PRO 6000", 503, 1.8, 64),
    Gpu("RTX 5090", 209, 1.79, 64),
    Gpu("RTX 4090", 165, 1.01, 32),
    Gpu("RTX 3090", 71, 0.94, 32),
)

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
    training_utilisation: float = Field(TRAINING_UTILISATION, gt=0, le=1)  # share of the bf16 peak
    link: Link = "none"  # between the GPUs of a node
    link_gb_per_second: float = Field(0, ge=0)  # of one GPU to the others of its node, one way; 0: not known
    network_gb_per_second: float = Field(0, ge=0)  # of one node to the others, all its cards together, one way
    hosts: tuple[str, ...] = execution(())  # names of several nodes; the first is the one that a run is started on
    ray_address: str | None = execution(None)  # a Ray cluster's head ("auto": this one's); it judges, samples, serves
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
    def kind(self) -> str:
        """What measurements are told apart by: nodes, GPUs and their memory; cores and memory where there is no GPU."""
        if not self.gpus:
            return f"{self.cores} cores, {self.memory_gib:.0f} GiB"
        one = f"{self.gpu_memory_gib:.0f} GiB and {self.gpu_bf16_tflops:.0f} TFLOPS"
        return f"{self.nodes} x {self.gpus_per_node} GPUs of {one}"

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
    sheet = _data_sheet(model) or Gpu("", 0, 0, 0)
    return Hardware(
        name="local",
        cores=_cores(),
        memory_gib=_memory_gib(),
        disk_gib=max(shutil.disk_usage(_existing(home or Path.cwd())).free / GIB, 0.01),
        gpu=model,
        gpus_per_node=len(gpus),
        gpu_memory_gib=min((memory for _, memory in gpus), default=memory_gib),
        gpu_bf16_tflops=sheet.bf16_tflops,
        gpu_bandwidth_tb_per_second=sheet.bandwidth_tb_per_second,
        training_utilisation=sheet.training_utilisation,
        link_gb_per_second=sheet.link_gb_per_second,
        link=("nvlink" if sheet.link_gb_per_second > 64 else "pcie") if model else "none",
    )


def _data_sheet(model: str | None) -> Gpu | None:
    return next((gpu for gpu in GPUS if gpu.part.lower() in (model or "").lower()), None)


def gpu_memory_used_gib() -> float:
    """The memory that is in use on the fullest GPU, 0 where there is none."""
    used = ask_nvidia_smi("memory.used") if shutil.which("nvidia-smi") else []
    return max((int(row[0]) / 1024 for row in used if row[0].isdigit()), default=0.0)


def _gpus() -> list[tuple[str, float]]:
    """(product name, memory in GiB) of each visible NVIDIA GPU; CUDA_VISIBLE_DEVICES is respected."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    rows = ask_nvidia_smi("name,memory.total") if shutil.which("nvidia-smi") else []
    found = [(name, int(memory) / 1024) for name, memory in rows if memory.isdigit()]
    if visible is None:
        return found
    wanted = [part.strip() for part in visible.split(",")]
    return [gpu for index, gpu in enumerate(found) if str(index) in wanted] or found[: len(wanted)]


def ask_nvidia_smi(fields: str) -> list[list[str]]:
    """A row of the named fields for each GPU; none where the tool or its driver is missing."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # the tool without its driver, as in many containers
    return [
        [cell.strip() for cell in row] for row in csv.reader(answer.splitlines()) if len(row) == fields.count(",") + 1
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
