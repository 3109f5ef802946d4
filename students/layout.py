"""How a training is spread over processes and machines, and the files that start it.

A planner chooses a ``Layout``; ``write`` turns it into what `accelerate launch` and Slurm read. Nothing of it decides
what is learned: every layout takes the same packs in the same steps.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from r1distill.data.config import Settings
from r1distill.data.errors import RequestError
from r1distill.students.catalogue import Architecture, Attention, Launch, Sft, Student

ACCELERATE, DEEPSPEED, SLURM = "accelerate.yaml", "deepspeed.json", "train.slurm"


class Layout(Settings):
    """Processes, what each of them holds, and where they meet.

    ``one`` is one process; ``ddp`` holds everything in each; ``fsdp2`` and ``zero3`` shard weights, gradients and
    optimiser over all of them; ``zero3`` alone can also cut a sequence over ``sequence_parallel`` processes (Ulysses).
    """

    strategy: Literal["one", "ddp", "fsdp2", "zero3"] = "one"
    nodes: int = Field(1, ge=1)
    processes_per_node: int = Field(1, ge=1)  # one a GPU
    sequence_parallel: int = Field(1, ge=1)
    packs_per_batch: int = Field(1, ge=1)  # packs that a process computes at once
    checkpointing: bool = True  # activations are computed again in the backward pass
    offload_activations: bool = False  # what checkpointing keeps waits in the machine's memory
    attention: Attention = "auto"
    liger: bool = False
    cpu: bool = True
    device_tflops: float = Field(0, ge=0)  # one device's peak in bf16; 0: not known, and no MFU is told
    hosts: tuple[str, ...] = ()  # one a node, the first is where the run was started; empty: this machine alone
    port: int = Field(29500, gt=0)  # on the first host, where several machines meet

    @model_validator(mode="after")
    def _consistent(self) -> Layout:
        if (self.strategy == "one") != (self.processes == 1):
            raise ValueError(f"strategy '{self.strategy}' does not go with {self.processes} processes")
        if self.strategy == "fsdp2" and self.cpu:
            raise ValueError("fsdp2 needs GPUs: on the CPU accelerate would silently train plain data parallel")
        if self.sequence_parallel > 1 and self.strategy != "zero3":
            raise ValueError("sequence_parallel needs the strategy zero3")
        if self.processes % self.sequence_parallel:
            raise ValueError(f"sequence_parallel {self.sequence_parallel} must divide {self.processes} processes")
        if self.sequence_parallel > 1 and self.attention == "sdpa":
            raise ValueError(
                "sequence_parallel drops the masks that sdpa would need: attention must be varlen or flash"
            )
        if self.sequence_parallel > 1 and self.packs_per_batch > 1:
            raise ValueError("sequence_parallel takes one pack at a time: packs_per_batch must be 1")
        if self.offload_activations and self.cpu:
            raise ValueError("offload_activations needs GPUs")
        return self

    @property
    def processes(self) -> int:
        """Processes of all nodes together."""
        return self.nodes * self.processes_per_node

    @property
    def replicas(self) -> int:
        """How many groups of processes work on different packs."""
        return self.processes // self.sequence_parallel

    @property
    def states(self) -> str:
        """In which form a checkpoint of the training holds its states: one that has another form can't go on from it.
        ZeRO-3's are in as many pieces as it has processes; FSDP2's are cut anew."""
        return {"fsdp2": "fsdp2", "zero3": f"zero3 of {self.processes}"}.get(self.strategy, "whole")

    @property
    def attention_used(self) -> str:
        """The attention: sdpa builds a mask of T x T; ``varlen`` and flash attention read the members' borders."""
        if self.attention != "auto":
            return self.attention
        return "sdpa" if self.cpu and self.sequence_parallel == 1 else "varlen"

    @property
    def flat(self) -> bool:
        """Packs of a batch are laid end to end in one row: only sdpa keeps the members of several rows apart."""
        return self.attention_used != "sdpa"

    def rounds(self, packs_per_step: int) -> int:
        """Micro-batches that each group of processes computes in a step of so many packs; the last may be empty."""
        return -(-packs_per_step // (self.replicas * self.packs_per_batch))

    def occupancy(self, packs_per_step: int) -> float:
        """The share of a step's places that hold a pack: 10 packs on 8 processes fill 10 of 16."""
        return packs_per_step / (self.rounds(packs_per_step) * self.replicas * self.packs_per_batch)

    def __str__(self) -> str:
        names = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero3": "ZeRO-3"}
        parts = [names[self.strategy] + (f" x{self.processes}" if self.processes > 1 else "")]
        parts += [f"{self.nodes} nodes"] if self.nodes > 1 else []
        parts += [f"Ulysses {self.sequence_parallel}"] if self.sequence_parallel > 1 else []
        parts += ["checkpointing" + (" with offload" if self.offload_activations else "")] if self.checkpointing else []
        return ", ".join(parts)


def build(launch: Launch, **chosen: Any) -> Layout:
    """A layout of the ``chosen`` values, over which go those that the user's ``launch`` sets.

    Raises RequestError where the two contradict each other.
    """
    names = ("sequence_parallel", "packs_per_batch", "checkpointing", "offload_activations", "attention", "port")
    asked = {name: value for name in names if (value := getattr(launch, name)) is not None}
    try:
        return Layout.model_validate({**chosen, **asked})
    except ValidationError as error:
        reasons = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise RequestError(
            f"this training can't be laid out: {reasons}. Look at student.sft.launch and the hardware's file."
        ) from None


def shares_heads(layout: Layout, shape: Architecture) -> bool:
    """Whether Ulysses can share the attention heads out evenly."""
    degree = layout.sequence_parallel
    return not (shape.heads % degree or (shape.kv_heads % degree and degree % shape.kv_heads))


def check(layout: Layout, student: Student) -> None:
    """Raise RequestError where this student can't be trained so: heads that can't be shared out, hosts not named."""
    shape, degree = student.architecture, layout.sequence_parallel
    if not shares_heads(layout, shape):
        raise RequestError(
            f"sequence_parallel {degree} can't share {shape.heads} heads and {shape.kv_heads} key-value heads out "
            "evenly. Set student.sft.launch.sequence_parallel to a divisor of the heads."
        )
    if layout.nodes > 1 and len(layout.hosts) != layout.nodes:
        raise RequestError(
            f"{layout.nodes} nodes need as many host names, found {len(layout.hosts)}. "
            "Name them, this one first: --set 'hardware.hosts=[node1,node2]'"
        )
    method = student.sft.method
    if method.kind != "full" and method.train_renamed_rows and layout.strategy == "zero3" and layout.cpu:
        raise RequestError(
            "on the CPU peft can't train rows of embeddings that zero3 has sharded: set student.sft.launch.strategy to "
            "ddp, or student.sft.method.train_renamed_rows to false."
        )
    if method.kind == "qlora":
        if layout.strategy == "zero3":
            raise RequestError(
                "qlora's 4-bit weights can't be sharded by zero3: set student.sft.launch.strategy to fsdp2."
            )
        if layout.cpu:
            raise RequestError("qlora needs a GPU: bitsandbytes' 4-bit layers fail on the CPU. Take lora there.")


def write(layout: Layout, sft: Sft, folder: Path) -> Path:
    """Write accelerate's file (and DeepSpeed's beside it) into ``folder``; its path is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout.strategy == "zero3":
        (folder / DEEPSPEED).write_text(json.dumps(deepspeed(layout, sft), indent=1) + "\n")
    file = folder / ACCELERATE
    file.write_text(yaml.safe_dump(accelerate(layout, folder), sort_keys=False))
    return file


def accelerate(layout: Layout, folder: Path) -> dict[str, Any]:
    """accelerate's settings. Mixed precision is left to the trainer and, under ZeRO-3, to DeepSpeed's file.

    Several processes on the CPU are started as ``MULTI_GPU``: that is torchrun; accelerate's ``MULTI_CPU`` needs MPI.
    """
    kinds = {"one": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kinds[layout.strategy],
        "mixed_precision": None if layout.strategy == "zero3" else "no",
        "use_cpu": layout.cpu,
        "debug": False,
        "num_machines": layout.nodes,
        "num_processes": layout.processes,
        "dynamo_backend": "NO",
    }
    if layout.strategy == "fsdp2":
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",  # the model class names its own layers
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",  # of checkpoints; the final weights are gathered
            "fsdp_cpu_ram_efficient_loading": True,  # one process a machine reads the weights
            "fsdp_activation_checkpointing": False,  # the trainer's own, which is the same for every strategy
            "fsdp_offload_params": False,
        }
    if layout.strategy == "zero3":
        settings["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / DEEPSPEED),
            "deepspeed_multinode_launcher": "standard",  # torchrun on each node; the default needs pdsh
            "zero3_init_flag": True,  # weights are sharded while they are loaded
        }
    if layout.sequence_parallel > 1:
        settings["parallelism_config"] = {
            "parallelism_config_sp_size": layout.sequence_parallel,
            "parallelism_config_sp_backend": "deepspeed",
            "parallelism_config_sp_seq_length_is_variable": True,  # the last packs are shorter
            # Which attention it calls is set by the trainer: accelerate's own list has no ``varlen``.
        }
    return {key: value for key, value in settings.items() if value is not None}


def deepspeed(layout: Layout, sft: Sft) -> dict[str, Any]:
    """DeepSpeed's settings: ZeRO-3, bf16 weights under float32 master weights, gradients reduced in float32."""
    return {
        "bf16": {"enabled": sft.precision == "bf16_autocast"},
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "reduce_scatter": True,  # so gradients are averaged over all processes, under Ulysses too
            "overlap_comm": not layout.cpu,
            "reduce_bucket_size": "auto",  # by hidden size
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": True,  # without it no weights are saved
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": sft.max_grad_norm,
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def launch_arguments(layout: Layout, launch: Launch, config: Path, rank: int, cores: int) -> list[str]:
    """The options of `accelerate launch` on node ``rank``; ``cores`` are that node's."""
    options: dict[str, Any] = {
        "config_file": config,
        "num_cpu_threads_per_process": max(1, cores // layout.processes_per_node),  # its default is one
    }
    if layout.nodes > 1:
        options |= {"machine_rank": rank, "main_process_ip": layout.hosts[0], "main_process_port": layout.port}
    elif layout.processes > 1:
        options["main_process_port"] = 0  # a free one: several trainings may share a machine
    options |= launch.options
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items() if value is not False]


def slurm(layout: Layout, command: Sequence[str], *, name: str, cores: int, hours: float = 24) -> str:
    """A batch script that takes the layout's nodes whole and runs ``command`` (a `r1distill distill …`) on the first.

    The run starts its other nodes through srun. ``cores`` are one node's.
    """
    whole, rest = divmod(round(hours * 60), 60)
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={layout.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={cores}",
        *([f"#SBATCH --gpus-per-node={layout.processes_per_node}"] if not layout.cpu else []),
        "#SBATCH --exclusive",
        f"#SBATCH --time={whole}:{rest:02}:00",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --requeue",  # the same command goes on from the last checkpoint
        "",
        "set -euo pipefail",
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)',
        f'exec {shlex.join(command)} --set "hardware.hosts=[$hosts]"',
    ]
    return "\n".join(lines) + "\n"
