"""Layouts: what contradicts itself is refused, and what is written is read by the libraries it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from r1distill.data.config import load
from r1distill.data.errors import RequestError
from r1distill.students import layout
from r1distill.students.catalogue import Launch, Student
from r1distill.students.layout import Layout

LAYOUTS = {
    "one": Layout(),
    "ddp on the CPU": Layout(strategy="ddp", processes_per_node=2),
    "ddp": Layout(strategy="ddp", processes_per_node=8, cpu=False, packs_per_batch=2),
    "fsdp2": Layout(strategy="fsdp2", processes_per_node=8, cpu=False, offload_activations=True),
    "fsdp2 on nodes": Layout(strategy="fsdp2", nodes=2, processes_per_node=8, cpu=False, hosts=("a", "b")),
    "zero3": Layout(strategy="zero3", processes_per_node=8, cpu=False),
    "ulysses": Layout(
        strategy="zero3", nodes=2, processes_per_node=8, sequence_parallel=8, cpu=False, hosts=("a", "b"), port=29600
    ),
}
each_layout = pytest.mark.parametrize("spread", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture(scope="module")
def student() -> Student:
    return load("students", "qwen-32b", Student)


@pytest.mark.parametrize(
    "values",
    [
        {"processes_per_node": 2},
        {"strategy": "ddp"},
        {"strategy": "fsdp2", "processes_per_node": 2},  # on the CPU it would be plain data parallel
        {"strategy": "fsdp2", "processes_per_node": 2, "cpu": False, "sequence_parallel": 2},
        {"strategy": "zero3", "processes_per_node": 8, "cpu": False, "sequence_parallel": 3},
        {"strategy": "zero3", "processes_per_node": 8, "cpu": False, "sequence_parallel": 2, "packs_per_batch": 2},
        {"offload_activations": True},
        {"rank": 1},
    ],
    ids=str,
)
def test_a_layout_that_contradicts_itself_is_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        Layout(**values)


def test_what_the_user_wants_goes_over_what_is_chosen() -> None:
    assert layout.build(Launch()) == Layout()
    node: dict = {"strategy": "fsdp2", "processes_per_node": 8, "cpu": False}
    chosen = layout.build(Launch(checkpointing=False, packs_per_batch=2), **node, nodes=2, hosts=("a", "b"))
    assert (chosen.strategy, chosen.processes) == ("fsdp2", 16)
    assert (chosen.checkpointing, chosen.packs_per_batch) == (False, 2)
    with pytest.raises(RequestError, match="sequence_parallel needs the strategy zero3.*student.sft.launch"):
        layout.build(Launch(sequence_parallel=2), **node)


def test_a_layout_survives_json() -> None:
    for spread in LAYOUTS.values():
        assert Layout.model_validate(json.loads(spread.model_dump_json())) == spread


def test_ulysses_shares_heads_out_evenly(student: Student) -> None:
    wide = {"strategy": "zero3", "processes_per_node": 8, "cpu": False}
    layout.check(Layout(**wide, sequence_parallel=8), student)  # 40 heads, 8 of keys
    seven = load("students", "qwen-7b", Student)  # 28 heads, 4 of keys
    layout.check(Layout(**wide, sequence_parallel=4), seven)
    with pytest.raises(RequestError, match="28 heads"):
        layout.check(Layout(**wide, sequence_parallel=8), seven)


def test_what_a_student_cant_be_trained_with_is_refused_before_anything_starts(student: Student) -> None:
    two = LAYOUTS["fsdp2 on nodes"]
    layout.check(two, student)
    with pytest.raises(RequestError, match=r"2 nodes need as many host names, found 1.*hardware.hosts=\[node1,node2\]"):
        layout.check(two.model_copy(update={"hosts": ("a",)}), student)
    method = {"kind": "qlora", "rank": 8, "alpha": 16}
    quantised = Student.model_validate({**student.model_dump(), "sft": {**student.sft.model_dump(), "method": method}})
    layout.check(LAYOUTS["fsdp2"], quantised)
    with pytest.raises(RequestError, match="can't be sharded by zero3"):
        layout.check(LAYOUTS["zero3"], quantised)
    with pytest.raises(RequestError, match="qlora needs a GPU"):
        layout.check(LAYOUTS["one"], quantised)
    with pytest.raises(RequestError, match="peft can't train rows of embeddings that zero3 has sharded"):
        layout.check(LAYOUTS["zero3"].model_copy(update={"cpu": True}), quantised)


def test_four_bits_are_nf4_or_the_missing_library_is_named() -> None:
    """The settings alone: bitsandbytes' layers have not run here."""
    import importlib.util

    from r1distill.students import base

    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(RequestError, match="qlora needs bitsandbytes"):
            base.four_bits(sharded=True)
        return
    import torch

    settings = base.four_bits(sharded=True)
    assert (settings.quantization_method, settings.bnb_4bit_quant_type) == ("bitsandbytes", "nf4")
    assert settings.bnb_4bit_quant_storage == settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert base.four_bits(sharded=False).bnb_4bit_quant_storage == torch.uint8


def test_places_of_a_step() -> None:
    eight = LAYOUTS["zero3"]
    assert (eight.rounds(10), eight.occupancy(10)) == (2, 10 / 16)
    assert (LAYOUTS["ulysses"].rounds(10), LAYOUTS["ulysses"].occupancy(10)) == (5, 1.0)


@each_layout
@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_reads_what_is_written(spread: Layout, rank: int, student: Student, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    if rank >= spread.nodes:
        pytest.skip("one node")
    file = layout.write(spread, student.sft, tmp_path)
    config = load_config_from_file(str(file))
    assert (config.num_processes, config.num_machines) == (spread.processes, spread.nodes)
    arguments = layout.launch_arguments(spread, Launch(), file, rank, cores=16)
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "-m", "module", "job"]))
    assert parsed.num_processes == spread.processes and parsed.training_script == "module"
    assert parsed.num_cpu_threads_per_process == max(1, 16 // spread.processes_per_node)
    assert (parsed.use_fsdp, parsed.use_deepspeed) == (spread.strategy == "fsdp2", spread.strategy == "zero3")
    assert parsed.multi_gpu == (spread.strategy == "ddp")
    known = vars(parsed)
    for section in ("fsdp_config", "deepspeed_config", "parallelism_config"):
        for key, value in getattr(config, section).items():
            assert known[key] == value, key  # a key that accelerate doesn't know would be no option of its own
    if spread.nodes > 1:
        assert (parsed.machine_rank, parsed.main_process_ip, parsed.main_process_port) == (rank, "a", spread.port)


def test_accelerates_plugins_take_the_settings(student: Student, tmp_path: Path, monkeypatch) -> None:
    """What the launcher hands to the processes as their environment builds FSDP2 and Ulysses as they are meant."""
    from accelerate import ParallelismConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from torch.distributed.fsdp import OffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    def environment(name: str, prepare) -> dict[str, str]:
        spread = LAYOUTS[name].model_copy(update={"nodes": 1, "hosts": ()})
        file = layout.write(spread, student.sft, tmp_path)
        arguments = layout.launch_arguments(spread, Launch(), file, 0, cores=16)
        parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*arguments, "script.py"]))
        parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare(parsed)

    for key, value in environment("fsdp2", prepare_multi_gpu_env).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and type(plugin.cpu_offload) is OffloadPolicy
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not plugin.activation_checkpointing
    _, ulysses = environment("ulysses", prepare_deepspeed_cmd_env)
    for key, value in ulysses.items():
        if key.startswith("PARALLELISM_CONFIG_"):
            monkeypatch.setenv(key, value)
    config = ParallelismConfig()
    assert (config.sp_size, config.sp_backend) == (8, "deepspeed")
    assert config.sp_handler.sp_seq_length_is_variable


def test_the_slurm_script_is_a_script() -> None:
    import subprocess

    text = layout.slurm(LAYOUTS["ulysses"], ["echo", "a b"], name="qwen-32b", cores=192)
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=1", "--cpus-per-task=192", "--exclusive"):
        assert f"#SBATCH {line}\n" in text
    fake = "scontrol() { printf 'n1\\nn2\\n'; }; export -f scontrol; SLURM_JOB_NODELIST='n[1-2]'; "
    script = fake + text.replace("exec ", "")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "a b --set hardware.hosts=[n1,n2]\n"


@each_layout
def test_the_files_are_plain(spread: Layout, student: Student, tmp_path: Path) -> None:
    written = yaml.safe_load(layout.write(spread, student.sft, tmp_path).read_text())
    assert written["compute_environment"] == "LOCAL_MACHINE"
    assert (tmp_path / layout.DEEPSPEED).is_file() == (spread.strategy == "zero3")
