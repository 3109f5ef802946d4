"""Memory and speed of serving and quantising, as formulas with their sources; ``training`` holds those of training.

Memory is a mapping from a part's name to GiB on one device: one GPU, or the whole machine where it has none. The tests
hold these formulas to DeepSeek's and vLLM's serving rates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from r1distill.pipeline.footprint import BF16, Footprint
from r1distill.pipeline.hardware import GIB, TRAINING_UTILISATION, Hardware
from r1distill.students.catalogue import Architecture, Variant

Memory = dict[str, float]

# Share of the memory bandwidth that decoding reaches; 0.6 reproduces DeepSeek's node (14,800 tokens/s) and vLLM's wide
# expert parallelism (2,200 tokens/s on one H200) from the roofline below.
DECODING_UTILISATION = 0.6
# Two cores of a current server: SmolLM2-135M trained 229 tokens/s and served 230 tokens/s with 64 in flight.
CPU_TRAINING_TFLOPS_PER_CORE = 6 * 134.5e6 * 229 / 2 / 1e12
CPU_SERVING_TFLOPS_PER_CORE = 2 * 134.5e6 * 230 / 2 / 1e12

CPU_START_SECONDS = 36.0  # until vLLM for the CPU answers, with SmolLM2-135M and --enforce-eager

MACHINE_SHARE = 0.95  # of a machine's memory; the rest is the system's
PROCESS_GIB = 1.5  # one Python process with torch and its libraries loaded
GPU_SHARE = 0.9  # vLLM's default --gpu-memory-utilization
BATCHED_TOKENS = 8192  # vLLM's default tokens in one step; its profile run reserves memory for them
ALL_REDUCE_SECONDS = 10e-6  # of a small one between the GPUs of a node, beside its transfer: an assumption
# A variant of SmolLM2-135M without tuning took 23 to 77 s on two cores: starting, then packing and writing.
QUANTISING_START_SECONDS = 15.0
PACKING_CORE_SECONDS = 2 * (77 - QUANTISING_START_SECONDS) / 134.5e6  # a parameter
QUANTISED_TOKENS = 16_384  # that go through a block at once: students.quantise.TOKENS_AT_ONCE
MAX_SEQUENCES = 256  # vLLM's default --max-num-seqs, of each data parallel rank


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

    @property
    def options(self) -> dict[str, int | bool]:
        """vLLM's flags for it, without their dashes."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "data": self.data}
        found: dict[str, int | bool] = {f"{kind}-parallel-size": size for kind, size in sizes.items() if size > 1}
        return {**found, "enable-expert-parallel": True} if self.expert_parallel else found

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
        # residual stream and one layer's intermediates of a step
        "activations": BATCHED_TOKENS * model.hidden * BF16 * 16 / GIB,
        # float32 logits of the sequences of a step, cut by tensor parallelism, and the sampler's sorted copy of them
        "logits": 2 * 4 * MAX_SEQUENCES * model.vocab / layout.tensor / GIB,
        "buffers": 2.0,  # CUDA graphs and communication: an assumption
    }


def kv_bytes_per_token(model: Footprint, layout: ServingLayout) -> float:
    """Bytes on one GPU; ranks beyond the number of KV heads hold copies."""
    return model.kv_bytes_per_token / min(layout.tensor, model.kv_heads) / layout.pipeline


def sequences_held(
    model: Footprint, layout: ServingLayout, memory: Memory, budget_gib: float, mean_tokens: float, most: int
) -> int:
    """Sequences of the mean length that one data parallel rank holds at a time, at least one, at most ``most``.

    ``budget_gib`` is what vLLM may use of one GPU: the cache gets what weights and a step leave.
    """
    room = (budget_gib - sum(memory.values()) + memory["KV cache"]) * GIB
    return max(1, min(most, int(room / (kv_bytes_per_token(model, layout) * mean_tokens))))


def serving_rate(
    model: Footprint, layout: ServingLayout, hardware: Hardware, memory: Memory, sequences: int, mean_tokens: float
) -> float | None:
    """Tokens a second of a deployment whose ranks each decode ``sequences`` at a time: a step reads the weights and
    every sequence's cache once, half full on average (roofline of memory bandwidth; "LLM Inference Unveiled", arXiv
    2402.16363), and multiplies 2 x active parameters; tensor parallelism sums up twice a layer (arXiv
    1909.08053, section 3). Questions are short beside R1's answers, and what experts exchange overlaps: not counted.

    None where the GPU's bandwidth is not known.
    """
    if not hardware.gpu_bandwidth_tb_per_second or not hardware.gpu_bf16_tflops:
        return None
    moved = memory["weights"] * GIB + sequences * kv_bytes_per_token(model, layout) * mean_tokens / 2
    reading = moved / (hardware.gpu_bandwidth_tb_per_second * 1e12 * DECODING_UTILISATION) * layout.pipeline
    peak = layout.tensor * hardware.gpu_bf16_tflops * 1e12 * TRAINING_UTILISATION
    summing = 0.0
    if layout.tensor > 1:
        sent = 2 * (layout.tensor - 1) / layout.tensor * sequences * model.hidden * BF16
        transfer = sent / (hardware.link_gb_per_second * 1e9) if hardware.link_gb_per_second else 0.0
        summing = 2 * model.layers * (ALL_REDUCE_SECONDS + transfer)
    return layout.data * sequences / (reading + summing + 2 * model.active_parameters * sequences / peak)


def serving_on_cpu(model: Footprint, kv_gib: float) -> Memory:
    """GiB of the whole machine: vLLM for the CPU takes its KV cache at once, and runs its engine in the server's own
    process (``teacher.serve.CPU_ENVIRONMENT``). SmolLM2-135M with a cache of 1 GiB took 3.0 in all."""
    return {"weights": model.weights_bytes / GIB, "KV cache": kv_gib, "processes": 1.2 * PROCESS_GIB}


def serving_rate_on_cpu(model: Footprint, hardware: Hardware) -> float:
    return hardware.cores * CPU_SERVING_TFLOPS_PER_CORE * 1e12 / (2 * model.active_parameters)


SCORED_AT_ONCE = 2048  # tokens whose logits are held: kernels.token_scores' chunk


def scoring(model: Footprint, context_tokens: int, gpus: int) -> Memory:
    """GiB on one of the ``gpus`` that hold a copy, or the machine, for reading one pack at a time and keeping each
    token's top-k: bf16 weights and activations (float32 on the CPU) of one layer, and the logits of a chunk beside
    their float32 copy."""
    size = BF16 if gpus else 4
    memory: Memory = {
        "weights": size * model.parameters / max(1, gpus) / GIB,
        "activations": 16 * size * context_tokens * model.hidden / GIB,
        "logits": (size + 4) * SCORED_AT_ONCE * model.vocab / GIB,
    }
    return memory if gpus else {**memory, "processes": PROCESS_GIB}


def scoring_rate(model: Footprint, hardware: Hardware, copies: int, mean_tokens: float) -> float | None:
    """Tokens a second of a forward pass: 2 operations a parameter, and 2 x layers x hidden x half of what stands before
    a token (a third of training's, PaLM, arXiv 2204.02311, appendix B), at the share of the peak that training reaches.
    The GPUs of a copy work one after the other.

    None where the GPU's speed is not known."""
    flops = 2 * model.active_parameters + 2 * model.layers * model.hidden * mean_tokens
    if not hardware.gpus:
        return hardware.cores * CPU_TRAINING_TFLOPS_PER_CORE * 1e12 / flops
    return copies * hardware.gpu_bf16_tflops * 1e12 * hardware.training_utilisation / flops or None


def quantising(architecture: Architecture, variants: Iterable[Variant], on_gpu: bool) -> tuple[Memory, Memory]:
    """(GiB of the machine, GiB of one GPU) for quantising block by block (AutoRound, arXiv 2309.05516): the model stays
    in the machine's memory with the inputs and outputs of one block for all calibration text; one block goes to the
    GPU, with its gradient and the rounding that is learned. The variants are made one after the other."""
    a = architecture
    read = [(v.calibration_pieces, v.calibration_tokens) for v in variants if v.calibrated]
    calibration = max((pieces * tokens for pieces, tokens in read), default=0)
    masks = max((pieces * tokens**2 for pieces, tokens in read), default=0)  # AutoRound keeps one a piece, in bytes
    block = 4 * (a.parameters - a.vocab * a.hidden * (1 if a.tied else 2)) / a.layers / GIB
    host: Memory = {
        "weights": (BF16 if on_gpu else 4) * a.parameters / GIB,
        "samples": (2 * calibration * a.hidden * BF16 + masks) / GIB,
        "processes": PROCESS_GIB,
    }
    at_once = min(calibration, QUANTISED_TOKENS)
    device = {"block": 3 * block, "activations": 1.5 * at_once * layer_bytes_per_token(a) / GIB}
    return (host, device) if on_gpu else ({**host, **device}, {})


def layer_bytes_per_token(a: Architecture) -> float:
    """bf16 activations that one layer keeps for its backward pass with flash attention and SwiGLU: norms, queries,
    attention output and residuals (10 x hidden), keys and values, and gate, up, their product (4 x FFN)."""
    return BF16 * (10 * a.hidden + 2 * a.kv_heads * a.hidden / a.heads + 4 * a.ffn)


def quantising_seconds(architecture: Architecture, variant: Variant, hardware: Hardware) -> float | None:
    """Of one variant on one GPU, or the machine: calibration text goes through every block twice (as it was, and
    quantised) at 2 x parameters a token, and each tuning step trains on QUANTISED_TOKENS at 6; packing is the
    machine's own work. None where the GPU's speed is not known.
    """
    calibration = variant.calibration_pieces * variant.calibration_tokens if variant.calibrated else 0
    tuned = variant.tuning_steps * min(calibration, QUANTISED_TOKENS)
    flops = (2 * 2 * calibration + 6 * tuned) * architecture.parameters
    own = QUANTISING_START_SECONDS + PACKING_CORE_SECONDS * architecture.parameters / hardware.cores
    if not hardware.gpus:
        return own + flops / (hardware.cores * CPU_TRAINING_TFLOPS_PER_CORE * 1e12)
    speed = hardware.gpu_bf16_tflops * 1e12 * hardware.training_utilisation
    return own + flops / speed if speed else None
