"""Teachers' files: what they say, what is wrong with them, and vLLM's own opinion of their options."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

from r1distill.data.config import load, names
from r1distill.data.errors import RequestError
from r1distill.students.catalogue import GgufVariant, Student
from r1distill.students.usage import commands
from r1distill.teacher.serve import VllmSpec
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Sampling, VllmTeacher, load_teacher

PARSER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
parser.error = lambda message: (_ for _ in ()).throw(ValueError(message))
found = {}
for name, arguments in json.load(sys.stdin).items():
    try:
        read = vars(parser.parse_args(arguments))
        found[name] = [read[name] for name in (
            "max_model_len", "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size",
            "enable_expert_parallel", "distributed_executor_backend", "host",
        )]
    except Exception as error:
        found[name] = f"refused: {error}"
print("FOUND" + json.dumps(found))
"""


def test_all_files_load_and_name_prompts():
    teachers = [load_teacher(name) for name in names("teachers")]
    assert {teacher.kind for teacher in teachers} == {"vllm", "endpoint", "recorded"}
    assert {teacher.prompts for teacher in teachers} <= set(names("prompts"))
    assert {"r1-8xh200", "r1-16xh100", "r1-4xb200", "deepseek-api", "recorded", "embedded"} <= set(names("teachers"))


def typed_for_students() -> dict[str, tuple[list[str], int]]:
    """The vLLM command lines in the cards: (what follows the command, the context length)."""
    found = {}
    for name in names("students"):
        student = load("students", name, Student)
        for variant in (None, *student.variants):
            lines = [line for line in commands(student, "someone/model", variant) if line.startswith("vllm serve ")]
            assert len(lines) == (variant is None or not isinstance(student.variants[variant], GgufVariant))
            for line in lines:
                found[f"{name} {variant}"] = (["--model", *shlex.split(line)[2:]], student.packs.context_tokens)
    return found


def test_vllm_takes_every_option_of_every_file_and_card_and_refuses_a_misspelt_one():
    teachers = {name: load_teacher(name) for name in names("teachers")}
    served = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, VllmTeacher)}
    cards = typed_for_students()
    lines = {name: VllmSpec("model", "name", teacher.options).command(8000)[3:] for name, teacher in served.items()}
    lines |= {name: line for name, (line, _) in cards.items()}
    one_node = {"options.data-parallel-size": 1, "options.tensor-parallel-size": 8, "host": "0.0.0.0"}
    tensor = load_teacher("r1-8xh200", one_node)
    lines["tensor"] = VllmSpec("model", "name", tensor.options, host=tensor.host).command(8000)[3:]
    lines["misspelt"] = VllmSpec("model", "name", {"tensor-paralel-size": 8}).command(8000)[3:]
    done = subprocess.run(
        [sys.executable, "-c", PARSER], input=json.dumps(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert found.pop("misspelt").startswith("refused: ")
    # GPUs by data, tensor and pipeline parallelism, and whether the experts are spread over all of them.
    assert found.pop("tensor")[1:] == [1, 8, 1, True, None, "0.0.0.0"]
    assert found["r1-8xh200"][1:] == [8, 1, 1, True, None, "127.0.0.1"]
    assert found["r1-16xh100"][1:] == [1, 8, 2, False, "ray", "127.0.0.1"]
    lengths = {name: read[0] for name, read in found.items()}
    contexts = {name: teacher.options["max-model-len"] for name, teacher in served.items()}
    assert lengths == contexts | {name: context for name, (_, context) in cards.items()}


def test_answers_have_room_beside_their_questions():
    for name in names("teachers"):
        teacher = load_teacher(name)
        if isinstance(teacher, VllmTeacher):
            assert teacher.options["max-model-len"] - teacher.sampling.max_tokens >= 256, name


def test_execution_stays_out_of_identity():
    teacher = load_teacher("embedded")
    assert isinstance(teacher, VllmTeacher)
    elsewhere = {"client.base_urls": ["http://a/v1"], "client.tokens_per_minute": 10}
    assert load_teacher("embedded", elsewhere).identity() == teacher.identity()
    faster = load_teacher("embedded", {"client.in_flight": 7, "options.max-num-seqs": 7, "environment.X": "1"})
    assert faster.identity() == teacher.identity()
    assert load_teacher("embedded", {"sampling.temperature": 0.7}).identity() != teacher.identity()


def test_kinds_are_told_apart():
    assert isinstance(load_teacher("deepseek-api"), EndpointTeacher)
    assert isinstance(load_teacher("recorded"), RecordedTeacher)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("embeded", {}, "there is no teacher 'embeded'.*Did you mean 'embedded'"),
        ("embedded", {"served_nam": "x"}, "unknown key 'served_nam'.*Did you mean 'served_name'"),
        ("embedded", {"sampling.max_token": 5}, "unknown key 'sampling.max_token'.*Did you mean 'max_tokens'"),
        ("embedded", {"sampling.top_p": 2}, "'sampling.top_p'.*less than or equal to 1.*found 2"),
        ("embedded", {"kind": "vlm"}, "unknown kind 'vlm'.*Did you mean 'vllm'"),
        ("embedded", {"model.kind": "hob"}, "unknown kind 'hob'.*Did you mean 'hub'"),
        ("deepseek-api", {"base_url": "https://user:key@api.x.org"}, "holds no key"),
        ("deepseek-api", {"base_url": "api.x.org"}, "starts with http"),
        ("embedded", {"client.base_urls": ["https://user:key@api.x.org"]}, "holds no key"),
        ("embedded", {"sampling.truncated": {"kind": "retry"}}, "unknown kind 'retry'"),
        ("embedded", {"sampling.truncated": {"kind": "raise", "max_tokens": 96}}, "more than max_tokens"),
        ("recorded", {"source.kind": "reasoning_gym"}, "unknown kind 'reasoning_gym'"),
    ],
)
def test_mistakes_are_told_with_the_nearest_right_word(name, overrides, message):
    with pytest.raises(RequestError, match=message):
        load_teacher(name, overrides)


def test_one_answer_does_not_depend_on_how_many_are_wanted():
    assert Sampling(max_tokens=5, samples=1).of_one() == Sampling(max_tokens=5, samples=9).of_one()
