"""Hardware as it is found on a machine, and as a file may describe it."""

import pytest

from r1distill.pipeline.hardware import Hardware, detect


def test_detection_sees_this_machine():
    found = detect()
    assert found.name == "local" and found.cores >= 1 and found.memory_gib > 0.5 and found.disk_gib > 0


def test_gpus_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nfor i in 0 1; do echo 'NVIDIA H100 80GB HBM3, 81559'; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = detect()
    assert (found.gpus_per_node, found.gpu, found.gpu_bf16_tflops) == (2, "NVIDIA H100 80GB HBM3", 989)
    assert found.gpu_memory_gib == pytest.approx(79.65, abs=0.01)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect().gpus_per_node == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect().gpus == 0


def test_a_driverless_nvidia_smi_means_no_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Failed to initialize NVML' >&2; exit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert detect().gpus == 0


def test_hardware_with_gpus_needs_their_memory():
    with pytest.raises(ValueError, match="gpu_memory_gib"):
        Hardware(cores=64, memory_gib=1000, disk_gib=10_000, gpus_per_node=8)
