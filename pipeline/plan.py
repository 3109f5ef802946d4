"""What a run would need of a hardware: memory by part, layout, hours and dollars, and whether it fits. Pure arithmetic.

The formulas live in ``estimate``; here they are applied to the stages that serve, train, score and quantise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from typing import Any

from r1distill.data.benchmarks import Benchmark
from r1distill.data.config import names
from r1distill.data.errors import RequestError
from r1distill.data.models import title
from r1distill.data.prompts import PromptSet
from r1distill.pipeline import estimate, footprint
from r1distill.pipeline.estimate import Memory, ServingLayout, TrainingJob
from r1distill.pipeline.hardware import GIB, Hardware, detect, named
from r1distill.pipeline.workload import Workload, questions_asked, workload
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Teacher, VllmTeacher

MACHINE_SHARE = 0.95  # of a machine's memory; the rest is the system's
CPU_KV_GIB = 4.0  # what vLLM for the CPU takes for its KV cache unless VLLM_CPU_KVCACHE_SPACE says otherwise

hardware_named = named


@dataclass(frozen=True)
class StagePlan:
    """One stage on one hardware. Memory is GiB by part on one ``device``; what is not known is None."""

    stage: str
    work: str
    fits: bool
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

    @property
    def needed_gib(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """The stages of a run that take memory and time."""

    student: str
    teacher: str
    hardware: str
    hardware_title: str
    stages: tuple[StagePlan, ...]
    disk: Memory
    disk_free_gib: float
    assumptions: tuple[str, ...]

    @property
    def disk_fits(self) -> bool:
        return sum(self.disk.values()) <= self.disk_free_gib

    @property
    def fits(self) -> bool:
        return self.disk_fits and all(stage.fits for stage in self.stages)

    @property
    def problems(self) -> list[str]:
        """What is missing, a line each."""
        lines = [f"{stage.stage}: {stage.reason}" for stage in self.stages if not stage.fits]
        if not self.disk_fits:
            need = f"{sum(self.disk.values()):,.0f} GiB of disk are needed ({_parts(self.disk)})"
            lines.append(f"disk: {need}, {self.disk_free_gib:,.0f} GiB are free.")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        stages = [
            {**asdict(stage), "needed_gib": stage.needed_gib, "usd": None if stage.usd is None else str(stage.usd)}
            for stage in self.stages
        ]
        return {**asdict(self), "fits": self.fits, "disk_fits": self.disk_fits, "stages": stages}

    def text(self) -> str:
        """The plan as a person reads it."""
        lines = [f"{self.student}, taught by {self.teacher}, on {self.hardware}: {self.hardware_title}", ""]
        for stage in self.stages:
            lines += _stage_lines(stage)
        verdict = "fits" if self.disk_fits else "DOES NOT FIT"
        lines.append(
            f"{'disk':<12}{verdict}  {sum(self.disk.values()):,.0f} of {self.disk_free_gib:,.0f} GiB: {_parts(self.disk)}"
        )
        lines += ["", *(f"assumed: {line}" for line in self.assumptions)]
        return "\n".join([*lines, "", f"{self.student} {'fits' if self.fits else 'does not fit'} on {self.hardware}."])


def plan(
    student: Student,
    teacher: Teacher,
    hardware: Hardware,
    prompts: PromptSet | None = None,
    benchmarks: Sequence[Benchmark] = (),
) -> Plan:
    """Plan the main stages. Without ``prompts`` and ``benchmarks`` there are no hours of what depends on their number."""
    work = workload(student, teacher, prompts)
    stages = (
        _traces(teacher, hardware, work),
        _checkpoint(student, hardware, work),
        _variants(student, hardware),
        _scores(student, teacher, hardware, benchmarks),
    )
    return Plan(
        student=student.name,
        teacher=teacher.name,
        hardware=hardware.name,
        hardware_title=hardware.title,
        stages=tuple(_priced(stage, hardware) for stage in stages),
        disk=_disk(student, teacher),
        disk_free_gib=hardware.disk_gib,
        assumptions=(*work.assumptions, *_assumptions(hardware)),
    )


def check(
    student: Student, teacher: Teacher, hardware: Hardware, *, here: Hardware | None = None, stages: Sequence[str] = ()
) -> None:
    """Raise RequestError where the run can't be carried, saying what is missing and what would work.

    ``here`` is the machine that this runs on (detected by default): it must have what ``hardware`` promises.
    ``stages`` limits the check to those that will run; empty means all.
    """
    _check_here(hardware, here)
    answer = plan(student, teacher, hardware)
    wanted = tuple(stage for stage in answer.stages if not stages or stage.stage in stages)
    answer = replace(answer, stages=wanted)
    if not answer.fits:
        raise RequestError(_refusal(student, teacher, answer, wanted))


def check_teacher(teacher: Teacher, hardware: Hardware) -> None:
    """Raise RequestError where the hardware can't serve the teacher."""
    answer = _traces(teacher, hardware, Workload())
    if not answer.fits:
        fitting = _fitting(lambda other: _traces(teacher, other, Workload()).fits)
        raise RequestError(
            f"{hardware.name} ({hardware.title}) can't serve the teacher '{teacher.name}': {answer.reason}\n"
            f"It fits on: {', '.join(fitting) or 'nothing in configs/hardware'}. "
            "Another way: an endpoint that serves it already (--teacher deepseek-api)."
        )


def _check_here(hardware: Hardware, here: Hardware | None) -> None:
    if hardware.name == "local" or not hardware.gpus_per_node:
        return
    machine = here or detect()
    if machine.gpus_per_node < hardware.gpus_per_node:
        raise RequestError(
            f"HARDWARE={hardware.name} promises {hardware.gpus_per_node} x {hardware.gpu} on this machine, found "
            f"{machine.gpus_per_node}. 'distill' runs on the machine that it is started on: start it there, or leave "
            f"HARDWARE away. 'r1distill plan --hardware {hardware.name}' answers anywhere."
        )


def _refusal(student: Student, teacher: Teacher, answer: Plan, stages: Sequence[StagePlan]) -> str:
    def fit(other: Hardware) -> bool:
        there = plan(student, teacher, other)
        kept = {stage.stage for stage in stages}
        return there.disk_fits and all(stage.fits for stage in there.stages if stage.stage in kept)

    fitting = _fitting(fit)
    best = fitting[0] if fitting else "8xh200"
    failing = {stage.stage for stage in stages if not stage.fits}
    lines = [
        f"'{student.name}' taught by '{teacher.name}' does not fit on {answer.hardware} ({answer.hardware_title})."
    ]
    lines += [f"  {problem}" for problem in answer.problems]
    lines += ["What would work:"]
    lines += [f"  a machine that fits: {', '.join(fitting)}"] if fitting else []
    lines += [f"  r1distill plan --student {student.name} --hardware {best}    memory, time and cost there"]
    lines += [f"  make distill STUDENT={student.name} HARDWARE={best}    started on such a machine"]
    if "traces" in failing and isinstance(teacher, VllmTeacher):
        rest = "" if failing == {"traces"} else " (training needs its own machine all the same)"
        lines += [f"  TEACHER=recorded or TEACHER=deepseek-api    traces without serving the teacher here{rest}"]
        lines += ["  TEACHER=recorded UNTIL=dataset    as far as this machine goes"] if rest else []
    lines += ["  make distill    the default student, made for two cores without a GPU"]
    return "\n".join(lines)


def _fitting(fits: Callable[[Hardware], bool]) -> list[str]:
    """The names in configs/hardware that fit, the smallest first."""
    known = sorted((named(name) for name in names("hardware")), key=lambda h: (h.gpus * h.gpu_memory_gib, h.name))
    return [hardware.name for hardware in known if fits(hardware)]


# The stages.


def _traces(teacher: Teacher, hardware: Hardware, work: Workload) -> StagePlan:
    if not isinstance(teacher, VllmTeacher):
        usd = _endpoint_usd(teacher, work) if isinstance(teacher, EndpointTeacher) else None
        what = "ask an endpoint" if isinstance(teacher, EndpointTeacher) else "read recorded traces"
        return StagePlan("traces", what, fits=True, tokens=work.tokens, usd=usd)
    name = f"serve {title(teacher.model)}"
    model = footprint.of_reference(teacher.model)
    if model is None:
        return StagePlan("traces", name, fits=True, note="the model's size is not known here: not checked")
    return _serving("traces", name, model, hardware, work, _layout(teacher), teacher)


def _serving(
    stage: str,
    name: str,
    model: footprint.Footprint,
    hardware: Hardware,
    work: Workload,
    layout: ServingLayout,
    teacher: VllmTeacher | None = None,
    context_tokens: int | None = None,
) -> StagePlan:
    options = _plain(teacher.options) if teacher else {}
    rate: float | None
    if not hardware.gpus:
        kv = float(teacher.environment.get("VLLM_CPU_KVCACHE_SPACE", CPU_KV_GIB)) if teacher else CPU_KV_GIB
        memory, available = estimate.serving_on_cpu(model, kv), hardware.memory_gib * MACHINE_SHARE
        rate = estimate.serving_rate_on_cpu(model, hardware)
        where, fits = "the machine", layout.gpus == 1
        reason = "" if fits else f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), this machine has none."
    else:
        context = context_tokens or int(options.get("max-model-len", model.max_position))
        memory = estimate.serving(model, layout, context)
        available = hardware.gpu_memory_gib * float(options.get("gpu-memory-utilization", estimate.GPU_SHARE))
        rate = estimate.serving_rate(model, layout, hardware, memory, available, work.mean_tokens or 1024)
        where, fits = "a GPU", layout.gpus <= hardware.gpus
        reason = (
            "" if fits else f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), there are {hardware.gpus}."
        )
    if (needed := sum(memory.values())) > available:
        fits = False
        reason = (
            reason or f"{name}: {needed:,.1f} GiB are needed on {where} ({_parts(memory)}), {available:,.1f} are there."
        )
    if reason and model.weights_bytes / GIB > hardware.memory_gib * MACHINE_SHARE and not hardware.gpus:
        reason += f" Its weights alone are {model.weights_bytes / GIB:,.0f} GiB."
    answer = StagePlan(stage, name, fits, where, memory, available, str(layout) if hardware.gpus else "CPU", reason)
    return (
        replace(answer, tokens=work.tokens, tokens_per_second=rate, hours=_hours(work.tokens, rate)) if fits else answer
    )


def _checkpoint(student: Student, hardware: Hardware, work: Workload) -> StagePlan:
    lora = student.sft.method.kind == "lora"
    context = student.packs.context_tokens
    name = f"{'LoRA' if lora else 'full'} training, {context:,} tokens of context"
    job = TrainingJob(student.architecture, context, lora=lora, checkpointing=student.sft.gradient_checkpointing)
    rate = estimate.training_rate(student.architecture, hardware, work.mean_tokens or context, lora)
    tokens = int(work.kept_tokens * student.sft.epochs) if work.kept_tokens else None
    if not hardware.gpus:
        layouts = [("CPU", job, estimate.training_on_cpu(job), hardware.memory_gib * MACHINE_SHARE)]
    else:
        available = hardware.gpu_memory_gib - estimate.training_reserve_gib(hardware.gpu_memory_gib)
        jobs = [("plain data parallelism" if hardware.gpus > 1 else "one GPU", job)]
        if hardware.gpus > 1:
            jobs.append(
                (f"states sharded over {hardware.gpus} GPUs (FSDP or ZeRO-3)", replace(job, shards=hardware.gpus))
            )
        layouts = [(layout, each, estimate.training(each), available) for layout, each in jobs]
    where = "a GPU" if hardware.gpus else "the machine"
    rejected: list[str] = []
    for layout, _, memory, available in layouts:
        if (needed := sum(memory.values())) <= available:
            fit = StagePlan("checkpoint", name, True, where, memory, available, layout, rejected=tuple(rejected))
            return replace(fit, tokens=tokens, tokens_per_second=rate, hours=_hours(tokens, rate))
        rejected.append(f"{layout}: {needed:,.1f} GiB on {where}, {available:,.1f} are there")
    reason = f"{name}: {needed:,.1f} GiB are needed on {where} ({_parts(memory)}), {available:,.1f} are there."
    return StagePlan("checkpoint", name, False, where, memory, available, layout, reason, tuple(rejected))


def _variants(student: Student, hardware: Hardware) -> StagePlan:
    name = f"quantise: {', '.join(student.variants) or 'nothing'}"
    host, device = estimate.quantising(student.architecture, on_gpu=bool(hardware.gpus))
    available = hardware.memory_gib * MACHINE_SHARE
    if not student.variants:
        return StagePlan("variants", name, True)
    if (needed := sum(host.values())) > available:
        reason = f"{name}: {needed:,.1f} GiB are needed on the machine ({_parts(host)}), {available:,.1f} are there."
        return StagePlan("variants", name, False, "the machine", host, available, "block by block", reason)
    if device and (needed := sum(device.values())) > hardware.gpu_memory_gib:
        reason = f"{name}: {needed:,.1f} GiB are needed on a GPU ({_parts(device)})."
        return StagePlan("variants", name, False, "a GPU", device, hardware.gpu_memory_gib, "block by block", reason)
    return StagePlan("variants", name, True, "the machine", host, available, "block by block")


def _scores(student: Student, teacher: Teacher, hardware: Hardware, benchmarks: Sequence[Benchmark]) -> StagePlan:
    """The largest model that is served for the scores: the student's own; the teacher's is planned under traces."""
    model = footprint.of_architecture(student.name, student.architecture)
    models = 2 + len(student.variants) + (student.score_teacher and not isinstance(teacher, RecordedTeacher))
    work = questions_asked(benchmarks, models)
    context = max((bench.max_tokens for bench in benchmarks), default=student.packs.context_tokens)
    name = f"serve {student.name}, its base and {len(student.variants)} variants, one after the other"
    wanted = int(_plain(student.serve_options).get("tensor-parallel-size", 0))
    sizes = [wanted] if wanted else [n for n in (1, 2, 4, 8) if n <= max(1, hardware.gpus_per_node)]
    tried = [_serving("scores", name, model, hardware, work, ServingLayout(n), None, context) for n in sizes]
    first = next((each for each in tried if each.fits), tried[-1])
    if first.layout.startswith("TP") and not wanted:
        first = replace(first, note=f"set it: --set student.serve_options.tensor-parallel-size={first.layout[2:]}")
    return first


# Their parts.


def _layout(teacher: VllmTeacher) -> ServingLayout:
    options = _plain(teacher.options)
    return ServingLayout(
        tensor=int(options.get("tensor-parallel-size", 1)),
        pipeline=int(options.get("pipeline-parallel-size", 1)),
        data=int(options.get("data-parallel-size", 1)),
        expert_parallel=bool(options.get("enable-expert-parallel", False)),
    )


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's flags in one spelling: ``--tensor_parallel_size`` and ``tensor-parallel-size`` are the same."""
    return {key.lstrip("-").replace("_", "-"): value for key, value in options.items()}


def _endpoint_usd(teacher: EndpointTeacher, work: Workload) -> Decimal | None:
    price = teacher.price_usd_per_million
    if price is None or work.tokens is None:
        return None
    return (price.output * work.tokens / 1_000_000).quantize(Decimal("0.01"))


def _disk(student: Student, teacher: Teacher) -> Memory:
    """GiB on one node: what is downloaded and written. A checkpoint while training holds float32 weights and two moments,
    and the last good one is kept while the next is written."""
    parameters = student.architecture.parameters
    states = 0.02 * parameters if student.sft.method.kind == "lora" else 12 * parameters
    parts = {
        "base and student": 2 * footprint.BF16 * parameters / GIB,
        "training checkpoints": 2 * states / GIB,
        "variants": len(student.variants) * parameters / GIB,
    }
    model = footprint.of_reference(teacher.model) if isinstance(teacher, VllmTeacher) else None
    return {"teacher": model.weights_bytes / GIB, **parts} if model else parts


def _hours(tokens: int | None, rate: float | None) -> float | None:
    return tokens / rate / 3600 if tokens and rate else None


def _priced(stage: StagePlan, hardware: Hardware) -> StagePlan:
    if stage.hours is None or not hardware.gpus:
        return stage
    gpu_hours, price = stage.hours * hardware.gpus, hardware.price_usd_per_gpu_hour
    usd = (Decimal(str(gpu_hours)) * price).quantize(Decimal("0.01")) if price is not None else stage.usd
    return replace(stage, gpu_hours=gpu_hours, usd=usd)


def _assumptions(hardware: Hardware) -> tuple[str, ...]:
    if not hardware.gpus:
        return ("speed on the CPU: measured with SmolLM2-135M on two cores, scaled by cores and parameters",)
    price = hardware.price_usd_per_gpu_hour
    return (
        f"training reaches {estimate.TRAINING_UTILISATION:.0%} of the GPU's bf16 peak, decoding "
        f"{estimate.DECODING_UTILISATION:.0%} of its memory bandwidth, with every slot filled",
        f"${price} a GPU-hour"
        if price is not None
        else "no price is set: --set hardware.price_usd_per_gpu_hour=2.50 gives dollars",
    )


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {size:,.1f}" for name, size in memory.items())


def _stage_lines(stage: StagePlan) -> list[str]:
    lines = [f"{stage.stage:<12}{'fits' if stage.fits else 'DOES NOT FIT'}  {stage.work}"]

    def add(text: str) -> None:
        lines.append(" " * 12 + text)

    if stage.layout:
        add(f"layout: {stage.layout}")
    if stage.memory:
        add(f"{stage.needed_gib:,.1f} of {stage.available_gib:,.1f} GiB on {stage.device}: {_parts(stage.memory)}")
    for other in stage.rejected:
        add(f"rejected: {other}")
    speed = [f"{stage.tokens / 1e6:,.1f} M tokens" if stage.tokens else ""]
    speed += [f"{stage.tokens_per_second:,.0f} tokens/s" if stage.tokens_per_second else ""]
    speed += [f"{stage.hours:,.1f} hours" if stage.hours is not None else ""]
    speed += [f"{stage.gpu_hours:,.0f} GPU-hours" if stage.gpu_hours is not None else ""]
    speed += [f"${stage.usd:,}" if stage.usd is not None else ""]
    if any(speed):
        add(", ".join(part for part in speed if part))
    if stage.note:
        add(stage.note)
    return [*lines, ""]
