"""What `plan --write` leaves is what the stages start: the same settings, and scripts that a shell runs."""

import json
import os
import subprocess

import pytest
import yaml

from r1distill.data.errors import RequestError
from r1distill.pipeline import planfiles
from r1distill.pipeline.plan import plan, training_layout
from r1distill.pipeline.run import Run
from r1distill.students import layout
from r1distill.teacher import serve

REQUEST = ["--student", "qwen-32b", "--set", "student.sft.epochs=3"]


def written(folder, student, hardware, teacher=None):
    run = Run.load(student, teacher, hardware=hardware)
    answer = plan(run.student, run.teacher, run.hardware, run.prompts, run.benchmarks)
    return run, {file.name: file for file in planfiles.write(run, answer, REQUEST, folder / "files")}


def arguments(script, tmp_path, *given):
    """What a script would give to Python, and its environment, from a python that only tells."""
    tell = tmp_path / "bin" / "python"
    tell.parent.mkdir(exist_ok=True)
    tell.write_text('#!/bin/bash\nprintf "%s\\0" "$@"; printf "%s\\0" "ENV $VLLM_NO_USAGE_STATS"\n')
    tell.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tell.parent}:{os.environ['PATH']}"}
    done = subprocess.run([script, *given], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split("\0")[:-1]


def test_training_files_are_the_stages_own(tmp_path):
    run, files = written(tmp_path, "qwen-32b", "16xh100", "r1-16xh100")
    spread = training_layout(run)
    folder = (tmp_path / "files").resolve()
    assert spread.strategy == "zero3"
    assert yaml.safe_load(files["accelerate.yaml"].read_text()) == layout.accelerate(spread, folder)
    assert json.loads(files["deepspeed.json"].read_text()) == layout.deepspeed(spread, run.student.sft)
    slurm = files["train.slurm"].read_text()
    assert "--nodes=2" in slurm and "r1distill distill --student qwen-32b --set student.sft.epochs=3" in slurm
    subprocess.run(["bash", "-n", files["train.slurm"]], check=True)


def test_serving_scripts_give_vllm_what_the_stages_give_it(tmp_path):
    _, files = written(tmp_path, "qwen-32b", "16xh100", "r1-16xh100")
    told = arguments(files["serve.sh"], tmp_path)
    assert tuple(told[:2]) == serve.VLLM and told[-1] == "ENV 1"
    assert told[told.index("--tensor-parallel-size") :][:2] == ["--tensor-parallel-size", "8"]
    assert told[2:4] == ["--model", "deepseek-ai/DeepSeek-R1"] and "--enforce-eager" not in told
    student = arguments(files["serve-student.sh"], tmp_path, "a folder/with blanks")
    assert student[2:6] == ["--model", "a folder/with blanks", "--served-model-name", "qwen-32b"]
    assert "--tensor-parallel-size" in student


def test_the_cpu_gets_its_own_flags_and_no_slurm(tmp_path):
    _, files = written(tmp_path, "smollm2-135m", "laptop")
    assert set(files) == {"accelerate.yaml", "serve-student.sh"}  # the embedded teacher is made on first use
    assert "--enforce-eager" in arguments(files["serve-student.sh"], tmp_path, "folder")


def test_what_does_not_fit_is_not_written(tmp_path):
    _, files = written(tmp_path, "qwen-32b", "8xh100")
    assert set(files) == {"serve-student.sh"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "files").write_text("")
    with pytest.raises(RequestError, match=r"files can't be written"):
        written(tmp_path, "smollm2-135m", "laptop")
