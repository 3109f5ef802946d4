"""Evaluating any model by itself: a folder, a repository, a GGUF file, a server, or answers that exist already.

The machinery is the scores stage's: benchmarks, ledger, verifiers and metrics are the same, and what was asked once is
found again. The result is an artifact of its own under ``$R1DISTILL_HOME/evaluations``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1distill.data import models, sources
from r1distill.data.errors import RequestError
from r1distill.data.models import FolderModel, HubModel
from r1distill.data.settings import Benchmark
from r1distill.data.sources import FileSource
from r1distill.pipeline import evaluation, scores
from r1distill.pipeline.artifact import Artifact, building, find, fingerprint, place, seal
from r1distill.pipeline.evaluation import Contender, context_tokens, folder_spec
from r1distill.pipeline.run import Run
from r1distill.pipeline.runner import manifest_of
from r1distill.pipeline.stageplan import student_options
from r1distill.teacher.serve import LlamaSpec
from r1distill.teacher.settings import EndpointTeacher, RecordedTeacher, Sampling, plain_url

VERSION = 1


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated: ``model`` as a user names it, and the server that has it, if one has."""

    model: str
    endpoint: str | None = None
    key_variable: str | None = None
    thinks: bool = True  # a server's answers begin in the thinking, its opening tag left out


def evaluate(run: Run, wanted: Wanted, benchmarks: Sequence[Benchmark], checkpoint: bool = False) -> Artifact:
    """Score a model on benchmarks; found again where it was scored before.

    ``checkpoint``: it is the chain's own, whose answers the scores stage asks for under the same name.
    Raises RequestError where there is no such model.
    """
    one = _contender(run, wanted, benchmarks, checkpoint)
    identity = {
        "evaluation": VERSION,
        "model": [one.name, one.runtime, one.revision],
        "benchmarks": [[bench.name, bench.identity(), sources.revision(bench.source)] for bench in benchmarks],
    }
    digest = fingerprint(identity)
    label = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in Path(wanted.model).name)
    path = place(run.home, "evaluations", label, digest)
    with building(path) as partial:
        if artifact := find(path, digest):
            return artifact
        began = time.monotonic()
        asked = evaluation.asked(benchmarks, [one])
        answers = evaluation.answers(asked, run.home, partial, run.prompts.verdicts.workers)
        twin = run.student.twin
        known = wanted.model if "/" in wanted.model else twin.repo if twin else None
        tables = {bench.name: scores.table(bench, [one], answers, known) for bench in benchmarks}
        found = {"model": wanted.model, "revision": one.revision, "runtime": one.runtime, "benchmarks": tables}
        (partial / "scores.json").write_text(json.dumps(found, indent=1))
        result = scores.account(answers, asked, found, [])
        result.check("evaluation")
        about = {"stage": "evaluations", "label": label, "fingerprint": digest, "inputs": {}, "identity": identity}
        return seal(partial, path, manifest_of(result, began, **about))


def _contender(run: Run, wanted: Wanted, benchmarks: Sequence[Benchmark], checkpoint: bool) -> Contender:
    model, options = wanted.model, run.student.serve_options
    if wanted.endpoint is not None:
        try:
            address = plain_url(wanted.endpoint)
        except ValueError as error:
            raise RequestError(f"--endpoint {wanted.endpoint}: {error}.") from None
        server = EndpointTeacher(
            kind="endpoint",
            name="model",
            prompts="",
            base_url=address,
            model=model,
            key_variable=wanted.key_variable,
            sampling=Sampling(max_tokens=1),  # each benchmark has its own
        )
        return Contender("model", server, f"{model}@{wanted.endpoint}", None, wanted.thinks)
    file = Path(model)
    if file.suffix == ".gguf" and file.is_file():
        llama = LlamaSpec(gguf=file, served_name="model", context_tokens=context_tokens(benchmarks), slots=4)
        revision = sources.revision(FileSource(kind="file", path=model, license="unknown"))
        return Contender("model", llama, revision, file.stat().st_size, wanted.thinks)
    if file.is_file():
        source = FileSource(kind="file", path=model, license="unknown")
        answers = RecordedTeacher(
            kind="recorded", name="model", prompts="", source=source, model=file.name, opens_thinking=wanted.thinks
        )
        return Contender("model", answers, sources.revision(source), None, wanted.thinks)
    if file.is_dir():
        name, folder, revision = "model", file.resolve(), models.revision(FolderModel(kind="folder", path=model))
        if checkpoint:
            name, revision = "student", folder.name
            options = student_options(run.student, run.hardware, context_tokens(benchmarks))
    elif model.count("/") == 1 and not model.startswith((".", "/")):
        repo, _, branch = model.partition("@")
        ref = HubModel(kind="hub", repo=repo, revision=branch or "main")
        exact = models.revision(ref)
        name, folder, revision = "model", models.materialise(ref, run.home), f"{repo}@{exact}"
    else:
        raise RequestError(
            f"--model {model} is no folder, no .gguf file, no file of answers (.jsonl, .parquet), and no repository of "
            "the Hub (owner/name). A server's model needs --endpoint with its address, say http://127.0.0.1:8000/v1."
        )
    spec, opens = folder_spec(folder, name, benchmarks, options, run.home)
    size: dict[str, Any] = {"size_bytes": sum(each.stat().st_size for each in folder.iterdir() if each.is_file())}
    return Contender(name, spec, revision, opens_thinking=opens, **size)
