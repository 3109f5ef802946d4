"""What training takes: memory by part, seconds a step, and the layout that is chosen for a hardware.

Formulas with their sources; the tests hold them to torchtitan's and NeMo's runs. ``choose`` tries every layout that the
training can run and says why it takes one and not the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from r1distill.data.errors import RequestError
from r1distill.pipeline.estimate import (
    CPU_TRAINING_TFLOPS_PER_CORE,
    MACHINE_SHARE,
    PROCESS_GIB,
    Memory,
    layer_bytes_per_token,
)
from r1distill.pipeline.footprint import BF16
from r1distill.pipeline.hardware import GIB, Hardware
from r1distill.students import layout as layouts
from r1distill.students.catalogue import Adapter, Architecture, FullMethod, Method, QloraMethod, Student
from r1distill.students.layout import Layout

NF4 = (4 + 0.127) / 8  # bytes a weight with its constants quantised once more (QLoRA, arXiv 2305.14314, section 3)
LIVE_PARAMETERS = 1e9  # DeepSpeed's stage3_max_live_parameters by default
COLLECTIVE_SHARE = 0.75  # of a link's bandwidth that NCCL's collectives reach; an assumption
HOST_LINK_GB_PER_SECOND = 32.0  # PCIe 4 x16, the way of offloaded activations
ROOMY = 0.9  # a layout that fills more of a GPU is taken only where nothing else fits: it is an estimate
DEGREES = (2, 4, 8)  # of Ulysses, inside a node
UNPROVEN = "that packed traces stay apart under Ulysses is not proven on a GPU"
WORTH = 2.0  # times faster Ulysses must be to be taken all the same where there is another way


@dataclass(frozen=True)
class TrainingJob:
    """What decides memory and speed of a training."""

    architecture: Architecture
    context_tokens: int
    layout: Layout
    method: Method = field(default_factory=lambda: FullMethod(kind="full"))
    fused_head: bool = True  # the loss without whole logits: Liger's or TRL's head

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch on one device; Ulysses cuts a pack over its processes."""
        return self.context_tokens * self.layout.packs_per_batch / self.layout.sequence_parallel

    @property
    def shards(self) -> int:
        """Devices that the states are spread over."""
        return self.layout.processes if self.layout.strategy in ("fsdp2", "zero3") else 1

    @property
    def adapter_parameters(self) -> int:
        """LoRA on all linear layers, rank x (in + out) each (arXiv 2106.09685): of attention four, of the FFN three."""
        if not isinstance(self.method, Adapter):
            return 0
        a = self.architecture
        keys = a.hidden // a.heads * a.kv_heads
        return self.method.rank * a.layers * (4 * a.hidden + 2 * (a.hidden + keys) + 3 * (a.hidden + a.ffn))

    @property
    def trained_parameters(self) -> int:
        return self.adapter_parameters or self.architecture.parameters


def memory(job: TrainingJob) -> Memory:
    """GiB on one GPU of training in bf16 with AdamW.

    Activations with checkpointing: each layer's input is kept (tokens x hidden x 2 bytes x layers; arXiv 1604.06174)
    and one layer is recomputed at a time, beside gradients of half its size; without, every layer keeps its own.
    """
    a, layout = job.architecture, job.layout
    per_layer = layer_bytes_per_token(a) * job.tokens / GIB
    kept = _kept(job) if layout.checkpointing else (a.layers - 1) * per_layer
    return {
        **_states(job),
        "activations": 0.0 if layout.offload_activations else kept,
        "one layer's backward": 1.5 * per_layer,
        "logits": _logits(job),
        "buffers": _buffers(job),
    }


def _kept(job: TrainingJob) -> float:
    return job.tokens * job.architecture.hidden * BF16 * job.architecture.layers / GIB


def _states(job: TrainingJob) -> Memory:
    """Full, one process, DDP, FSDP2: 16 bytes a parameter: master weight, gradient and two moments in float32 (ZeRO,
    arXiv 1910.02054, section 3.1). ZeRO-3 by DeepSpeed: 18, since its master weights stand beside bf16 ones (arXiv
    2506.13996 counts so: 144 GB for 8 B). An adapter: frozen weights in bf16 (float32 on the CPU) or NF4, and its own
    16 bytes a parameter."""
    a, share = job.architecture, 1 / job.shards / GIB
    if adapter := job.adapter_parameters:
        outside = _outside(a) if isinstance(job.method, QloraMethod) else a.parameters
        frozen = (4 if job.layout.cpu else BF16) * outside + NF4 * (a.parameters - outside)
        states = {"weights": 4, "gradients": 4, "optimiser": 8}
        own = {part: size * adapter * share for part, size in states.items()}
        return {**own, "weights": frozen * share + own["weights"]}
    states = {"weights": 2, "gradients": 4, "optimiser": 12} if job.layout.strategy == "zero3" else {
        "weights": 4, "gradients": 4, "optimiser": 8}  # fmt: skip
    return {part: size * a.parameters * share for part, size in states.items()}


def _outside(a: Architecture) -> int:
    """Parameters of the embeddings, which stand outside the layers."""
    return a.vocab * a.hidden * (1 if a.tied else 2)


def _logits(job: TrainingJob) -> float:
    """A fused head computes the logits in chunks of tokens x hidden elements and keeps the head's gradient in float32
    (Liger, arXiv 2410.10989, section 3.2); a plain one holds all: bf16, their float32 copy and its gradient."""
    a = job.architecture
    if job.fused_head:
        return (job.tokens * a.hidden * 8 + a.vocab * a.hidden * (0 if job.adapter_parameters else 4)) / GIB
    return job.tokens * a.vocab * (2 + 4 + 4) / GIB


def _buffers(job: TrainingJob) -> float:
    """Weights gathered or cast for use, and what is on its way to other processes.

    Whole: autocast's bf16 copy of every trained weight; DDP also has buckets of all gradients (torch's documentation,
    gradient_as_bucket_view). Sharded: two layers, embedding and head in bf16; DeepSpeed holds up to
    stage3_max_live_parameters. Ulysses: queries, keys, values and output, sent and received (arXiv 2309.14509).
    """
    a, layout, outside = job.architecture, job.layout, _outside(job.architecture)
    if job.shards == 1:
        cast = 0 if job.adapter_parameters else BF16 * a.parameters
        buckets = 4 * job.trained_parameters if layout.strategy == "ddp" else 0
        return (cast + buckets) / GIB
    live = 2 * (a.parameters - outside) / a.layers
    if layout.strategy == "zero3":
        live = max(live, min(LIVE_PARAMETERS, a.parameters - outside))
    exchanged = 2 * _exchanged_bytes(a) * job.tokens if layout.sequence_parallel > 1 else 0
    return (BF16 * (live + outside) + exchanged) / GIB


def _exchanged_bytes(a: Architecture) -> float:
    """bf16 bytes a token of one layer's queries, keys, values and output."""
    return BF16 * 2 * a.hidden * (1 + a.kv_heads / a.heads)


def reserve_gib(gpu_memory_gib: float) -> float:
    """CUDA's context, NCCL's buffers and fragmentation: an assumption."""
    return 2.0 + 0.02 * gpu_memory_gib


def host_memory(job: TrainingJob) -> Memory:
    """GiB of one node's own memory: whole weights while they are loaded (float32; by every process under DDP, else by
    one) or gathered and saved (float32 and bf16), the processes, and the activations that wait there."""
    a, layout = job.architecture, job.layout
    loaded = 4 * a.parameters * (layout.processes_per_node if layout.strategy == "ddp" else 1)
    parts: Memory = {
        "whole weights": max(loaded, (4 + BF16) * a.parameters) / GIB,
        "processes": PROCESS_GIB * layout.processes_per_node,
    }
    if layout.offload_activations:
        parts["activations"] = _kept(job) * layout.processes_per_node
    return parts


def memory_on_cpu(job: TrainingJob) -> Memory:
    """GiB of the machine: the states and float32 activations of every process, logits at target positions, and the
    processes themselves. A checkpoint's saving needs no more than the training."""
    one, n = memory(replace(job, fused_head=False)), job.layout.processes_per_node
    doubled = {part: 2 * one[part] for part in ("activations", "one layer's backward")}
    return {**{part: n * size for part, size in {**one, **doubled}.items()}, "processes": n * PROCESS_GIB}


def seconds_per_step(job: TrainingJob, hardware: Hardware, packs_per_step: int, mean_tokens: float) -> float | None:
    """Seconds of one optimiser step, or None where the GPU's speed is not known.

    Each round computes a micro-batch; gathering and reducing what is sharded runs beside it, so the longer one counts.
    Ulysses' exchange is waited for. Rounds that find no pack are waited for all the same.
    """
    layout, frozen = job.layout, isinstance(job.method, Adapter)
    flops = job.architecture.training_flops(job.tokens, job.tokens * mean_tokens, frozen=frozen)
    rounds = layout.rounds(packs_per_step)
    recomputing = 1.0 if layout.checkpointing else 0.75  # what utilisation counts is 3 of the 4 passes
    if layout.cpu:
        speed = hardware.cores / layout.processes_per_node * CPU_TRAINING_TFLOPS_PER_CORE * 1e12
        return rounds * flops * recomputing / 0.75 / speed  # measured without checkpointing
    if not hardware.gpu_bf16_tflops:
        return None
    compute = flops * recomputing / (hardware.gpu_bf16_tflops * 1e12 * hardware.training_utilisation)
    gathering, reducing = _traffic_seconds(job, hardware)
    offloading = 2 * _kept(job) * GIB / (HOST_LINK_GB_PER_SECOND * 1e9) if layout.offload_activations else 0.0
    waited = max(0.0, reducing - 2 / 3 * compute)  # DDP's reduction runs beside the last backward pass
    return rounds * (max(compute, gathering, offloading) + _exchange_seconds(job, hardware)) + waited


def _traffic_seconds(job: TrainingJob, hardware: Hardware) -> tuple[float, float]:
    """(seconds a round, seconds a step) of collectives. Sharded: bf16 weights are gathered twice and float32 gradients
    scattered once a round (arXiv 1910.02054, section 7); DDP reduces gradients once a step."""
    n = job.layout.processes
    link = hardware.link_gb_per_second
    if job.layout.nodes > 1 and hardware.network_gb_per_second:
        link = min(link or hardware.network_gb_per_second, hardware.network_gb_per_second)
    if n == 1 or not link:
        return 0.0, 0.0
    seconds_per_byte = (n - 1) / n / (link * 1e9 * COLLECTIVE_SHARE)
    if job.shards == 1:
        return 0.0, 2 * 4 * job.trained_parameters * seconds_per_byte
    moved = 2 * BF16 * job.architecture.parameters + 4 * job.trained_parameters
    return moved * seconds_per_byte, 0.0


def _exchange_seconds(job: TrainingJob, hardware: Hardware) -> float:
    """Ulysses' all-to-all of every layer, three times a round: forward, recomputed, backward (arXiv 2309.14509,
    section 3.2: each process keeps 1 / degree of what it has)."""
    degree = job.layout.sequence_parallel
    if degree == 1 or not hardware.link_gb_per_second:
        return 0.0
    moved = 3 * job.architecture.layers * _exchanged_bytes(job.architecture) * job.tokens * (degree - 1) / degree
    return moved / (hardware.link_gb_per_second * 1e9 * COLLECTIVE_SHARE)


@dataclass(frozen=True)
class Choice:
    """One layout weighed: memory on a device and on a node, speed, and why it is not taken."""

    layout: Layout
    memory: Memory
    available_gib: float
    host: Memory
    host_available_gib: float
    tokens_per_second: float | None
    packs_per_step: int
    rejected: tuple[str, ...] = ()
    note: str = ""

    @property
    def rate(self) -> float:
        return self.tokens_per_second or 0.0

    @property
    def needed_gib(self) -> float:
        return sum(self.memory.values())

    @property
    def host_needed_gib(self) -> float:
        return sum(self.host.values())

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.available_gib and self.host_needed_gib <= self.host_available_gib

    @property
    def tight(self) -> bool:
        """It fits by less than an estimate may err."""
        return self.needed_gib > ROOMY * self.available_gib

    @property
    def _order(self) -> tuple[bool, bool, bool, float]:
        """Roomy before tight; without Ulysses, whose isolation is not proven on a GPU, before with; the fastest."""
        layout = self.layout
        return self.tight, layout.offload_activations, layout.sequence_parallel > 1, -self.rate


def packs_per_step(student: Student, mean_tokens: float) -> int:
    """Whole packs that hold ``batch_traces`` traces of the mean length, as the training counts them."""
    return max(1, round(student.sft.batch_traces * mean_tokens / student.packs.context_tokens))


def choose(student: Student, hardware: Hardware, mean_tokens: float) -> Choice:
    """The layout for a student's training on a hardware, with why the others were not taken.

    Where none fits, the nearest to it. Raises RequestError where the student's ``launch`` contradicts itself.
    """
    shape, weighed = student.architecture, list[Choice]()
    refused: dict[str, None] = {}
    for layout in _candidates(student, hardware):
        if layouts.shares_heads(layout, shape):
            weighed.append(_weigh(student, hardware, layout, mean_tokens))
            continue
        heads = f"{shape.heads} heads and {shape.kv_heads} key-value heads"
        refused[f"Ulysses {layout.sequence_parallel}: it can't share {heads} out evenly"] = None
    if not weighed:
        raise RequestError(f"no layout of this training works: {'; '.join(refused)}. Look at student.sft.launch.")
    fitting = sorted((one for one in weighed if one.fits), key=lambda one: one._order)
    taken = fitting[0] if fitting else min(weighed, key=lambda one: one.needed_gib / one.available_gib)
    fastest = max((one for one in fitting if not one.tight), key=lambda one: one.rate, default=taken)
    taken = fastest if fastest.rate >= WORTH * taken.rate else taken
    # Offloading what would fit anyway is no choice worth a line.
    roomy = {one.layout for one in weighed if one.fits and not one.tight}
    others = [
        one
        for one in weighed
        if not one.layout.offload_activations
        or one.layout.model_copy(update={"offload_activations": False}) not in roomy
    ]
    rest = [f"{one.layout}: {_reason(one, taken)}" for one in others if one is not taken or not fitting]
    rest += [*_plain_head(student, taken), *refused]
    return replace(taken, rejected=tuple(rest), note=_on_ulysses(taken, fastest))


def _weigh(student: Student, hardware: Hardware, layout: Layout, mean_tokens: float) -> Choice:
    job = TrainingJob(student.architecture, student.packs.context_tokens, layout, student.sft.method)
    packs = packs_per_step(student, mean_tokens)
    seconds = seconds_per_step(job, hardware, packs, mean_tokens)
    rate = packs * job.context_tokens / seconds if seconds else None
    machine = hardware.memory_gib * MACHINE_SHARE
    if layout.cpu:
        return Choice(layout, memory_on_cpu(job), machine, {}, machine, rate, packs)
    available = hardware.gpu_memory_gib - reserve_gib(hardware.gpu_memory_gib)
    return Choice(layout, memory(job), available, host_memory(job), machine, rate, packs)


def _reason(one: Choice, taken: Choice) -> str:
    """Why ``one`` is not taken."""
    if one.needed_gib > one.available_gib:
        return f"{one.needed_gib:,.1f} GiB, {one.available_gib:,.1f} can be used"
    if not one.fits:
        return f"{one.host_needed_gib:,.1f} GiB of the node's memory, {one.host_available_gib:,.1f} can be used"
    speed = f"fits, {one.tokens_per_second:,.0f} tokens/s" if one.tokens_per_second else "fits"
    if one.tight:
        spare = one.available_gib - one.needed_gib
        return f"{speed}, with {spare:,.1f} GiB to spare: too little for an estimate"
    if one.rate > taken.rate and one.layout.sequence_parallel > 1:
        return f"{speed}, but rests on Ulysses"
    return speed


def _on_ulysses(taken: Choice, fastest: Choice) -> str:
    """What there is to say of Ulysses, where it is taken or would be faster."""
    if taken.layout.sequence_parallel > 1:
        return f"T{UNPROVEN[1:]}: look at it there before the long run"
    degree = fastest.layout.sequence_parallel
    if degree == 1 or not taken.rate:
        return ""
    way = f"--set student.sft.launch.sequence_parallel={degree}"
    return f"Ulysses would be {fastest.rate / taken.rate:.1f} x as fast, but {UNPROVEN}: {way}"


def _plain_head(student: Student, taken: Choice) -> Iterator[str]:
    """What whole logits would take, where that is too much: it is what open-r1 ran out of memory with."""
    job = TrainingJob(student.architecture, student.packs.context_tokens, taken.layout, student.sft.method, False)
    needed = sum(memory(job).values())
    if taken.fits and not taken.layout.cpu and needed > taken.available_gib:
        yield f"whole logits instead of the fused head: {needed:,.1f} GiB, {taken.available_gib:,.1f} can be used"


def _candidates(student: Student, hardware: Hardware) -> list[Layout]:
    """Every layout that this training can run here, the simplest first; the student's ``launch`` goes over each."""
    launch, whole_only = student.sft.launch, isinstance(student.sft.method, QloraMethod) or student.distill is not None
    cpu = not hardware.gpus
    nodes = launch.nodes or hardware.nodes
    per_node = launch.processes_per_node or hardware.gpus_per_node or 1
    whole: dict[str, Any] = {"nodes": nodes, "processes_per_node": per_node, "cpu": cpu}
    alone = nodes * per_node == 1
    tried: list[dict[str, Any]] = [{**whole, "strategy": "one"}] if alone else [{**whole, "strategy": "ddp"}]
    if not alone:
        if nodes > 1 and launch.nodes is None and not cpu:
            tried.append({**whole, "strategy": "fsdp2", "nodes": 1})
        tried += [] if cpu else [{**whole, "strategy": "fsdp2"}]
        tried += [{**whole, "strategy": "zero3"}] if launch.strategy == "zero3" else []
        # 4-bit weights are no ZeRO-3's, and the top-k has no cut sequences.
        degrees = [] if whole_only else [n for n in DEGREES if per_node % n == 0]
        tried += [] if cpu else [{**whole, "strategy": "zero3", "sequence_parallel": n} for n in degrees]
    if not cpu and launch.checkpointing is not False:
        tried += [{**one, "offload_activations": True} for one in tried if one["strategy"] != "ddp"]
    wanted = [one for one in tried if launch.strategy in ("auto", one["strategy"])]
    found: list[Layout] = []
    contradiction: RequestError | None = None
    for one in wanted or [{**whole, "strategy": launch.strategy}]:
        hosts = hardware.hosts if one["nodes"] > 1 else ()
        liger = not cpu if launch.liger is None else launch.liger
        try:
            layout = layouts.build(launch, **one, hosts=hosts, liger=liger, device_tflops=hardware.gpu_bf16_tflops)
        except RequestError as error:
            contradiction = error
            continue
        found += [layout] if layout not in found else []
    if not found and contradiction:
        raise contradiction
    return found
