"""Memory and speed of serving, training and quantising, as formulas with their sources.

Memory is a mapping from a part's name to GiB on one device: one GPU, or the whole machine where it has none. The tests
hold these formulas to DeepSeek's and vLLM's serving rates and to torchtitan's and NeMo's training runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1distill.pipeline.footprint import BF16, Footprint
from r1distill.pipeline.hardware import GIB, Hardware
from r1distill.students.catalogue import Architecture

Memory = dict[str, float]

# Share of a GPU's peak that full training reaches at its best, without counting recomputation: torchtitan's 8B at 32k
# reaches 29% of bf16 peak, NeMo's 70B at 8k 40%, the Llama 3 report 38-43% (arXiv 2407.21783, table 4).
TRAINING_UTILISATION = 0.36
# Share of the memory bandwidth that decoding reaches; 0.6 reproduces DeepSeek's node (14,800 tokens/s) and vLLM's wide
# expert parallelism (2,200 tokens/s on one H200) from the roofline below.
DECODING_UTILISATION = 0.6
# Two cores of a current server: SmolLM2-135M trained 229 tokens/s and served 230 tokens/s with 64 in flight.
CPU_TRAINING_TFLOPS_PER_CORE = 6 * 134.5e6 * 229 / 2 / 1e12
CPU_SERVING_TFLOPS_PER_CORE = 2 * 134.5e6 * 230 / 2 / 1e12

PROCESS_GIB = 1.5  # one Python process with torch and its libraries loaded
GPU_SHARE = 0.9  # vLLM's default --gpu-memory-utilization
BATCHED_TOKENS = 8192  # vLLM's default tokens in one step; its profile run reserves memory for them
MAX_SEQUENCES = 256


@dataclass(frozen=True)
class ServingLayout:
    """How one vLLM deployment is spread: tensor x pipeline x data parallel ranks."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    expert_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}" if self.tensor > 1 else "", f"PP{self.pipeline}" if self.pipeline > 1 else ""]
        parts += [f"DP{self.data}" if self.data > 1 else "", "EP" if self.expert_parallel else ""]
        return " ".join(part for part in parts if part) or "one GPU"


def serving(model: Footprint, layout: ServingLayout, context_tokens: int) -> Memory:
    """GiB on one GPU for weights, one sequence of ``context_tokens`` in the KV cache, and a step's activations.

    Tensor and pipeline parallelism cut everything; data parallelism repeats all but the experts, which expert
    parallelism spreads over all ranks (vLLM's documentation, "Data Parallel Deployment").
    """
    ranks = layout.tensor * layout.pipeline
    experts = model.experts_bytes / (layout.gpus if layout.expert_parallel else ranks)
    return {
        "weights": ((model.weights_bytes - model.experts_bytes) / ranks + experts) / GIB,
        "KV cache": kv_bytes_per_token(model, layout) * context_tokens / GIB,
        # residual stream and one layer's intermediates of a step, then CUDA graphs and communication buffers
        "activations": BATCHED_TOKENS * model.hidden * BF16 * 16 / GIB + 2.0,
    }


def kv_bytes_per_token(model: Footprint, layout: ServingLayout) -> float:
    """Bytes on one GPU; ranks beyond the number of KV heads hold copies."""
    return model.kv_bytes_per_token / min(layout.tensor, model.kv_heads) / layout.pipeline


def serving_rate(
    model: Footprint, layout: ServingLayout, hardware: Hardware, memory: Memory, budget_gib: float, mean_tokens: float
) -> float | None:
    """Tokens a second of a deployment kept full: a decoding step reads the weights and every sequence's cache once
    (roofline of memory bandwidth; "LLM Inference Unveiled", arXiv 2402.16363) and multiplies 2 x active parameters.

    ``budget_gib`` is what vLLM may use of one GPU. None where the GPU's bandwidth is not known.
    """
    if not hardware.gpu_bandwidth_tb_per_second or not hardware.gpu_bf16_tflops:
        return None
    per_token = kv_bytes_per_token(model, layout)
    room = (budget_gib - memory["weights"] - memory["activations"]) * GIB
    sequences = max(1.0, min(MAX_SEQUENCES, room / (per_token * mean_tokens)))
    moved = memory["weights"] * GIB + sequences * per_token * mean_tokens / 2
    reading = moved / (hardware.gpu_bandwidth_tb_per_second * 1e12 * DECODING_UTILISATION) * layout.pipeline
    peak = layout.tensor * hardware.gpu_bf16_tflops * 1e12 * TRAINING_UTILISATION
    return layout.data * sequences / (reading + 2 * model.active_parameters * sequences / peak)


def serving_on_cpu(model: Footprint, kv_gib: float) -> Memory:
    """GiB of the whole machine: vLLM for the CPU is two processes, and takes its KV cache at once."""
    return {"weights": model.weights_bytes / GIB, "KV cache": kv_gib, "processes": 2 * PROCESS_GIB}


def serving_rate_on_cpu(model: Footprint, hardware: Hardware) -> float:
    return hardware.cores * CPU_SERVING_TFLOPS_PER_CORE * 1e12 / (2 * model.active_parameters)


@dataclass(frozen=True)
class TrainingJob:
    """What decides the memory of training: ``tokens`` are those of one micro-batch on one device."""

    architecture: Architecture
    tokens: int
    shards: int = 1  # devices that the states are spread over; 1 is plain data parallelism
    lora: bool = False
    checkpointing: bool = True
    fused_head: bool = True


def training(job: TrainingJob) -> Memory:
    """GiB on one GPU of training in bf16 with float32 master weights and AdamW.

    Full: 16 bytes a parameter (master weight, gradient and two moments in float32; arXiv 1910.02054, section 3.1),
    spread over the shards by ZeRO-3 or FSDP. LoRA: frozen bf16 weights; the adapter's own states are below 1% of them.
    Activations: with checkpointing, each layer's input is kept (tokens x hidden x 2 bytes x layers; arXiv 1604.06174)
    and one layer is recomputed at a time, beside gradients of half its size; without, every layer keeps its own.
    """
    a, share = job.architecture, 1 / job.shards / GIB
    per_layer = _layer_bytes_per_token(a) * job.tokens / GIB
    kept = job.tokens * a.hidden * BF16 * a.layers / GIB if job.checkpointing else (a.layers - 1) * per_layer
    states: Memory = (
        {"weights": BF16 * a.parameters * share, "gradients and optimiser": 0.01 * 16 * a.parameters * share}
        if job.lora
        else {
            "weights": 4 * a.parameters * share,
            "gradients": 4 * a.parameters * share,
            "optimiser": 8 * a.parameters * share,
        }
    )
    parts = {"activations": kept, "one layer's backward": 1.5 * per_layer}
    return {**states, **parts, "logits": _logits(job), "buffers": _gathered(job)}


def _layer_bytes_per_token(a: Architecture) -> float:
    """bf16 activations that one layer keeps for its backward pass with flash attention and SwiGLU: norms, queries,
    attention output and residuals (10 x hidden), keys and values, and gate, up, their product (4 x FFN)."""
    return BF16 * (10 * a.hidden + 2 * a.kv_heads * a.hidden / a.heads + 4 * a.ffn)


def _logits(job: TrainingJob) -> float:
    """A fused head computes the logits in chunks of tokens x hidden elements and keeps the head's gradient in float32
    (Liger, arXiv 2410.10989, section 3.2); a plain one holds all: bf16, their float32 copy and its gradient."""
    a = job.architecture
    if job.fused_head:
        return (job.tokens * a.hidden * 8 + a.vocab * a.hidden * (0 if job.lora else 4)) / GIB
    return job.tokens * a.vocab * (2 + 4 + 4) / GIB


def _gathered(job: TrainingJob) -> float:
    """Whole bf16 weights beside the master copy: all of them under autocast; two layers, the embedding and the head
    where the states are sharded."""
    a = job.architecture
    if job.shards == 1:
        return 0.0 if job.lora else BF16 * a.parameters / GIB
    embedding = a.vocab * a.hidden
    outside = embedding * (1 if a.tied else 2)
    return BF16 * (2 * (a.parameters - outside) / a.layers + outside) / GIB


def training_reserve_gib(gpu_memory_gib: float) -> float:
    """CUDA's context, NCCL's buffers and fragmentation."""
    return 2.0 + 0.02 * gpu_memory_gib


def training_on_cpu(job: TrainingJob) -> Memory:
    """GiB of the machine: the same states, float32 activations of one process, and the process itself."""
    memory = training(job)
    doubled = {part: 2 * memory[part] for part in ("activations", "one layer's backward")}
    return {**memory, **doubled, "processes": PROCESS_GIB}


def training_flops_per_token(architecture: Architecture, context_tokens: float, lora: bool) -> float:
    """6 per parameter and 6 x layers x hidden x context for causal attention (PaLM, arXiv 2204.02311, appendix B,
    halved for the mask); LoRA needs no gradient of the frozen weights: 4 per parameter."""
    attention = 6 * architecture.layers * architecture.hidden * context_tokens
    return (4 if lora else 6) * architecture.parameters + attention


def training_rate(architecture: Architecture, hardware: Hardware, context_tokens: float, lora: bool) -> float | None:
    """Tokens a second over all devices, or None where the GPU's speed is not known."""
    flops = training_flops_per_token(architecture, context_tokens, lora)
    if not hardware.gpus:
        return hardware.cores * CPU_TRAINING_TFLOPS_PER_CORE * 1e12 / flops
    return hardware.gpus * hardware.gpu_bf16_tflops * 1e12 * TRAINING_UTILISATION / flops or None


def quantising(architecture: Architecture, on_gpu: bool) -> tuple[Memory, Memory]:
    """(GiB of the machine, GiB of one GPU) for quantising block by block (auto-round): the model stays in the machine's
    memory with the inputs and outputs of one block for 128 samples of 2,048 tokens; one block goes to the GPU."""
    a = architecture
    samples = 2 * 128 * 2048 * a.hidden * BF16 / GIB
    block = 4 * (a.parameters - a.vocab * a.hidden * (1 if a.tied else 2)) / a.layers / GIB
    work = 1.5 * 8 * 2048 * _layer_bytes_per_token(a) / GIB
    host = {"weights": (BF16 if on_gpu else 4) * a.parameters / GIB, "samples": samples, "processes": PROCESS_GIB}
    device = {"block": 3 * block, "activations": work}
    return (host, device) if on_gpu else ({**host, **device}, {})
