"""A rehearsal: a student's own configuration through every stage on this machine, before GPUs are rented.

The architecture is shrunk and its weights are random; vocabulary, template, rotary frequencies, tying, recipe and
variants are the student's. Configuration files, a base and a few traces are written into a folder, and the real command
runs on them: what would break for reasons other than size breaks here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from r1distill.data import models, schema
from r1distill.data.config import load, names, parse_overrides
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.pipeline import plan, runner, standin
from r1distill.pipeline.artifact import alone
from r1distill.pipeline.run import SECTIONS, Run
from r1distill.students import attention, base, isolation, preflight
from r1distill.students.catalogue import Student
from r1distill.students.layout import Layout
from r1distill.students.schedule import Packs
from r1distill.students.subject import has_vocabulary
from r1distill.students.trainer import collator
from r1distill.teacher.serve import on_cpu

CONTEXT_TOKENS = 512
TRACES = 24
QUESTIONS = 2  # asked of every model that is served
ANSWER_TOKENS = 12
LORA = {"kind": "lora", "rank": 8, "alpha": 16}
KILL_SECONDS = 300  # for the first checkpoint to be there


@dataclass(frozen=True)
class Rehearsed:
    """One step of a rehearsal: what it did, or what broke."""

    name: str
    seconds: float
    passed: bool
    note: str


def r1_students() -> list[str]:
    """The students that `make rehearse-all` takes."""
    return [name for name in names("students") if load("students", name, Student).template == "r1"]


class Rehearsal:
    """A student's rehearsal in a folder ``under``, which is emptied first.

    Raises RequestError where the base's tokenizer is not to be had.
    """

    def __init__(
        self,
        student: str,
        under: Path,
        lora: bool = False,
        tokenizers: Sequence[Path] = (),
        changes: Sequence[str] = (),
        until: str | None = None,
        hardware: str = "16xh100",
    ) -> None:
        overrides = parse_overrides(changes, SECTIONS)["student"]
        if lora:
            overrides |= {"sft.method": LORA}
        self.student = load("students", student, Student, overrides)
        optional = {"logits": self.student.distill, "beyond": self.student.beyond}
        self.stages = [name for name in runner.stage_names(until) if optional.get(name, True) is not None]
        self.name = self.student.name + ("-lora" if lora else "")
        self.folder = under / self.name
        self.home = self.folder / "runs"
        self.base = self.folder / models.title(self.student.base).split("/")[-1]  # as the cards call it
        self.source = _source(self.student, tokenizers, under)
        self.real = plan.training_layout(replace(Run.load(student, hardware=hardware), student=self.student))
        self._paths: dict[str, Path] = {}

    @property
    def shrunk(self) -> str:
        """What is not as in the real run, in words."""
        real, shape, packs, settings = self.student.architecture, standin.SHAPE, self.student.packs, self._settings()
        layout = Layout(processes_per_node=2, **self._spread())
        batches = f"batches of {self.student.sft.batch_traces} traces {settings['sft']['batch_traces']}"
        return (
            f"{real.layers} layers of {real.hidden} are {shape['layers']} of {shape['hidden']} with random weights; "
            f"packs of {packs.context_tokens:,} tokens {CONTEXT_TOKENS}; {batches}; the training's layout "
            f"({self.real}) {layout}; the traces {TRACES} written ones; the benchmarks {QUESTIONS} questions, "
            f"answered in {ANSWER_TOKENS} tokens; AutoRound's steps 2"
            + ("; FP8 is made and not served, which vLLM does on GPUs alone" if on_cpu() else "")
        )

    def steps(self) -> Iterator[Rehearsed]:
        """Take every step in turn; the first one that breaks is the last.

        Raises RequestError where another rehearsal is at work in the folder.
        """
        with alone(self.folder):
            yield from self._steps()

    def _steps(self) -> Iterator[Rehearsed]:
        for name, action in self._plan():
            began = time.monotonic()
            try:
                note, passed = action(), True
            except R1DistillError as error:
                note, passed = str(error), False
            except Exception as error:  # whatever breaks is what a rehearsal is for
                note, passed = f"{type(error).__name__}: {error}", False
            yield Rehearsed(name, time.monotonic() - began, passed, note)
            if not passed:
                return

    def _plan(self) -> Iterator[tuple[str, Callable[[], str]]]:
        yield "preflight", self._preflight
        yield "set up", self._set_up
        for name in self.stages:
            if name == "checkpoint":
                yield "packs apart", self._apart
                yield "training, killed", self._train_and_kill
                yield "training, resumed", partial(self._stage, name)
                yield "files", self._look_at_checkpoint
            else:
                yield name, partial(self._stage, name)

    def clear(self) -> None:
        """Take what was made off the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # The steps. Each returns what it did.

    def _preflight(self) -> str:
        findings = preflight.check(self.student, self.source)
        if failed := [str(finding) for finding in findings if not finding.passed]:
            raise RequestError("\n".join(failed))
        return f"{len(findings)} checks passed"

    def _set_up(self) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.base.mkdir(parents=True)
        settings = self._settings()
        shape = Student.model_validate({**settings, "name": self.student.name}).architecture
        parameters = standin.write_base(self.student, shape, self.source, self.base)
        standin.write_traces(self.folder, TRACES, QUESTIONS)
        settings["architecture"]["parameters"] = parameters
        for name, values in (("teacher", self._teacher()), ("prompts", self._prompts()), ("few", self._benchmark())):
            self._file(name).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        self._file("student").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        self._run()  # its settings hold together
        return f"a base of {parameters / 1e6:.0f} M parameters, {TRACES} traces"

    def _stage(self, name: str) -> str:
        """Build one stage; those before it are sealed."""
        run = self._run()
        *_, last = runner.execute(runner.chain(run, name))
        manifest = last.artifact.manifest
        self._paths[name] = last.artifact.path
        if not manifest["kept"] and name != "scores":  # random weights answer nothing right
            raise R1DistillError(f"{name} kept none of {manifest['read']} {manifest['unit']}: {manifest['rejected']}")
        if name == "checkpoint":
            return self._resumed(manifest["metrics"])
        if name == "variants":
            return self._sound(manifest["metrics"])
        return self._served(manifest["metrics"]["scores"]) if name == "scores" else _counts(manifest)

    def _sound(self, made: dict[str, Any]) -> str:
        if wrong := [f"{name}: {'; '.join(facts['problems'])}" for name, facts in made.items() if facts["problems"]]:
            raise R1DistillError("\n".join(wrong))
        return ", ".join(f"{name} {facts['seconds']:.0f} s" for name, facts in made.items())

    def _served(self, scores: dict[str, Any]) -> str:
        """Gates ask for nothing here but that the files are sound and their runtime reads the same tokens."""
        if wrong := [f"{gate['model']}: {gate['message']}" for gate in scores["gates"] if not gate["passed"]]:
            raise R1DistillError("\n".join(wrong))
        (table,) = scores["benchmarks"].values()
        return "answered: " + ", ".join(f"{name} ({row['runtime']})" for name, row in table["models"].items())

    def _apart(self) -> str:
        """Packed traces must not see each other, with the attention that the training here takes."""
        import torch
        from transformers import AutoTokenizer

        run, packs = self._run(), self._paths["packs"]
        planned = plan.training_layout(run)
        spread = Layout(attention=planned.attention_used, cpu=planned.cpu)  # on one device
        attention.register()
        tokenizer = AutoTokenizer.from_pretrained(packs / "tokenizer")
        dtype, tolerance = (torch.float32, 1e-4) if spread.cpu else (torch.bfloat16, 2e-2)
        kind = spread.attention_used
        model = base.load(run.student.architecture, self.base, tokenizer, dtype, attn_implementation=kind)
        rows = Packs(schema.read(packs / "train", schema.PACK), tokenizer.pad_token_id)
        together = collator(spread, tokenizer.pad_token_id)
        isolation.check(model if spread.cpu else model.cuda(), [rows[0]], together, tolerance)
        return f"losses and gradients of {len(rows[0]['seq_lengths'])} traces are those of each alone ({kind})"

    def _train_and_kill(self) -> str:
        """Start the real command, and kill it alone as soon as a checkpoint is whole."""
        names = ("student", "teacher", "prompts")
        arguments = [word for name in names for word in (f"--{name}", str(self._file(name)))]
        command = [sys.executable, "-m", "r1distill.pipeline.cli", "distill", *arguments, "--until", "checkpoint"]
        log = self.folder / "killed.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "R1DISTILL_HOME": str(self.home)},
                start_new_session=True,
            )
        deadline = time.monotonic() + KILL_SECONDS
        try:
            while not (good := self._good_checkpoints()):
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise R1DistillError(f"the training wrote no checkpoint. {log} ends:\n{tail}")
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        self._wait_for_workers()
        self._killed_at = max(int(path.name.rpartition("-")[2]) for path in good)
        return f"killed after the checkpoint of step {self._killed_at}; nothing of it was left running"

    def _resumed(self, metrics: dict[str, Any]) -> str:
        history = json.loads((self._paths["checkpoint"] / "loss.json").read_text())
        steps = [row["step"] for row in history if "loss" in row]
        if steps != list(range(1, metrics["steps"] + 1)):
            raise R1DistillError(f"the resumed training logged the steps {steps}, not every one of {metrics['steps']}")
        if metrics.get("resumed_from_step", 0) < self._killed_at:
            raise R1DistillError(f"the training that was killed after step {self._killed_at} started over")
        losses = f"loss {metrics['first_loss']:.2f} to {metrics['last_loss']:.2f}"
        return f"steps {self._killed_at + 1} to {metrics['steps']}, {losses}"

    def _look_at_checkpoint(self) -> str:
        """The preflight's checks on what was really written; for LoRA also the adapter beside the merged weights."""
        folder = self._paths["checkpoint"]
        findings = preflight.check_folder(self._run().student, folder)
        if failed := [str(finding) for finding in findings if not finding.passed]:
            raise R1DistillError("\n".join(failed))
        merged = (folder / "adapter").is_dir()
        if merged != (self.student.sft.method.kind != "full"):
            raise R1DistillError(
                f"{folder} {'has an' if merged else 'has no'} adapter; its method is {self.student.sft.method.kind}"
            )
        return f"{len(findings)} checks passed on the written files" + (", adapter merged" if merged else "")

    # What the steps need.

    def _run(self) -> Run:
        """The request that the written files make, with artifacts in the rehearsal's own home."""
        student, teacher, prompts = (str(self._file(name)) for name in ("student", "teacher", "prompts"))
        return replace(Run.load(student, teacher, prompts), home=self.home)

    def _file(self, name: str) -> Path:
        """A configuration file; the student's has its name, by which artifacts and served models go."""
        return self.folder / f"{self.student.name if name == 'student' else name}.yaml"

    def _settings(self) -> dict[str, Any]:
        """The student's own settings, shrunk."""
        whole = self.student.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        sft, launch = whole["sft"], whole["sft"]["launch"]
        launch |= {"nodes": 1, "processes_per_node": 2, **self._spread()}
        launch.pop("attention", None)
        sft |= {"batch_traces": min(sft["batch_traces"], 6), "save_steps": 2, "tracking": None}
        for variant in whole["variants"].values():
            few = {"tuning_steps": 2, "calibration_traces": 8, "calibration_tokens": 128, "calibration_pieces": 4}
            few["kl_tokens"] = 256
            variant |= {key: min(value, variant[key]) for key, value in few.items() if key in variant}
            variant["gate"] = {"min_recovered": 0, "max_truncation_rise": 1, "max_loop_rise": 1, "max_kl": None}
        base = {"kind": "folder", "path": str(self.base)}
        for key in ("distill", "beyond"):  # the base has the student's vocabulary: it will do as their teacher
            if "teacher" in whole.get(key, {}):
                whole[key]["teacher"] = base
        if beyond := whole.get("beyond"):
            few = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "save_steps": 1}
            beyond |= {name: min(value, beyond[name]) for name, value in few.items() if name in beyond}
            beyond |= {"max_completion_tokens": ANSWER_TOKENS, "rollouts": "transformers"}
        return {
            **whole,
            "base": base,
            "architecture": {**whole["architecture"], **standin.SHAPE, "parameters": 1},
            "packs": {**whole["packs"], "context_tokens": CONTEXT_TOKENS},
            "gate": {},
            "twin": None,
            "benchmarks": [str(self._file("few"))],
            "teacher": str(self._file("teacher")),
            "score_teacher": False,
            "variant_questions": None,
            "serve_options": {**whole["serve_options"], "max-num-seqs": 4},
        }

    def _spread(self) -> dict[str, Any]:
        """The real layout's kind, on two processes. FSDP2 wants GPUs, as peft does for an adapter under DeepSpeed."""
        deepspeed = importlib.util.find_spec("deepspeed") and self.student.sft.method.kind == "full"
        if self.real.strategy != "zero3" or not deepspeed:
            return {"strategy": "ddp", "sequence_parallel": 1}
        return {"strategy": "zero3", "sequence_parallel": min(2, self.real.sequence_parallel)}

    def _teacher(self) -> dict[str, Any]:
        columns = {
            "question": "question",
            "prompt": "prompt",
            "completion": "completion",
            "finish_reason": "finish_reason",
        }
        source = {"kind": "file", "path": str(self.folder / "traces.jsonl"), "columns": columns, "license": "mit"}
        return {"kind": "recorded", "prompts": str(self._file("prompts")), "source": source, "model": "written"}

    def _prompts(self) -> dict[str, Any]:
        columns = {"question": "question", "reference_answer": "answer"}
        source = {"kind": "file", "path": str(self.folder / "traces.jsonl"), "columns": columns, "license": "mit"}
        return {
            "sources": [source],
            "instruction": standin.INSTRUCTION,
            "decontaminate": {"against": [str(self._file("few"))], "ngram": None},
            "dataset": {"validation_share": 0.2},
        }

    def _benchmark(self) -> dict[str, Any]:
        columns = {"question": "question", "reference_answer": "answer"}
        source = {"kind": "file", "path": str(self.folder / "questions.jsonl"), "columns": columns, "license": "mit"}
        return {
            "title": "A few sums",
            "source": source,
            "instruction": standin.INSTRUCTION,
            "k": 1,
            "max_tokens": ANSWER_TOKENS,
        }

    def _good_checkpoints(self) -> list[Path]:
        whole = self.home.glob("checkpoint/.*.partial/.work/checkpoints/checkpoint-*/GOOD")  # the trainer's mark
        return [file.parent for file in whole]

    def _wait_for_workers(self) -> None:
        """Until no process is left that works in the rehearsal's home: a killed run has to take its workers along."""
        deadline = time.monotonic() + 30
        while left := [pid for pid in _processes(str(self.home)) if pid != os.getpid()]:
            if time.monotonic() > deadline:
                raise R1DistillError(f"30 s after the run was killed its processes {left} still ran")
            time.sleep(0.1)


def _source(student: Student, tokenizers: Sequence[Path], home: Path) -> Path:
    """The folder of the base's tokenizer: the one of ``tokenizers`` that has its vocabulary, else the Hub's."""
    if not tokenizers:
        return preflight.fetch(student, home)
    for folder in tokenizers:
        if has_vocabulary(student, folder):
            return folder
    listed = ", ".join(map(str, tokenizers))
    raise RequestError(
        f"{listed} holds no vocabulary of {models.title(student.base)}. Pass the folder of its tokenizer.json: "
        "--tokenizer DIR"
    )


def _counts(manifest: dict[str, Any]) -> str:
    return f"{manifest['kept']} of {manifest['read']} {manifest['unit']}"


def _processes(mark: str) -> list[int]:
    """Processes that have ``mark`` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found
