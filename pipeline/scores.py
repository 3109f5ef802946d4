"""Scores: base, teacher, student, each variant and the published twin, judged alike and held against what is published.

Every figure comes with its interval (``metrics``); a difference is called one only where a paired bootstrap over
questions says so; and a student's scores count only where this harness reproduces the published figures on the
published checkpoint of the same size (``published``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1distill.data import models, sources
from r1distill.data.models import HubModel
from r1distill.data.result import Result
from r1distill.data.settings import Benchmark
from r1distill.pipeline import evaluation, published
from r1distill.pipeline.artifact import fingerprint
from r1distill.pipeline.evaluation import Asked, Contender, context_tokens, folder_spec
from r1distill.pipeline.gates import Verdict, held, sound, variant
from r1distill.pipeline.metrics import paired, question_means, summary
from r1distill.pipeline.rendering import Renderings
from r1distill.pipeline.run import Run
from r1distill.pipeline.stageplan import student_options
from r1distill.pipeline.variants import of_variants
from r1distill.students.quantise import PROBES
from r1distill.teacher.serve import LlamaSpec, VllmSpec, on_cpu, spec_of
from r1distill.teacher.settings import RecordedTeacher

Rows = list[dict[str, Any]]


def build(run: Run, checkpoint: Path, variants: Path, out: Path) -> Result:
    """Serve and judge base, teacher, twin, student and every variant; write scores.json and answers.parquet.

    Counts are of answers: read = asked for, kept = correct, the others by what was wrong with them.
    """
    made = json.loads((variants / "manifest.json").read_text(encoding="utf-8"))["metrics"]
    renderings = Renderings(run.home, json.loads((variants / PROBES).read_text(encoding="utf-8")))
    everyone = list(contenders(run, checkpoint, variants, made))
    workers = run.prompts.verdicts.workers
    asked = evaluation.asked(run.benchmarks, everyone)
    answers = evaluation.answers(asked, run.home, out, workers, renderings)
    readings = {one.name: renderings.of(one.revision) or [] for one in everyone if one.ours}
    twin = run.student.twin
    repo = twin.repo if twin else None
    benchmarks = {bench.name: table(bench, everyone, answers, repo) for bench in run.benchmarks}
    reproduction = reproduced(run.benchmarks, repo, benchmarks)
    verdicts = gates(run, answers, made, readings) + harness_gate(reproduction)
    scores = {
        "benchmarks": benchmarks,
        "reproduction": reproduction,
        "gates": verdicts,
        "variants": of_variants(run.student, made, verdicts, everyone, evaluation.speeds(asked, run.home)),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=1))
    return account(answers, asked, scores, [gate["model"] for gate in verdicts if not gate["passed"]])


def account(answers: Rows, asked: Sequence[Asked], scores: dict[str, Any], failed: list[str]) -> Result:
    """Where the answers went, and how many of those that are asked for here were there before."""
    wrong = Counter(row["reason"] for row in answers if not row["correct"])
    metrics = {"scores": scores, "found": sum(len(one) - one.asked_now for one in asked if one.recorded is None)}
    return Result(len(answers), len(answers) - wrong.total(), dict(wrong), metrics, failed, unit="answers")


def contenders(run: Run, checkpoint: Path, variants: Path, made: Mapping[str, Any]) -> Iterator[Contender]:
    """Base, teacher, twin, student, then the variants that can be served here, in the order of the report.

    A variant's answers are known by its checkpoint and by how it was made.
    """
    student = run.student
    base = models.materialise(student.base, run.home)
    spec, opens = _vllm(run, base, "base")
    yield Contender("base", spec, f"{models.title(student.base)}@{run.base_revision}", _size(base), opens)
    if run.scores_teacher:
        assert not isinstance(run.teacher, RecordedTeacher)
        teacher = spec_of(run.teacher, run.home, ray_address=run.hardware.ray_address)
        size = _size(Path(teacher.model)) if isinstance(teacher, VllmSpec) and Path(teacher.model).is_dir() else None
        opens = getattr(run.teacher, "opens_thinking", False)
        yield Contender("teacher", teacher, run.teacher_revision, size, opens)
    if student.twin and any(published.figure(student.twin.repo, bench.name) for bench in run.benchmarks):
        yield twin(run)
    mark = checkpoint.name
    spec, opens = _vllm(run, checkpoint, student.name)
    yield Contender("student", spec, mark, _size(checkpoint), opens)
    for name, settings in student.variants.items():
        if made[name]["problems"] or (settings.kind == "fp8" and on_cpu()):
            continue
        folder, few, samples = variants / name, student.variant_questions, student.variant_samples
        how = fingerprint({key: value for key, value in settings.identity().items() if key != "gate"})
        exact = f"{mark}/{name}-{how[:8]}"
        if settings.kind == "gguf":
            file = next(folder.glob("*.gguf"))
            llama = LlamaSpec(gguf=file, served_name=name, context_tokens=context_tokens(run.benchmarks), slots=4)
            yield Contender(name, llama, exact, file.stat().st_size, True, few, samples)
        else:
            spec, opens = _vllm(run, folder, name)
            yield Contender(name, spec, exact, _size(folder), opens, few, samples)


def twin(run: Run) -> Contender:
    """The published checkpoint of the student's size, or a recorded run of it."""
    settings = run.student.twin
    assert settings is not None
    if settings.recorded is not None:
        run_of_it = RecordedTeacher(
            kind="recorded", name="twin", prompts="", source=settings.recorded, model=settings.repo, opens_thinking=True
        )
        return Contender("twin", run_of_it, sources.revision(settings.recorded), None, True)
    ref = HubModel(kind="hub", repo=settings.repo, revision=settings.revision)
    folder = models.materialise(ref, run.home)
    spec, opens = _vllm(run, folder, "twin")
    return Contender("twin", spec, f"{settings.repo}@{models.revision(ref)}", _size(folder), opens)


def table(bench: Benchmark, everyone: Sequence[Contender], answers: Rows, repo: str | None) -> dict[str, Any]:
    """One benchmark's part of scores.json: settings, a summary of each model, comparisons, and what is published."""
    found = [row for row in answers if row["benchmark"] == bench.name]
    by_model = {one.name: [row for row in found if row["model"] == one.name] for one in everyone}
    figure = published.figure(repo, bench.name)
    return {
        "title": bench.title,
        "settings": {
            "repo": getattr(bench.source, "repo", None),
            "revision": sources.revision(bench.source),
            **{name: getattr(bench, name) for name in ("k", "temperature", "top_p", "max_tokens", "limit")},
        },
        "models": {
            one.name: {**summary(by_model[one.name]), "size_bytes": one.size_bytes, "runtime": one.runtime}
            for one in everyone
        },
        "comparisons": list(comparisons(by_model)),
        "published": figure and figure.as_dict(),
    }


def comparisons(by_model: dict[str, Rows]) -> Iterator[dict[str, Any]]:
    """The student against everybody, and each variant against the student, over the questions that both were asked."""
    means = {name: question_means(rows) for name, rows in by_model.items()}
    if "student" not in means:
        return
    for name in means:
        if name == "student":
            continue
        of, against = ("student", name) if name in ("base", "teacher", "twin") else (name, "student")
        yield {"model": of, "against": against, **paired(means[of], means[against])}


def reproduced(wanted: Sequence[Benchmark], repo: str | None, tables: dict[str, Any]) -> dict[str, Any]:
    """Whether the harness gives the published figures on the twin: {applies, passed, reason, checks}."""
    if repo is None:
        return {"applies": False, "passed": None, "checks": [], "reason": "no published twin is named"}
    twins = ((bench, tables[bench.name]["models"].get("twin")) for bench in wanted)
    checks = [check for bench, its in twins if its and (check := published.reproduced(bench, repo, its))]
    if not checks:
        reason = f"{repo} has no published figure on {', '.join(bench.name for bench in wanted)}"
        return {"applies": False, "passed": None, "checks": [], "reason": reason}
    return {"applies": True, "passed": all(check["passed"] for check in checks), "checks": checks, "reason": None}


def harness_gate(reproduction: dict[str, Any]) -> list[Verdict]:
    """The checkpoint's scores count only where the harness reproduces what is published."""
    return [
        {"name": "reproduction", "model": "checkpoint", "passed": check["passed"], "message": check["message"]}
        for check in reproduction["checks"]
    ]


def gates(
    run: Run, answers: list[dict[str, Any]], made: Mapping[str, Any], readings: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    """The checkpoint against base and teacher, each variant against the checkpoint on the same questions.

    ``made`` are the variants stage's facts, ``readings`` what the runtimes read otherwise, by model.
    """
    found: list[dict[str, Any]] = [sound("checkpoint", readings.get("student", []))]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        by_model.setdefault(row["model"], []).append(row)
    student = by_model["student"]
    accuracy = {name: summary(rows)["accuracy"] for name, rows in by_model.items()}
    wanted = run.student.gate
    if wanted.min_gain is not None:
        gain = accuracy["student"] - accuracy["base"]
        found.append(held("checkpoint", "gain over base", gain, wanted.min_gain))
    if wanted.min_share_of_teacher is not None and accuracy.get("teacher"):
        share = accuracy["student"] / accuracy["teacher"]
        found.append(held("checkpoint", "share of teacher", share, wanted.min_share_of_teacher))
    for name, settings in run.student.variants.items():
        rows = by_model.get(name, [])
        keys = {(row["benchmark"], row["prompt_id"]) for row in rows}
        same = [row for row in student if (row["benchmark"], row["prompt_id"]) in keys]
        its, checkpoints = (summary(some) if some else None for some in (rows, same))
        found += variant(name, settings.gate, made[name], readings.get(name, []), its, checkpoints)
    return found


def _vllm(run: Run, folder: Path, name: str) -> tuple[VllmSpec, bool]:
    """Serve a local folder with this machine's GPUs, or on the CPU."""
    options = student_options(run.student, run.hardware, context_tokens(run.benchmarks))
    return folder_spec(folder, name, run.benchmarks, options, run.home)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and file.name != "manifest.json")
