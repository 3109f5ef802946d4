"""Two hops: what is shared is made once, what failed teaches nobody, and the plan adds both up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1distill.data import models
from r1distill.data.config import load
from r1distill.data.errors import RequestError
from r1distill.pipeline import guards, plan, runner
from r1distill.pipeline.hardware import named
from r1distill.pipeline.run import Run
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import load_teacher

DATA = ["prompts", "traces", "verdicts", "dataset"]


@pytest.fixture
def first(tmp_path: Path) -> str:
    file = tmp_path / "first.yaml"
    file.write_text("extends: smollm2-135m\nsft: { epochs: 1 }\n")
    return str(file)


@pytest.fixture
def hops(tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch):
    """A run of two hops under a home of its own; nothing is built."""
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path / "runs"))

    def run(*changes: str, via: str | None = first, **names: str) -> Run:
        return Run.load("smollm2-135m", overrides=changes, via=via, **names)

    return run


def names(steps: list[runner.Step]) -> list[tuple[str, str]]:
    return [(step.stage.name, step.label) for step in steps]


# The chain.


def test_the_first_hop_stands_before_the_logits_and_what_is_shared_there_once(hops) -> None:
    steps = runner.chain(hops())
    shared, both = steps[:4], "smollm2-135m-via-first"
    assert [step.stage.name for step in shared] == DATA
    assert names(steps[4:]) == [
        ("packs", "smollm2-135m"),
        *[(stage, "first") for stage in ("packs", "checkpoint", "variants", "scores")],
        *[(stage, both) for stage in ("logits", "checkpoint", "variants", "scores", "publication")],
    ]
    assert len({step.path for step in steps}) == len(steps)
    assert names(runner.chain(hops(), until="packs")) == names(steps[:5])
    assert names(runner.chain(hops(), until="checkpoint")) == names(steps[:11])


def test_each_hop_shares_its_artifacts_with_a_run_of_its_own(hops, first: str) -> None:
    steps = {(step.stage.name, step.label): step.fingerprint for step in runner.chain(hops())}
    alone = {(step.stage.name, step.label): step.fingerprint for step in runner.chain(Run.load(first), "checkpoint")}
    plain = {(step.stage.name, step.label): step.fingerprint for step in runner.chain(hops(via=None), "packs")}
    assert alone.items() <= steps.items() and plain.items() <= steps.items()


def test_the_teacher_is_the_first_checkpoint_by_its_fingerprint(hops, tmp_path: Path, monkeypatch) -> None:
    def logits(run: Run) -> runner.Step:
        return next(step for step in runner.chain(run) if step.stage.name == "logits")

    run = hops("student.distill.k=16", "student.distill.ce_weight=0.5")
    step, checkpoint = logits(run), runner.chain(run.via, "checkpoint")[-1]
    distill = step.run.student.distill
    assert (distill.k, distill.ce_weight, distill.kind) == (16, 0.5, "topk_kl")
    assert distill.teacher.fingerprint == checkpoint.fingerprint and models.title(distill.teacher) == "first"
    assert step.identity["decides"]["teacher"] == [
        {"kind": "checkpoint", "fingerprint": checkpoint.fingerprint},
        checkpoint.fingerprint,
    ]
    with pytest.raises(RequestError, match=r"there is no checkpoint .*first-"):
        models.materialise(distill.teacher, run.home)
    checkpoint.path.mkdir(parents=True)
    (checkpoint.path / "manifest.json").write_text("{}")
    assert models.materialise(distill.teacher, run.home) == checkpoint.path
    assert step.run.lineage()["probabilities_of"] == f"first@{checkpoint.fingerprint}"
    assert str(tmp_path) not in json.dumps(step.run.lineage()) + json.dumps(step.identity)
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path / "elsewhere"))
    assert logits(hops("student.distill.k=16")).fingerprint == step.fingerprint  # no path, no weight of the loss
    assert logits(hops("student.distill.k=16", "via.sft.epochs=2")).fingerprint != step.fingerprint


def test_a_students_file_can_say_it_itself(hops, tmp_path: Path, first: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"extends: smollm2-135m\ndistill: {{ kind: topk_kl, k: 8, teacher: {{ kind: checkpoint, student: {first} }} }}\n"
    )
    run = Run.load(str(file))
    assert run.via and run.via.student.name == "first" and run.label == "mine-via-first"
    digest = runner.chain(run.via, "checkpoint")[-1].fingerprint
    known = f"student.distill.teacher={{ kind: checkpoint, student: first, fingerprint: {digest} }}"
    named_one = Run.load(str(file), overrides=[known])
    assert named_one.via is None
    logits = [{step.stage.name: step for step in runner.chain(one)}["logits"] for one in (run, named_one)]
    assert logits[0].fingerprint == logits[1].fingerprint
    with pytest.raises(RequestError, match="one hop is the limit"):
        hops(via=str(file))


def test_the_first_hop_can_teach_on_policy(hops) -> None:
    """It is asked where the student learns from its own answers; until then the student is that of a run without VIA."""
    run = hops("student.distill.kind=on_policy", "student.distill.steps=2")
    steps, both = runner.chain(run), "smollm2-135m-via-first"
    assert names(steps[4:]) == [
        *[(stage, "smollm2-135m") for stage in ("packs", "checkpoint")],
        *[(stage, "first") for stage in ("packs", "checkpoint", "variants", "scores")],
        *[(stage, both) for stage in ("beyond", "variants", "scores", "publication")],
    ]
    assert steps[10].run.student.beyond.teacher.fingerprint == steps[7].fingerprint
    assert steps[5].path == runner.chain(hops(via=None), "checkpoint")[-1].path
    assert [stage.stage for stage in plan._of_run(run).stages][-4:] == ["checkpoint", "beyond", "variants", "scores"]


@pytest.mark.parametrize(
    ("student", "via", "words"),
    [
        ("qwen-7b", "llama-70b", r"'llama-70b' can't teach 'qwen-7b'.*128,256 tokens of a llama.*152,064 of a qwen2"),
        ("smollm2-135m", "llama-8b", "its probabilities are of other tokens"),
        ("qwen-7b", "qwen32b", "Did you mean 'qwen-32b'"),
    ],
)
def test_who_cannot_teach_is_refused(student: str, via: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Run.load(student, via=via)


def test_another_template_is_refused_and_so_is_a_setting_of_nobody(hops, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="trained on the template 'r1'"):
        hops("via.template=r1")
    with pytest.raises(RequestError, match="--set via.sft.epochs: there is no VIA"):
        hops("via.sft.epochs=2", via=None)


def test_sequences_that_are_cut_and_probabilities_do_not_go_together() -> None:
    with pytest.raises(RequestError, match="sequence_parallel over 1 don't go together"):
        Run.load("qwen-7b", overrides=["student.sft.launch.sequence_parallel=2"], via="qwen-32b")
    assert not any("Ulysses" in line for line in planned("8xh200").stage("checkpoint").rejected)


def test_padding_is_no_other_family() -> None:
    assert Run.load("qwen-1.5b", via="qwen-32b").via


def test_what_both_share_is_built_once(tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real stages, from traces that exist; then either student alone finds them there."""
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path / "runs"))
    file = tmp_path / "sums.jsonl"
    with file.open("w") as lines:
        for n in range(12):
            answer = {"answer": str(2 * n), "response": f"{n}+{n}</think>\\boxed{{{2 * n}}}"}
            lines.write(json.dumps({"id": str(n), "prompt": f"What is {n}+{n}?", **answer}) + "\n")
    changes = ["prompts.sources.0.columns={ question: prompt, reference_answer: answer, source_id: id }"]
    for name in ("teacher.source", "prompts.sources.0"):
        changes += [f"{name}.path={file}", f"{name}.where={{}}"]
    changes += ["prompts.decontaminate={ against: [], ngram: null }"]
    request = {"teacher": "recorded", "overrides": changes}
    steps = runner.chain(Run.load("smollm2-135m", via=first, **request))
    done = list(runner.execute(step for step in steps if step.stage.name in DATA))
    assert [item.step.stage.name for item in done] == DATA and all(item.built for item in done)
    assert done[-1].artifact.manifest["kept"] > 6
    for student in ("smollm2-135m", first):
        again = list(runner.execute(runner.chain(Run.load(student, **request), "dataset")))
        assert [item.artifact.path for item in again] == [item.artifact.path for item in done]
        assert not any(item.built for item in again)
    assert [len(list((tmp_path / "runs" / stage).glob("*/manifest.json"))) for stage in DATA] == [1, 1, 1, 1]


# Its guards.


def test_what_failed_its_gate_teaches_nobody(hops) -> None:
    steps, said = runner.chain(hops()), []
    before = [step for step in steps if step.stage.name != "packs"]  # whose room is looked at when they are there
    left = [step.label for step in guards.between(before, ["checkpoint"], said.append) if step.stage.name not in DATA]
    assert left == ["first"] * 3
    assert "checkpoint of first failed its gate: it teaches nobody" in said[0] and "via.gate.min_gain=null" in said[0]
    assert len(list(guards.between(before, ["int8"], said.append))) == len(before)


def test_logits_without_room_end_a_run_before_anything_is_trained(hops) -> None:
    run = hops()
    steps = runner.chain(run)
    packs = steps[4]
    packs.path.mkdir(parents=True)

    def ends(tokens: int) -> list[str]:
        (packs.path / "manifest.json").write_text(
            json.dumps({"fingerprint": packs.fingerprint, "files": {}, "metrics": {"train": {"target_tokens": tokens}}})
        )
        return [step.stage.name for step in guards.between(steps, [], print)]

    assert "publication" in ends(1000)
    with pytest.raises(RequestError, match="No k fits"):
        ends(10**15)
    free = os.statvfs(run.home)
    tokens = free.f_bavail * free.f_frsize // 200  # room for 200 bytes of each
    with pytest.raises(RequestError, match=r"The largest k that fits is (39|3[678]): --set student.distill.k="):
        ends(tokens)


# The plan.


def planned(hardware: str = "16xh200", *changes: str, **machine) -> plan.Plan:
    run = Run.load("qwen-7b", hardware=hardware, overrides=changes, via="qwen-32b")
    answer = plan._of_run(run)
    return answer


def test_the_plan_adds_both_hops_up() -> None:
    answer = planned("16xh200", "hardware.price_usd_per_gpu_hour=2", "hardware.disk_gib=20000")
    assert [(stage.stage, stage.subject) for stage in answer.stages] == [
        ("traces", "r1-8xh200"),
        *[(stage, "qwen-32b") for stage in ("checkpoint", "scores")],
        *[(stage, "qwen-7b") for stage in ("logits", "checkpoint", "variants", "scores")],
    ]
    logits, own = answer.stage("logits"), answer.stage("checkpoint")
    assert own.subject == "qwen-7b" and answer.fits
    tokens = 804_745 * 5_355
    assert logits.tokens == tokens and logits.memory["weights"] == pytest.approx(2 * 32_763_876_352 / 2**30)
    assert answer.disk["logits"] == pytest.approx(tokens * (64 * 5 + 2) / 2**30)
    told = answer.as_dict()
    for name in ("hours", "gpu_hours"):
        assert told[name] == pytest.approx(sum(stage[name] for stage in told["stages"] if stage[name] is not None))
    assert float(told["usd"]) == pytest.approx(2 * told["gpu_hours"], rel=1e-3)
    text = answer.text()
    assert "qwen-7b via qwen-32b fits on 16xh200." in text and "in all " in text and "qwen-32b: full training" in text
    alone = [
        plan.plan(load("students", name, Student), load_teacher("r1-8xh200"), named("16xh200"))
        for name in ("qwen-32b", "qwen-7b")
    ]
    assert answer.disk["base and student"] == pytest.approx(sum(one.disk["base and student"] for one in alone))
    assert answer.disk["training checkpoints"] == alone[0].disk["training checkpoints"]
    shared = alone[0].disk["traces and packs"]
    assert shared < answer.disk["traces and packs"] < 2 * shared


def test_the_largest_k_is_the_largest_that_fits() -> None:
    """Of a disk on which the default one does not."""
    answer = planned("16xh200", "hardware.disk_gib=2500")
    most = answer.largest_k
    assert not answer.disk_fits and most and 0 < most < 64
    assert f"The largest k that fits is {most}: --set student.distill.k={most}" in answer.problems[-1]
    assert planned("16xh200", "hardware.disk_gib=2500", f"student.distill.k={most}").disk_fits
    assert not planned("16xh200", "hardware.disk_gib=2500", f"student.distill.k={most + 1}").disk_fits
    assert planned("16xh200", "hardware.disk_gib=1000").largest_k == 0


def test_a_teacher_is_laid_over_as_few_gpus_as_hold_it() -> None:
    assert planned("8xh200").stage("logits").layout == "8 copies, each on 1 GPU"
    large = Run.load("llama-8b", hardware="8xh200", via="llama-70b")
    assert plan._of_run(large).stage("logits").layout == "4 copies, each on 2 GPUs" and plan.scoring_gpus(large) == 2
    over_ray = planned("16xh200", "hardware.ray_address=auto").stage("logits")
    assert over_ray.layout == "16 copies, each on 1 GPU"
    assert over_ray.hours == pytest.approx(planned("16xh200").stage("logits").hours / 2)


def test_a_teacher_that_no_gpus_hold_is_refused_and_one_of_unknown_size_is_not() -> None:
    small = planned("1xrtx4090").stage("logits")
    assert not small.fits and "GiB are needed on a GPU" in small.reason
    unknown = "student.distill={ kind: topk_kl, teacher: { kind: hub, repo: some/model } }"
    assert (
        "not known here"
        in plan._of_run(Run.load("qwen-7b", hardware="8xh200", overrides=[unknown])).stage("logits").note
    )
    twin = unknown.replace("some/model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")
    known = plan._of_run(Run.load("qwen-7b", hardware="8xh200", overrides=[twin]))
    assert known.stage("logits").memory == planned("8xh200").stage("logits").memory
    assert known.disk["teacher of the logits"] > 60


def test_a_run_is_refused_for_what_its_first_hop_lacks() -> None:
    """The first student's training is checked where it will run, and not where the run ends before it."""
    run = Run.load("smollm2-135m", hardware="laptop", via="smollm2-135m")
    guards.check(run, runner.stage_names())
    short = Run.load("qwen-1.5b", "recorded", hardware="laptop", overrides=["hardware.disk_gib=9000"], via="qwen-32b")
    plan.check_run(short, DATA)
    with pytest.raises(
        RequestError, match=r"'qwen-1.5b' via 'qwen-32b' taught by 'recorded' does not fit.*\n.*full training"
    ):
        plan.check_run(short, runner.stage_names("logits"))


# The command.


def command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom r1distill.pipeline import cli\nsys.argv = ['r1distill', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nfinally:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
        env={**os.environ, "R1DISTILL_HOME": str(home / "runs"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_dry_run_plan_and_refusals_answer_at_once(tmp_path: Path, first: str) -> None:
    """Before any checkpoint is there, without a network, without torch."""
    done = command(tmp_path, "distill", "--dry-run", "--json", "--student", "smollm2-135m", "--via", first)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["label"] for row in rows if row["stage"] == "checkpoint"] == ["first", "smollm2-135m-via-first"]
    assert {row["state"] for row in rows} == {"missing"}
    planning = ["plan", "--json", "--student", "qwen-7b", "--via", "qwen-32b", "--hardware", "16xh200"]
    answer = command(tmp_path, *planning)
    assert answer.returncode == (0 if json.loads(answer.stdout)["fits"] else 2), answer.stderr
    full = command(tmp_path, *planning, "--set", "hardware.disk_gib=2500")
    told = json.loads(full.stdout)
    assert full.returncode == 2 and told["largest_k"] > 0 and told["via"] == "qwen-32b" and not told["disk_fits"]
    refused = command(tmp_path, "distill", "--student", "qwen-7b", "--via", "llama-70b")
    assert refused.returncode == 2 and "can't teach 'qwen-7b'" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "runs").exists()


# Both hops for real.

SUMS = """
title: A few sums
source: { kind: reasoning_gym, seed: 99, tasks: { chain_sum: { count: 4, config: { min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1 } } } }
instruction: "Think step by step and box the final answer."
k: 1
top_p: 1.0
max_tokens: 32
"""
SMALL = """
extends: smollm2-135m
sft: { epochs: 1, batch_traces: 6, save_steps: 1 }
variants: {}
gate: { min_gain: GAIN, min_share_of_teacher: null }
benchmarks: [SUMS]
score_teacher: false
"""


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hops_killed_in_the_first_stopped_by_its_gate_and_let_through(tmp_path: Path) -> None:
    home, file, sums = tmp_path / "home", tmp_path / "sums.jsonl", tmp_path / "sums.yaml"
    sums.write_text(SUMS)
    for name, gain in (("first", "1.5"), ("second", "null")):  # nothing gains as much: the first one fails
        (tmp_path / f"{name}.yaml").write_text(SMALL.replace("GAIN", gain).replace("SUMS", str(sums)))
    with file.open("w") as lines:
        for n in range(40):
            answer = {"answer": str(n + 3), "response": f"{n}+3={n + 3}</think>\\boxed{{{n + 3}}}"}
            lines.write(json.dumps({"id": str(n), "prompt": f"What is {n}+3?", **answer}) + "\n")
    changes = ["prompts.sources.0.columns={ question: prompt, reference_answer: answer, source_id: id }"]
    for name in ("teacher.source", "prompts.sources.0"):
        changes += [f"{name}.path={file}", f"{name}.where={{}}"]
    changes += [f"prompts.decontaminate={{ against: [{sums}], ngram: null }}", "student.distill.k=8"]

    def start(*more: str) -> subprocess.Popen[str]:
        arguments = ["--student", tmp_path / "second.yaml", "--via", tmp_path / "first.yaml", "--teacher", "recorded"]
        arguments += [
            "--until",
            "checkpoint",
            "--json",
            *(part for one in (*changes, *more) for part in ("--set", one)),
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "r1distill.pipeline.cli", "distill", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "R1DISTILL_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = start()
    while not list(home.glob("checkpoint/.first-*.partial/.work/checkpoints/checkpoint-*/GOOD")):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    stopped = start()
    output, errors = stopped.communicate()
    assert stopped.returncode == 3 and "it teaches nobody" in errors, errors
    told = json.loads(output.strip().splitlines()[-1])
    first = told["via"]["stages"]
    assert list(first) == ["packs", "checkpoint", "variants", "scores"] and list(told["stages"]) == [*DATA, "packs"]
    manifest = json.loads((Path(first["checkpoint"]["path"]) / "manifest.json").read_text())
    assert manifest["metrics"]["resumed_from_step"] > 0
    assert not (home / "logits").exists()

    passed = start("via.gate.min_gain=null")
    output, errors = passed.communicate()
    assert passed.returncode == 0, errors
    told = json.loads(output.strip().splitlines()[-1])
    assert [name for name, one in told["via"]["stages"].items() if one["built"]] == ["scores"]
    assert [name for name, one in told["stages"].items() if one["built"]] == ["logits", "checkpoint"]
    assert told["via"]["stages"]["checkpoint"]["path"] == first["checkpoint"]["path"]
    logits = json.loads((Path(told["stages"]["logits"]["path"]) / "manifest.json").read_text())
    assert logits["metrics"]["teacher"] == "first" and logits["metrics"]["tokens_per_second"] > 0
    assert logits["identity"]["decides"]["teacher"][1] == manifest["fingerprint"]
    assert {stage: len(list((home / stage).glob("*/manifest.json"))) for stage in (*DATA, "checkpoint", "scores")} == {
        **dict.fromkeys(DATA, 1),
        "checkpoint": 2,
        "scores": 2,
    }
