"""What each stage that serves, trains, scores or quantises would take of a hardware, and whether it fits.

The formulas live in ``estimate``; here they meet the settings, and layouts that the stages can run are tried in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from r1distill.data.models import title
from r1distill.data.settings import Benchmark
from r1distill.pipeline import calibration, estimate, footprint
from r1distill.pipeline.calibration import Measurement
from r1distill.pipeline.estimate import Memory, ServingLayout, TrainingJob
from r1distill.pipeline.footprint import Footprint
from r1distill.pipeline.hardware import GIB, Hardware
from r1distill.pipeline.workload import Workload, questions_asked
from r1distill.students.catalogue import Student
from r1distill.teacher.serve import CPU_ENVIRONMENT
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Teacher, VllmTeacher

MACHINE_SHARE = 0.95  # of a machine's memory; the rest is the system's
CPU_KV_GIB = float(CPU_ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"])


@dataclass(frozen=True)
class StagePlan:
    """One stage on one hardware. Memory is GiB by part on one ``device``; what is not known is None."""

    stage: str
    work: str
    fits: bool = True
    device: str = ""  # "a GPU" or "the machine"; empty where the stage needs none of its own
    memory: Memory = field(default_factory=dict)
    available_gib: float = 0.0
    layout: str = ""
    reason: str = ""  # why it doesn't fit
    rejected: tuple[str, ...] = ()  # layouts that don't fit, with the reason
    tokens: int | None = None
    tokens_per_second: float | None = None
    hours: float | None = None
    gpu_hours: float | None = None
    usd: Decimal | None = None
    note: str = ""
    subject: str = ""  # whose work it is: the student's name, or the teacher's
    measured: Measurement | None = None  # the last time this was done on such hardware

    @property
    def needed_gib(self) -> float:
        return sum(self.memory.values())

    @property
    def shortage(self) -> str:
        """Needed and available memory in words."""
        return (
            f"{self.needed_gib:,.1f} GiB are needed on {self.device} ({parts(self.memory)}), "
            f"{self.available_gib:,.1f} can be used"
        )

    def at(self, tokens: int | None, rate: float | None, hardware: Hardware) -> StagePlan:
        """With speed, hours and price; a stage that doesn't fit has none."""
        if not self.fits:
            return self
        answer = replace(self, tokens=tokens, tokens_per_second=rate)
        return answer.lasting(tokens / rate / 3600, hardware) if tokens and rate else answer

    def lasting(self, hours: float, hardware: Hardware) -> StagePlan:
        """With hours, and what they cost where the hardware has a price."""
        gpu_hours = hours * hardware.gpus if hardware.gpus else None
        price, usd = hardware.price_usd_per_gpu_hour, self.usd
        if gpu_hours is not None and price is not None:
            usd = (Decimal(str(gpu_hours)) * price).quantize(Decimal("0.01"))
        return replace(self, hours=hours, gpu_hours=gpu_hours, usd=usd)

    def calibrated(self, measured: Sequence[Measurement], hardware: Hardware) -> StagePlan:
        """With what was last measured of this very work on such hardware: its speed takes the prediction's place, and
        what has run fits."""
        found = calibration.last(measured, self.stage, self.subject, self.work, hardware.kind)
        if found is None:
            return self
        answer = replace(self, measured=found, fits=True, reason="")
        if found.tokens_per_second:
            return answer.at(self.tokens, found.tokens_per_second, hardware)
        if self.hours and found.predicted_seconds:
            return answer.lasting(self.hours * found.seconds / found.predicted_seconds, hardware)
        return answer

    def lines(self) -> list[str]:
        """The stage as a person reads it."""
        detail = [f"layout: {self.layout}"] if self.layout else []
        if self.memory:
            sizes = f"{self.needed_gib:,.1f} of {self.available_gib:,.1f} GiB"
            detail.append(f"{sizes} on {self.device}: {parts(self.memory)}")
        detail += [f"rejected: {other}" for other in self.rejected]
        speed = [f"{self.tokens / 1e6:,.1f} M tokens" if self.tokens else ""]
        speed += [f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""]
        speed += [f"{self.hours:,.1f} hours" if self.hours is not None else ""]
        speed += [f"{self.gpu_hours:,.0f} GPU-hours" if self.gpu_hours is not None else ""]
        speed += [f"${self.usd:,}" if self.usd is not None else ""]
        detail += [", ".join(part for part in speed if part)] if any(speed) else []
        detail += [self.note] if self.note else []
        detail += [f"{self.measured}; the hours are taken from it"] if self.measured else []
        head = f"{self.stage:<12}{'fits' if self.fits else 'DOES NOT FIT'}  {self.work}"
        return [head, *(" " * 12 + line for line in detail), ""]


def parts(memory: Memory) -> str:
    """GiB by part, in words."""
    return ", ".join(f"{name} {size:,.1f}" for name, size in memory.items())


def traces(teacher: Teacher, hardware: Hardware, work: Workload) -> StagePlan:
    """Serving the teacher and asking it; an endpoint or recorded traces need nothing of this hardware."""
    if isinstance(teacher, RecordedTeacher):
        return StagePlan("traces", "read recorded traces")
    if isinstance(teacher, EndpointTeacher):
        return StagePlan("traces", "ask an endpoint", tokens=work.tokens, usd=_endpoint_usd(teacher, work))
    name, model = f"serve {title(teacher.model)}", footprint.of_reference(teacher.model)
    if model is None:
        return StagePlan("traces", name, note="the model's size is not known here: not checked")
    options = _plain(teacher.options)
    layout = ServingLayout(
        tensor=int(options.get("tensor-parallel-size", 1)),
        pipeline=int(options.get("pipeline-parallel-size", 1)),
        data=int(options.get("data-parallel-size", 1)),
        expert_parallel=bool(options.get("enable-expert-parallel", False)),
    )
    if not hardware.gpus:
        kv_gib = float(teacher.environment.get("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB))
        return _serving_on_cpu("traces", name, model, hardware, work, layout, kv_gib)
    context_tokens = int(options.get("max-model-len", model.max_position))
    share = float(options.get("gpu-memory-utilization", estimate.GPU_SHARE))
    return _serving("traces", name, model, hardware, work, layout, context_tokens, share)


def scores(student: Student, teacher: Teacher, hardware: Hardware, benchmarks: Sequence[Benchmark]) -> StagePlan:
    """The largest model that is served for the scores beside the teacher, which is planned under traces."""
    model = footprint.of_architecture(student.name, student.architecture)
    asked = 2 + len(student.variants) + (student.score_teacher and not isinstance(teacher, RecordedTeacher))
    asked += student.twin is not None and student.twin.recorded is None
    work = questions_asked(benchmarks, asked)
    name = f"serve {student.name}, its base and {len(student.variants)} variants, one after the other"
    if not hardware.gpus:
        return _serving_on_cpu("scores", name, model, hardware, work, ServingLayout(), CPU_KV_GIB)
    context_tokens = max((bench.max_tokens for bench in benchmarks), default=student.packs.context_tokens)
    wanted = int(_plain(student.serve_options).get("tensor-parallel-size", 0))
    sizes = [wanted] if wanted else [n for n in (1, 2, 4, 8) if n <= hardware.gpus_per_node]
    tried = [
        _serving("scores", name, model, hardware, work, ServingLayout(size), context_tokens, estimate.GPU_SHARE)
        for size in sizes
    ]
    first = next((each for each in tried if each.fits), tried[-1])
    if first.layout.startswith("TP") and not wanted:
        first = replace(first, note=f"set it: --set student.serve_options.tensor-parallel-size={first.layout[2:]}")
    return first


def _serving(
    stage: str,
    name: str,
    model: Footprint,
    hardware: Hardware,
    work: Workload,
    layout: ServingLayout,
    context_tokens: int,
    share: float,
) -> StagePlan:
    memory, available = estimate.serving(model, layout, context_tokens), hardware.gpu_memory_gib * share
    answer = StagePlan(stage, name, True, "a GPU", memory, available, str(layout))
    if layout.gpus > hardware.gpus:
        reason = f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), there are {hardware.gpus}."
        return replace(answer, fits=False, reason=reason)
    if answer.needed_gib > available:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    rate = estimate.serving_rate(model, layout, hardware, memory, available, work.mean_tokens or 1024)
    return answer.at(work.tokens, rate, hardware)


def _serving_on_cpu(
    stage: str, name: str, model: Footprint, hardware: Hardware, work: Workload, layout: ServingLayout, kv_gib: float
) -> StagePlan:
    memory, available = estimate.serving_on_cpu(model, kv_gib), hardware.memory_gib * MACHINE_SHARE
    answer = StagePlan(stage, name, True, "the machine", memory, available, "CPU")
    if layout.gpus > 1:
        weights = f"Its weights alone are {model.weights_bytes / GIB:,.0f} GiB."
        reason = f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), this machine has none. {weights}"
        return replace(answer, fits=False, reason=reason)
    if answer.needed_gib > available:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    return answer.at(work.tokens, estimate.serving_rate_on_cpu(model, hardware), hardware)


def checkpoint(student: Student, hardware: Hardware, work: Workload) -> StagePlan:
    """Training: every device holds all states, or, where that is too much, they are sharded over all GPUs."""
    lora, context_tokens = student.sft.method.kind != "full", student.packs.context_tokens
    name = f"{'LoRA' if lora else 'full'} training at {context_tokens:,} tokens"
    tokens_at_once = context_tokens * (student.sft.launch.packs_per_batch or 1)
    job = TrainingJob(student.architecture, tokens_at_once, 1, lora, student.sft.launch.checkpointing is not False)
    rejected: list[str] = []
    for layout, memory, available in _training_layouts(job, hardware):
        device = "a GPU" if hardware.gpus else "the machine"
        answer = StagePlan("checkpoint", name, True, device, memory, available, layout, rejected=tuple(rejected))
        if answer.needed_gib <= available:
            tokens = int(work.tokens * student.sft.epochs) if work.tokens else None
            mean_tokens = work.mean_tokens or context_tokens
            return answer.at(
                tokens, estimate.training_rate(student.architecture, hardware, mean_tokens, lora), hardware
            )
        rejected.append(f"{layout}: {answer.needed_gib:,.1f} GiB, {available:,.1f} can be used")
    return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.", rejected=tuple(rejected))


def _training_layouts(job: TrainingJob, hardware: Hardware) -> list[tuple[str, Memory, float]]:
    if not hardware.gpus:
        return [("CPU", estimate.training_on_cpu(job), hardware.memory_gib * MACHINE_SHARE)]
    available = hardware.gpu_memory_gib - estimate.training_reserve_gib(hardware.gpu_memory_gib)
    if hardware.gpus == 1:
        return [("one GPU", estimate.training(job), available)]
    sharded = estimate.training(replace(job, shards=hardware.gpus))
    return [
        ("plain data parallelism", estimate.training(job), available),
        (f"states sharded over {hardware.gpus} GPUs (FSDP or ZeRO-3)", sharded, available),
    ]


def variants(student: Student, hardware: Hardware) -> StagePlan:
    """Quantising, block by block, in the machine's memory and, where there is one, on one GPU."""
    if not student.variants:
        return StagePlan("variants", "no variants")
    name = f"quantise to {', '.join(student.variants)}"
    host, device = estimate.quantising(student.architecture, on_gpu=bool(hardware.gpus))
    available = hardware.memory_gib * MACHINE_SHARE
    answer = StagePlan("variants", name, True, "the machine", host, available, "block by block")
    if answer.needed_gib > available:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    on_gpu = replace(answer, device="a GPU", memory=device, available_gib=hardware.gpu_memory_gib)
    if on_gpu.needed_gib > on_gpu.available_gib:
        return replace(on_gpu, fits=False, reason=f"{name}: {on_gpu.shortage}.")
    return answer


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's flags in one spelling, without those that a file takes back with null."""
    return {key.lstrip("-").replace("_", "-"): value for key, value in options.items() if value is not None}


def _endpoint_usd(teacher: EndpointTeacher, work: Workload) -> Decimal | None:
    """Dollars for the answers; the questions' share is below a tenth of it where answers reason."""
    price = teacher.price_usd_per_million
    if price is None or work.tokens is None:
        return None
    return (price.output * work.tokens / 1_000_000).quantize(Decimal("0.01"))


def disk(student: Student, teacher: Teacher) -> Memory:
    """GiB on one node: what is downloaded and written. A checkpoint of a run under way holds float32 weights and two
    moments, and the last good one is kept while the next is written; variants are counted at a byte a parameter."""
    parameters = student.architecture.parameters
    states = 0.02 * parameters if student.sft.method.kind != "full" else 12 * parameters
    model = footprint.of_reference(teacher.model) if isinstance(teacher, VllmTeacher) else None
    return {
        **({"teacher": model.weights_bytes / GIB} if model else {}),
        "base and student": 2 * footprint.BF16 * parameters / GIB,
        "training checkpoints": 2 * states / GIB,
        "variants": len(student.variants) * parameters / GIB,
    }
