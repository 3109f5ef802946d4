"""Evaluation end to end, against a server that answers at once: asked as DeepSeek asks, resumed, judged, kept private."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from r1distill.data import models
from r1distill.data.config import ROOT, load
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.settings import Benchmark
from r1distill.data.sources import FileSource
from r1distill.pipeline import checkup, evaluation, stageplan
from r1distill.pipeline.evaluation import Contender
from r1distill.pipeline.metrics import summary
from r1distill.pipeline.run import Run
from r1distill.students.catalogue import Student
from r1distill.students.template import TEMPLATES
from r1distill.teacher.serve import LlamaSpec
from r1distill.teacher.settings import Client, EndpointTeacher, RecordedTeacher, Sampling

CHAT_TEMPLATES = ROOT.parent / "shared" / "data" / "tokenizers" / "chat_templates"


def benchmark(folder: Path, rows: list[dict], name: str = "sums", **changes) -> Benchmark:
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    source = FileSource(kind="file", path=str(file), license="mit")
    settings = {"title": name, "source": source, "k": 4, "instruction": "Box it.", **changes}
    return Benchmark(name=name, **settings)


def contender(url: str, name: str = "model", **changes) -> Contender:
    server = EndpointTeacher(
        kind="endpoint", name="m", prompts="", base_url=url, model="fast", sampling=Sampling(max_tokens=1),
        client=Client(in_flight=8, backoff_seconds=0.01, attempts=2),
    )  # fmt: skip
    return Contender(name, server, "r1", None, opens_thinking=True, **changes)


def thought(answer: str) -> str:
    return f"Let me see.\n</think>\n\nSo it is $\\boxed{{{answer}}}$."


QUESTIONS = [{"question": f"{n} + {n}?", "reference_answer": str(2 * n)} for n in range(8, 11)]


def one_of_each(question: str, number: int) -> str | tuple[str, str]:
    """Right with a leading zero, right but cut off, wrong, right."""
    right = 2 * int(question.split()[0])
    looping = "again and again the same words come back to me without an end in sight " * 40
    return [
        thought(f"0{right}"),
        (f"{looping}</think>\n\n\\boxed{{{right}}}", "length"),
        thought(str(right + 1)),
        thought(str(right)),
    ][number % 4]


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def test_a_model_is_asked_with_deepseeks_settings_and_judged_by_its_final_answer(tmp_path, out, fast_model):
    server = fast_model(one_of_each)
    bench = benchmark(tmp_path, QUESTIONS)
    answers = evaluation.answers(evaluation.asked([bench], [contender(server.url)]), tmp_path, out, workers=1)
    assert len(server.bodies) == 12
    for body in server.bodies:
        assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 32768)
        (message,) = body["messages"]  # no system prompt
        assert message["role"] == "user" and message["content"].endswith("?\n\nBox it.")
    row = summary(answers)
    assert row["accuracy"] == 0.5  # "016" is 16, and what was cut off is wrong although its answer is right
    assert row["truncated"] == row["looped"] == 0.25
    assert (row["cons"], row["cons_ties"]) == (1.0, 0)  # "016" and "16" vote together, what was cut off does not vote
    assert row["pass_at"]["4"] == 1.0
    table = pq.read_table(out / "answers.parquet")
    assert table.schema.equals(evaluation.ANSWER)
    assert {row["reason"] for row in table.to_pylist()} == {None, "truncated", "correctness: wrong answer"}
    assert all(row["completion"] for row in table.to_pylist())


def test_nothing_is_asked_or_judged_twice(tmp_path, out, fast_model):
    server = fast_model(one_of_each)
    bench = benchmark(tmp_path, QUESTIONS)
    first = evaluation.answers(evaluation.asked([bench], [contender(server.url)]), tmp_path, out, workers=1)
    server.close()
    (tmp_path / "again").mkdir()
    again = evaluation.answers(
        evaluation.asked([bench], [contender(server.url)]), tmp_path, tmp_path / "again", workers=1
    )
    assert again == first  # with nobody there to ask


def test_more_samples_ask_only_for_the_new_ones(tmp_path, out, fast_model):
    server = fast_model(one_of_each)
    bench = benchmark(tmp_path, QUESTIONS)
    evaluation.answers(evaluation.asked([bench], [contender(server.url)]), tmp_path, out, workers=1)
    more = bench.model_copy(update={"k": 6})
    assert len(evaluation.answers(evaluation.asked([more], [contender(server.url)]), tmp_path, out, workers=1)) == 18
    assert len(server.bodies) == 18


def test_a_variant_may_be_asked_less(tmp_path, out, fast_model):
    server = fast_model(one_of_each)
    few = contender(server.url, limit=2, samples=3)
    answers = evaluation.answers(evaluation.asked([benchmark(tmp_path, QUESTIONS)], [few]), tmp_path, out, workers=1)
    assert len(answers) == len(server.bodies) == 6
    assert summary(answers)["k"] == 3 and summary(answers)["questions"] == 2


SECRET = "a sentence of the question that nobody may show"


def test_a_private_benchmarks_text_is_in_no_file_that_could_be_published(tmp_path, out, fast_model):
    rows = [
        {
            "Question": f"{SECRET}: {n}?",
            "Correct Answer": f"secret choice {n}",
            **{f"Incorrect Answer {m}": f"secret other {n}.{m}" for m in (1, 2, 3)},
        }
        for n in range(6)
    ]
    published = load("benchmarks", "gpqa-diamond", Benchmark)
    changes = {"layout": published.layout, "private": True, "instruction": ""}
    bench = benchmark(tmp_path, rows, "gpqa", **changes)
    columns = {"columns": {"question": "Question"}, "domain": "stem", "verifier": "choice"}
    bench = bench.model_copy(update={"source": bench.source.model_copy(update=columns)})
    server = fast_model(
        lambda question, number: f"{SECRET}, hm.\n</think>\n\nIt says: {SECRET}.\n\nANSWER: {'ABCD'[number]}"
    )
    answers = evaluation.answers(evaluation.asked([bench], [contender(server.url)]), tmp_path, out, workers=1)
    assert summary(answers)["accuracy"] == 0.25  # each letter once
    assert summary(answers)["cons_ties"] == 6
    (message,) = server.bodies[0]["messages"]
    assert message["content"].startswith("Answer the following multiple choice question.")
    table = pq.read_table(out / "answers.parquet")
    assert set(table["answer"].to_pylist()) == set("ABCD")
    assert table["completion"].null_count == len(table)
    said = json.dumps([answers, table.to_pylist()])
    assert "secret" not in said and SECRET not in said
    assert not [file for file in out.rglob("*") if b"secret" in file.read_bytes()]


def test_a_recorded_run_is_scored_without_a_server(tmp_path, out):
    rows = [
        {
            "question": row["question"],
            "completion": thought(row["reference_answer"] if n else "1"),
            "finish_reason": "stop",
        }
        for row in QUESTIONS
        for n in range(5)
    ]
    rows.append({"question": "Something else?", "completion": thought("4"), "finish_reason": "stop"})
    file = tmp_path / "run.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    source = FileSource(kind="file", path=str(file), license="mit")
    recorded = RecordedTeacher(kind="recorded", name="twin", prompts="", source=source, model="m", opens_thinking=True)
    one = Contender("twin", recorded, "x", None, True)
    row = summary(
        evaluation.answers(evaluation.asked([benchmark(tmp_path, QUESTIONS)], [one]), tmp_path, out, workers=1)
    )
    assert (row["accuracy"], row["k"], row["mean_tokens"]) == (0.75, 4, None)  # the first four of five answers
    more = [*QUESTIONS, {"question": "Asked of nobody?", "reference_answer": "1"}]
    with pytest.raises(RequestError, match="no answer to 1 of the 4 questions"):
        evaluation.answers(evaluation.asked([benchmark(tmp_path, more)], [one]), tmp_path, out, workers=1)


def test_failing_requests_are_no_wrong_answers(tmp_path, out, fast_model):
    server = fast_model(lambda question, number: ("", "stop"))  # nothing that can be used
    with pytest.raises(R1DistillError, match="12 of 12 requests of model on sums failed"):
        evaluation.answers(
            evaluation.asked([benchmark(tmp_path, QUESTIONS)], [contender(server.url)]), tmp_path, out, workers=1
        )


# The command.


def command(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "r1distill.pipeline.cli", "evaluate", *arguments, "--json"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "R1DISTILL_HOME": str(folder / "runs")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(folder, *arguments), cwd=folder, env=environment, text=True, **pipes)


def test_a_killed_evaluation_costs_nothing_twice(tmp_path, fast_model):
    def slow(question: str, number: int) -> str:
        time.sleep(0.05)
        return thought(str(2 * int(question.split()[0])))

    server = fast_model(slow)
    rows = [{"question": f"{n} + {n}?", "reference_answer": str(2 * n)} for n in range(200)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = "{ kind: file, path: sums.jsonl, license: mit }"
    (tmp_path / "sums.yaml").write_text(f"title: Sums\nsource: {source}\nk: 4\n")
    arguments = ("--model", "fast", "--endpoint", server.url, "--benchmarks", "sums.yaml")
    process = start(tmp_path, *arguments)
    while len(server.bodies) < 200 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cut = len(server.bodies)
    assert cut < 800
    process = start(tmp_path, *arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    found = json.loads(output)
    row = found["benchmarks"]["sums"]["models"]["model"]
    assert (row["accuracy"], row["questions"], row["k"]) == (1.0, 200, 4)
    # At most those that were in flight when it was killed are asked again.
    assert 800 <= len(server.bodies) <= 800 + 64
    assert Path(found["path"], "answers.parquet").is_file()
    asked = len(server.bodies)
    process = start(tmp_path, *arguments)
    assert json.loads(process.communicate()[0]) == found and len(server.bodies) == asked


def test_a_model_that_is_none_is_told_what_one_is(tmp_path):
    process = start(tmp_path, "--model", "no-such-thing")
    output, errors = process.communicate()
    assert process.returncode == 2 and "owner/name" in errors, output + errors
    process = start(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 2 and "make distill" in errors, output + errors


@pytest.mark.parametrize("address", ["localhost:8000", "http://127.0.0.1:8000/v1?key=x"])
def test_an_address_that_is_none_is_told(tmp_path, address):
    run, bench = Run.load("smollm2-135m"), [benchmark(tmp_path, QUESTIONS)]
    with pytest.raises(RequestError, match=r"--endpoint .*: a base_url"):
        checkup.evaluate(run, checkup.Wanted("m", address), bench)


def test_the_chains_own_checkpoint_is_served_in_the_layout_of_the_scores_stage(tmp_path):
    """70 billion parameters don't fit one GPU; of another folder nothing is known."""
    run = replace(Run.load("llama-70b", hardware="8xh100"), home=tmp_path)
    bench, wanted = [benchmark(tmp_path, QUESTIONS)], checkup.Wanted(str(tmp_path))
    own, other = (checkup._contender(run, wanted, bench, checkpoint).spec.options for checkpoint in (True, False))
    expected = stageplan.student_options(run.student, run.hardware, evaluation.context_tokens(bench))
    assert expected["tensor-parallel-size"] > 1 and expected.items() <= own.items()
    assert "tensor-parallel-size" not in other


def test_what_llama_cpp_is_asked_has_a_slot_and_the_time_for_a_long_answer():
    """A token a second is what a CPU gives of a large student; what waits for a slot would be given up meanwhile."""
    client = evaluation._client(LlamaSpec(gguf=Path("x.gguf"), served_name="x", slots=3))
    assert client.in_flight == 3 and client.timeout_seconds > 32768


# Templates: the answer is made to begin in the thinking.


@pytest.mark.skipif(not CHAT_TEMPLATES.is_dir(), reason="needs ../shared/data/tokenizers")
def test_a_template_that_does_not_open_the_thinking_is_replaced_where_it_is_r1s(tmp_path):
    bench = [benchmark(tmp_path, QUESTIONS)]

    def served(template: str | None) -> tuple[str | None, bool]:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        config = {} if template is None else {"chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        spec, opens = evaluation.folder_spec(folder, "m", bench, {"max-num-seqs": 4}, tmp_path)
        assert spec.options["max-model-len"] == 32768 + 2048 and spec.options["max-num-seqs"] == 4
        file = spec.options.get("chat-template")
        return file and Path(file).read_text(), opens

    current = (CHAT_TEMPLATES / "deepseek-r1-family.current-2025-02.jinja").read_text()
    initial = (CHAT_TEMPLATES / "deepseek-r1-family.initial-2025-01.jinja").read_text()
    other = (CHAT_TEMPLATES / "llamacpp.Qwen-Qwen2.5-7B-Instruct.jinja").read_text()
    assert served(current) == (None, True)
    assert served(initial) == (TEMPLATES["r1"].chat_template(), True)
    assert served(other) == (None, False)
    assert served(None) == (evaluation.PLAIN_TEMPLATE, False)
    for template in TEMPLATES.values():
        assert served(template.chat_template()) == (None, True)


# Questions from the Hub, with the real client.


def from_hub(folder: Path, hub, *arguments: str) -> tuple[int, str, str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings, "R1DISTILL_HOME": str(folder / "runs"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(command(folder, *arguments), cwd=folder, env=environment, text=True, capture_output=True)
    return done.returncode, done.stdout, done.stderr


def test_both_parts_of_aime_2025_come_from_their_repository(tmp_path, hub, fast_model):
    def part(first: int) -> bytes:
        rows = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(first, first + 15)]
        return "\n".join(map(json.dumps, rows)).encode()

    repo = hub.add("datasets", "opencompass/AIME2025", {"aime2025-I.jsonl": part(0), "aime2025-II.jsonl": part(15)})
    (tmp_path / "aime.yaml").write_text(f"extends: aime2025\nk: 1\nsource: {{ revision: {repo.id()} }}\n")
    server = fast_model(lambda question, number: thought(str(2 * int(question.split()[0]))))
    arguments = ("--model", "fast", "--endpoint", server.url, "--benchmarks", "aime.yaml")
    code, output, errors = from_hub(tmp_path, hub, *arguments)
    assert code == 0, errors
    found = json.loads(output)["benchmarks"]["aime"]
    assert found["settings"]["revision"] == repo.id()
    row = found["models"]["model"]
    assert (row["questions"], row["accuracy"]) == (30, 1.0)
    assert len(server.bodies) == 30


def test_a_gated_benchmark_says_where_to_ask_for_it(tmp_path, hub):
    repo = hub.add("datasets", "livecodebench/code_generation_lite", {"test.jsonl": b"{}"}, gated="auto")
    text = f"extends: livecodebench\nsource: {{ revision: {repo.id()} }}\n"
    (tmp_path / "lcb.yaml").write_text(text)
    arguments = ("--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--benchmarks", "lcb.yaml")
    code, output, errors = from_hub(tmp_path, hub, *arguments)
    assert code == 2, errors
    assert "huggingface.co/datasets/livecodebench/code_generation_lite and set HF_TOKEN" in errors
    assert json.loads(output)["exit_code"] == 2


@pytest.mark.soak
def test_a_model_of_the_hub_is_fetched_served_and_scored_at_its_commit(tmp_path, hub):
    folder = models.materialise(load("students", "smollm2-135m", Student).base, tmp_path)
    repo = hub.add("models", "alice/small", {file.name: file.read_bytes() for file in folder.iterdir()})
    (tmp_path / "few.yaml").write_text("extends: arithmetic\nlimit: 2\nk: 1\nmax_tokens: 8\n")
    code, output, errors = from_hub(tmp_path, hub, "--model", "alice/small", "--benchmarks", "few.yaml")
    assert code == 0, errors
    found = json.loads(output)
    assert found["runtime"] == "vllm" and found["revision"] == f"alice/small@{repo.id()}"
    row = found["benchmarks"]["few"]["models"]["model"]
    assert (row["questions"], row["mean_tokens"]) == (2, 8)
