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
from r1distill.pipeline import calibration, estimate, footprint, training
from r1distill.pipeline.calibration import Measurement
from r1distill.pipeline.estimate import MACHINE_SHARE, Memory, ServingLayout
from r1distill.pipeline.footprint import Footprint
from r1distill.pipeline.hardware import GIB, Hardware
from r1distill.pipeline.training import Choice
from r1distill.pipeline.workload import Workload, questions_asked
from r1distill.students.catalogue import Grpo, Student
from r1distill.teacher.serve import CPU_ENVIRONMENT
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Teacher

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
    host: Memory = field(default_factory=dict)  # on a node's own memory, where the device is a GPU
    host_available_gib: float = 0.0
    reason: str = ""  # why it doesn't fit
    rejected: tuple[str, ...] = ()  # other layouts, with what speaks against them
    tokens: int | None = None
    tokens_per_second: float | None = None
    start_seconds: float = 0.0  # of the hours, whatever the tokens
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
    def host_needed_gib(self) -> float:
        return sum(self.host.values())

    @property
    def shortage(self) -> str:
        """What is needed and not there, in words; empty where all of it is."""
        if self.needed_gib > self.available_gib:
            where, needed, has = f"{self.device} ({parts(self.memory)})", self.needed_gib, self.available_gib
        elif self.host_needed_gib > self.host_available_gib:
            where, needed, has = f"each node ({parts(self.host)})", self.host_needed_gib, self.host_available_gib
        else:
            return ""
        return f"{needed:,.1f} GiB are needed on {where}, {has:,.1f} can be used"

    def at(self, tokens: int | None, rate: float | None, hardware: Hardware) -> StagePlan:
        """With speed, hours and price; a stage that doesn't fit has none."""
        if not self.fits:
            return self
        answer = replace(self, tokens=tokens, tokens_per_second=rate)
        return answer.lasting((tokens / rate + self.start_seconds) / 3600, hardware) if tokens and rate else answer

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
        share = self.tokens / found.tokens if self.tokens and found.tokens else 1.0
        return answer.lasting(share * found.seconds / 3600, hardware)

    def lines(self, whose: bool = False) -> list[str]:
        """The stage as a person reads it; ``whose`` it is, where there are several students."""
        detail = [f"layout: {self.layout}"] if self.layout else []
        if self.memory:
            sizes = f"{self.needed_gib:,.1f} of {self.available_gib:,.1f} GiB"
            detail.append(f"{sizes} on {self.device}: {parts(self.memory)}")
        if self.host:
            sizes = f"{self.host_needed_gib:,.1f} of {self.host_available_gib:,.1f} GiB"
            detail.append(f"{sizes} on each node: {parts(self.host)}")
        detail += [f"rejected: {other}" for other in self.rejected]
        speed = [_amount(self.tokens) if self.tokens else ""]
        speed += [f"{self.tokens_per_second:,.0f} tokens/s" if self.tokens_per_second else ""]
        speed += [duration(self.hours) if self.hours is not None else ""]
        speed += [f"{self.gpu_hours:,.1f} GPU-hours" if self.gpu_hours is not None else ""]
        speed += [f"${self.usd:,}" if self.usd is not None else ""]
        detail += [", ".join(part for part in speed if part)] if any(speed) else []
        detail += [self.note] if self.note else []
        detail += [f"{self.measured}; the hours are taken from it"] if self.measured else []
        head = f"{self.stage:<12}{'fits' if self.fits else 'DOES NOT FIT'}  "
        head += f"{self.subject}: {self.work}" if whose else self.work
        return [head, *(" " * 12 + line for line in detail), ""]


def parts(memory: Memory) -> str:
    """GiB by part, in words; what is nothing here is left out."""
    return ", ".join(f"{name} {size:,.1f}" for name, size in memory.items() if size)


def _amount(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M tokens" if tokens >= 1e6 else f"{tokens:,} tokens"


def duration(hours: float) -> str:
    """Hours in words."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def traces(teacher: Teacher, hardware: Hardware, work: Workload) -> StagePlan:
    """Serving the teacher and asking it; an endpoint or recorded traces need nothing of this hardware."""
    if isinstance(teacher, RecordedTeacher):
        return StagePlan("traces", "read recorded traces")
    if isinstance(teacher, EndpointTeacher):
        most = teacher.client.tokens_per_minute
        answer = StagePlan("traces", "ask an endpoint", usd=_endpoint_usd(teacher, work))
        limited = replace(answer, note=f"no faster than its limit of {most:,} tokens a minute") if most else answer
        return limited.at(work.tokens, most / 60 if most else None, hardware.model_copy(update={"gpus_per_node": 0}))
    name, model = f"serve {title(teacher.model)}", footprint.of_reference(teacher.model)
    if teacher.client.base_urls:
        return StagePlan("traces", f"ask servers of {title(teacher.model)} that run already", tokens=work.tokens)
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
    served = _Served(
        model,
        int(options.get("max-model-len", model.max_position)),
        float(options.get("gpu-memory-utilization", estimate.GPU_SHARE)),
        int(options.get("max-num-seqs", estimate.MAX_SEQUENCES)),
        teacher.client.in_flight,
    )
    answer = _serving("traces", name, served, hardware, work, layout)
    others = [other for other in _serving_layouts(model, hardware) if other != layout]
    weighed = [(other, _serving("traces", name, served, hardware, work, other)) for other in others]
    rejected = tuple(f"{other}: {_instead(other, its, answer)}" for other, its in weighed)
    return replace(answer, rejected=rejected)


def _instead(layout: ServingLayout, plan: StagePlan, chosen: StagePlan) -> str:
    """What another layout than the teacher's own file says would come to."""
    if not plan.fits:
        return f"{plan.needed_gib:,.1f} GiB, {plan.available_gib:,.1f} can be used"
    told = f"fits, {plan.tokens_per_second:,.0f} tokens/s" if plan.tokens_per_second else "fits"
    if chosen.fits and (plan.tokens_per_second or 0) <= (chosen.tokens_per_second or 0):
        return told
    sets = " ".join(f"--set teacher.options.{name}={str(value).lower()}" for name, value in layout.options.items())
    return f"{told}; its file says otherwise{': ' + sets if sets else ''}"


def _serving_layouts(model: Footprint, hardware: Hardware) -> list[ServingLayout]:
    """Layouts that fill a node, or all nodes by pipeline parallelism over them. Heads are shared out evenly: vLLM
    refuses anything else. Tensor parallelism stays inside a node."""
    per_node = hardware.gpus_per_node
    sizes = [n for n in (1, 2, 4, 8, 16) if per_node % n == 0 and model.heads % n == 0]
    found = [ServingLayout(n, data=per_node // n) for n in sizes]
    if model.experts_bytes:
        found = [ServingLayout(n, data=per_node // n, expert_parallel=per_node > 1) for n in sizes]
    if hardware.nodes > 1 and sizes:
        found.append(ServingLayout(sizes[-1], pipeline=hardware.nodes, data=per_node // sizes[-1]))
    return found


def student_options(student: Student, hardware: Hardware, context_tokens: int) -> dict[str, Any]:
    """vLLM's flags for serving a student on one node in the fastest layout; its own file goes over them."""
    if not hardware.gpus:
        return dict(student.serve_options)
    layout, _, _ = _student_served(student, hardware, Workload(), context_tokens)
    return {**layout.options, **student.serve_options}


def _student_served(
    student: Student, hardware: Hardware, work: Workload, context_tokens: int
) -> tuple[ServingLayout, StagePlan, list[str]]:
    """(layout, its plan, what was rejected and why) of serving the student on GPUs."""
    model, options = footprint.of_architecture(student.name, student.architecture), _plain(student.serve_options)
    asked = {kind: int(options.get(f"{kind}-parallel-size", 0)) for kind in ("tensor", "pipeline", "data")}
    if any(asked.values()):
        layouts = [ServingLayout(asked["tensor"] or 1, asked["pipeline"] or 1, asked["data"] or 1)]
    else:
        layouts = _serving_layouts(model, hardware.model_copy(update={"nodes": 1}))
    share = float(options.get("gpu-memory-utilization", estimate.GPU_SHARE))
    served = _Served(model, context_tokens, share, int(options.get("max-num-seqs", estimate.MAX_SEQUENCES)))
    name = f"serve {student.name}, its base and {len(student.variants)} variants, one after the other"
    tried = [(layout, _serving("scores", name, served, hardware, work, layout)) for layout in layouts]
    fitting = [one for one in tried if one[1].fits]
    layout, taken = max(fitting, key=lambda one: one[1].tokens_per_second or 0) if fitting else tried[-1]
    rest = [
        f"{other}: " + (f"{its.tokens_per_second or 0:,.0f} tokens/s" if its.fits else its.shortage)
        for other, its in tried
        if other != layout
    ]
    return layout, taken, rest


def scores(student: Student, teacher: Teacher, hardware: Hardware, benchmarks: Sequence[Benchmark]) -> StagePlan:
    """Serving the student, its base and its variants for the scores; the teacher is planned under traces."""
    model = footprint.of_architecture(student.name, student.architecture)
    files = [name for name, variant in student.variants.items() if variant.kind == "gguf"]
    whole = 2 + (student.score_teacher and not isinstance(teacher, RecordedTeacher))
    whole += student.twin is not None and student.twin.recorded is None
    few, asked = (student.variant_questions, student.variant_samples), whole + len(student.variants)
    of_files = questions_asked(benchmarks, len(files), *few)
    of_others = questions_asked(benchmarks, len(student.variants) - len(files), *few)
    work = questions_asked(benchmarks, whole).plus(of_others)
    if not hardware.gpus:
        name = f"serve {student.name}, its base and {len(student.variants)} variants, one after the other"
        return _serving_on_cpu("scores", name, model, hardware, work.plus(of_files), ServingLayout(), CPU_KV_GIB, asked)
    context_tokens = max((bench.max_tokens for bench in benchmarks), default=student.packs.context_tokens)
    _, answer, rejected = _student_served(student, hardware, work, context_tokens)
    answer = replace(answer, rejected=tuple(rejected))
    if not (files and of_files.tokens and answer.hours):
        return answer
    hours = of_files.tokens / estimate.serving_rate_on_cpu(model, hardware) / 3600
    note = f"{duration(hours)} of it for {', '.join(files)}: llama.cpp answers on the CPU"
    note += "" if any(few) else "; student.variant_questions and variant_samples ask less"
    return replace(answer.lasting(answer.hours + hours, hardware), note=note)


@dataclass(frozen=True)
class _Served:
    """A model under vLLM on GPUs, and how it is asked."""

    model: Footprint
    context_tokens: int
    share: float  # --gpu-memory-utilization
    most: int  # --max-num-seqs
    in_flight: int | None = None  # of the client; None: as many as there is room for


def _serving(
    stage: str, name: str, served: _Served, hardware: Hardware, work: Workload, layout: ServingLayout
) -> StagePlan:
    model, available = served.model, hardware.gpu_memory_gib * served.share
    memory = estimate.serving(model, layout, served.context_tokens)
    answer = StagePlan(stage, name, True, "a GPU", memory, available, str(layout))
    if layout.gpus > hardware.gpus:
        reason = f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), there are {hardware.gpus}."
        return replace(answer, fits=False, reason=reason)
    if answer.needed_gib > available:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    mean_tokens = work.mean_tokens or 1024
    room = estimate.sequences_held(model, layout, memory, available, mean_tokens, served.most)
    busy = room if served.in_flight is None else min(room, -(-served.in_flight // layout.data))
    rate = estimate.serving_rate(model, layout, hardware, memory, busy, mean_tokens)
    note = f"{layout.data * busy:,} answers at a time"
    if hardware.gpus > layout.gpus and stage == "traces":
        note += f" on {layout.gpus} of {hardware.gpus} GPUs; name servers on the others in teacher.client.base_urls"
    if 1.25 * busy < room:
        note += f"; there is room for {layout.data * room:,}: --set teacher.client.in_flight={layout.data * room}"
    return replace(answer, note=note).at(work.tokens, rate, hardware)


def _serving_on_cpu(
    stage: str,
    name: str,
    model: Footprint,
    hardware: Hardware,
    work: Workload,
    layout: ServingLayout,
    kv_gib: float,
    servers: int = 1,
) -> StagePlan:
    """One server after the other; where there are several, the next one starts while one answers."""
    one, available = estimate.serving_on_cpu(model, kv_gib), hardware.memory_gib * MACHINE_SHARE
    memory = {part: min(servers, 2) * size for part, size in one.items()}
    answer = StagePlan(stage, name, True, "the machine", memory, available, "CPU")
    answer = replace(answer, start_seconds=servers * estimate.CPU_START_SECONDS)
    if layout.gpus > 1:
        weights = f"Its weights alone are {model.weights_bytes / GIB:,.0f} GiB."
        reason = f"{name}: its settings ask for {layout.gpus} GPUs ({layout}), this machine has none. {weights}"
        return replace(answer, fits=False, reason=reason)
    if answer.needed_gib > available:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    return answer.at(work.tokens, estimate.serving_rate_on_cpu(model, hardware), hardware)


METHODS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def checkpoint(student: Student, hardware: Hardware, work: Workload, choice: Choice) -> StagePlan:
    """Training in the layout that was chosen for it."""
    name = f"{METHODS[student.sft.method.kind]} training at {student.packs.context_tokens:,} tokens"
    device = "the machine" if choice.layout.cpu else "a GPU"
    answer = StagePlan(
        "checkpoint",
        name,
        choice.fits,
        device,
        choice.memory,
        choice.available_gib,
        str(choice.layout),
        host=choice.host,
        host_available_gib=choice.host_available_gib,
        rejected=choice.rejected,
    )
    if not choice.fits:
        return replace(answer, reason=f"{name}: {answer.shortage}.")
    filled = choice.layout.occupancy(choice.packs_per_step)
    note = f"{choice.packs_per_step:,} pack{'s' if choice.packs_per_step > 1 else ''} a step"
    if filled < 1:
        places = round(choice.packs_per_step / filled)
        note += f" on {choice.layout.replicas} replicas: {filled:.0%} of {places:,} places are filled"
    note += f". {choice.note}" if choice.note else ""
    tokens = int(work.tokens * student.sft.epochs) if work.tokens else None
    return replace(answer, note=note).at(tokens, choice.tokens_per_second, hardware)


def beyond(student: Student, hardware: Hardware, choice: Choice) -> StagePlan:
    """Learning from its own answers, in the layout that was chosen for it: the training's memory is a part of it."""
    settings = student.beyond
    assert settings
    kind = "GRPO" if isinstance(settings, Grpo) else "on-policy distillation"
    answers = settings.steps * settings.answers_per_step
    name = f"{kind} on {answers:,} answers of its own"
    answer = StagePlan(
        "beyond",
        name,
        choice.fits,
        "the machine" if choice.layout.cpu else "a GPU",
        choice.memory,
        choice.available_gib,
        str(choice.layout),
        host=choice.host,
        host_available_gib=choice.host_available_gib,
        tokens=answers * (settings.max_completion_tokens or student.packs.context_tokens),
        note="the most tokens that it can write. Not estimated: its hours, and the memory of sampling and of a teacher",
    )
    return answer if choice.fits else replace(answer, reason=f"{name}: {answer.shortage}.")


def logits(student: Student, hardware: Hardware, work: Workload, teacher: Student | None = None) -> StagePlan:
    """One pass of the teacher of the student's own vocabulary over the packs. ``teacher`` is the student that it is,
    where the run trains it first."""
    assert student.distill
    ref = student.distill.teacher
    name = f"the top {student.distill.k} of {title(ref)} for every token"
    model = footprint.of_architecture(teacher.name, teacher.architecture) if teacher else footprint.of_reference(ref)
    if model is None:
        return StagePlan("logits", name, note="the model's size is not known here: not checked")
    each, copies = scoring_gpus(student, hardware, teacher), 1
    memory = estimate.scoring(model, student.packs.context_tokens, each)
    if each:
        copies = (hardware.gpus if hardware.ray_address else hardware.gpus_per_node) // each
        layout = f"{copies} {'copies' if copies > 1 else 'copy'}, each on {each} GPU{'s' if each > 1 else ''}"
        answer = StagePlan("logits", name, True, "a GPU", memory, _trainable_gib(hardware), layout)
        if copies * each < hardware.gpus:
            answer = replace(answer, note="on one node: --set hardware.ray_address=… shares it out over all")
    else:
        answer = StagePlan("logits", name, True, "the machine", memory, hardware.memory_gib * MACHINE_SHARE, "CPU")
    if answer.shortage:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    return answer.at(work.tokens, estimate.scoring_rate(model, hardware, copies, work.mean_tokens or 0.0), hardware)


def scoring_gpus(student: Student, hardware: Hardware, teacher: Student | None = None) -> int:
    """Over how many GPUs of a node one copy of the teacher of the logits is laid: as few as hold it; 0 without GPUs."""
    assert student.distill
    ref, sizes = student.distill.teacher, [n for n in (1, 2, 4, 8, 16) if n and hardware.gpus_per_node % n == 0]
    model = footprint.of_architecture(teacher.name, teacher.architecture) if teacher else footprint.of_reference(ref)
    if not hardware.gpus or model is None:
        return min(1, hardware.gpus)
    needed = {n: sum(estimate.scoring(model, student.packs.context_tokens, n).values()) for n in sizes}
    return next((n for n in sizes if needed[n] <= _trainable_gib(hardware)), sizes[-1])


def _trainable_gib(hardware: Hardware) -> float:
    """What work of our own may take of a GPU."""
    return hardware.gpu_memory_gib - training.reserve_gib(hardware.gpu_memory_gib)


def variants(student: Student, hardware: Hardware) -> StagePlan:
    """Quantising, block by block, in the machine's memory and, where there is one, on one GPU."""
    if not student.variants:
        return StagePlan("variants", "no variants")
    name = f"quantise to {', '.join(student.variants)}"
    host, device = estimate.quantising(student.architecture, student.variants.values(), on_gpu=bool(hardware.gpus))
    machine = hardware.memory_gib * MACHINE_SHARE
    if hardware.gpus:
        available = _trainable_gib(hardware)
        answer = StagePlan("variants", name, True, "a GPU", device, available, "block by block, on one GPU")
        answer = replace(answer, host=host, host_available_gib=machine)
    else:
        answer = StagePlan("variants", name, True, "the machine", host, machine, "block by block")
    if answer.shortage:
        return replace(answer, fits=False, reason=f"{name}: {answer.shortage}.")
    each = [estimate.quantising_seconds(student.architecture, one, hardware) for one in student.variants.values()]
    seconds = [one for one in each if one is not None]
    return answer.lasting(sum(seconds) / 3600, hardware) if len(seconds) == len(each) else answer


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """vLLM's flags in one spelling, without those that a file takes back with null."""
    return {key.lstrip("-").replace("_", "-"): value for key, value in options.items() if value is not None}


def _endpoint_usd(teacher: EndpointTeacher, work: Workload) -> Decimal | None:
    """Dollars for the answers; the questions' share is below a tenth of it where answers reason."""
    price = teacher.price_usd_per_million
    if price is None or work.tokens is None:
        return None
    return (price.output * work.tokens / 1_000_000).quantize(Decimal("0.01"))
