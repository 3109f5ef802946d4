"""A study: what a teacher's probabilities add to its text. Each arm is one student, trained in another way.

An arm is the student's own configuration with one thing changed, trained from several seeds by the project's own chain:
prompts, traces, verdicts, dataset, packs and the teacher's top-k are made once for all of them, and what is sealed is
not made again. Every arm takes the same packs in as many steps; a seed is the order in which it takes them. From the
checkpoints of the best of them two more go on with as many steps again, learning from their own answers (the stage
beyond). All are asked the same held-out questions, as the scores stage asks, and read the same held-out traces.

Without a student of one's own it takes SmolLM2 with a third of its layers, for two CPU cores (``third``).
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from r1distill.data import models, schema, sources
from r1distill.data.errors import RequestError
from r1distill.data.result import Result
from r1distill.pipeline import evaluation, plan, runner, scores, third
from r1distill.pipeline.artifact import Artifact, building, find, fingerprint, place, seal
from r1distill.pipeline.evaluation import Contender
from r1distill.pipeline.metrics import over_runs, paired_runs, question_means
from r1distill.pipeline.run import Run
from r1distill.pipeline.runner import Done, Step

if TYPE_CHECKING:
    from r1distill.students.divergence import Trace

VERSION = 1
STAGE = "studies"

# Each arm as changes of the student's file, whose own 'distill' is what "both" takes. The others are held against the
# first.
ARMS: dict[str, tuple[str, ...]] = {
    "text": ("student.distill=null",),
    "top-k": ("student.distill.ce_weight=0",),
    "both": (),
}
BEYOND: dict[str, dict[str, Any]] = {"on-policy": {"kind": "on_policy"}, "grpo": {"kind": "grpo"}}
ALONE = ("student.beyond=null", "student.variants={}", "student.twin=null")

GIVEN = ("base", "teacher")

Rows = list[dict[str, Any]]
Tell = Callable[[str, Done], None]


@dataclass(frozen=True)
class Trained:
    """One arm from one seed; the artifact of ``step`` is its model."""

    arm: str
    seed: int
    run: Run
    step: Step

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


class Study:
    """The arms of one student, named as on the command line. What its file says under 'beyond' is taken for that kind.

    Raises RequestError where the student's file has no 'distill', or it would be scored on questions that it learns
    from.
    """

    def __init__(
        self,
        home: Path,
        student: str | None = None,
        teacher: str | None = None,
        prompts: str | None = None,
        hardware: str | None = None,
        seeds: int = 3,
        changes: Sequence[str] = (),
    ):
        self.beyond = BEYOND
        if student is None:
            student, sums = third.write(home)
            prompts, self.beyond = prompts or sums, third.BEYOND
        self.home, self.request, self.changes = home, (student, teacher, prompts, hardware), changes
        if own := self._run().student.beyond:
            made = own.model_dump(mode="json", exclude={"steps", "seed"})
            self.beyond = {arm: made if its["kind"] == own.kind else its for arm, its in self.beyond.items()}
        self.run = self._run(*ALONE)
        self.student = self.run.student
        if self.student.distill is None:
            raise RequestError(
                f"a study needs a student whose file has 'distill', which names the teacher whose probabilities it is "
                f"to learn from; '{self.student.name}' has none."
            )
        self.run.check_held_out()
        self.trained = [self._trained(arm, seed) for seed in range(seeds) for arm in ARMS]

    def _run(self, *changes: str) -> Run:
        return replace(Run.load(*self.request, [*self.changes, *changes]), home=self.home)

    def _trained(self, arm: str, seed: int) -> Trained:
        run = self._run(*ALONE, *ARMS[arm], f"student.sft.seed={seed}")
        return Trained(arm, seed, run, runner.chain(run, "checkpoint")[-1])

    def _going_on(self, arm: str, start: Trained) -> Trained:
        """An arm of BEYOND from where one of ARMS ended, whose steps it takes again."""
        assert self.student.distill
        artifact = start.step.sealed()
        assert artifact
        settings = {**self.beyond[arm], "steps": artifact.manifest["metrics"]["steps"], "seed": start.seed}
        if settings["kind"] == "on_policy":
            settings.setdefault("teacher", self.student.distill.teacher.model_dump(mode="json"))
        same = (*ALONE, *ARMS[start.arm], f"student.sft.seed={start.seed}")
        run = self._run(*same, f"student.beyond={json.dumps(settings)}")
        return Trained(arm, start.seed, run, runner.chain(run, "beyond")[-1])

    def identity(self) -> dict[str, Any]:
        return {
            "study": VERSION,
            "arms": {one.name: one.step.fingerprint for one in self.trained if one.arm in ARMS},
            "beyond": self.beyond,
            "benchmarks": [[bench.identity(), sources.revision(bench.source)] for bench in self.run.benchmarks],
            "teacher": self.run.identity_of_scores()["teacher"],
        }

    def execute(self, tell: Tell) -> Artifact:
        """Train, ask and read every arm; found again where that was done. ``tell`` gets every stage as it ends."""
        identity, label = self.identity(), self.student.name
        path = place(self.home, STAGE, label, fingerprint(identity))
        if artifact := find(path, fingerprint(identity)):
            return artifact
        plan.check(self.student, self.run.teacher, self.run.hardware, stages=runner.stage_names("beyond"))
        self.run.check_sandbox(scored=True)
        with building(path) as partial:
            began = time.monotonic()
            made = self.train(self.trained, tell)
            best = self.best(self.ask(partial))
            later = [self._going_on(arm, one) for one in self.trained if one.arm == best for arm in self.beyond]
            self.train(later, tell)
            self.trained += later
            found = self.found(best, answers := self.ask(partial), self.read(made["packs"].path))
            (partial / "study.json").write_text(json.dumps(found, indent=1))
            correct = sum(row["correct"] for row in answers)
            result = Result(len(answers), correct, {"wrong": len(answers) - correct}, {"study": found}, unit="answers")
            about = {"stage": STAGE, "label": label, "fingerprint": fingerprint(identity), "identity": identity}
            inputs = {"packs": made["packs"].fingerprint}
            return seal(partial, path, runner.manifest_of(result, began, **about, inputs=inputs))

    def train(self, wanted: Sequence[Trained], tell: Tell) -> dict[str, Step]:
        """Build what is not there; the shared stages' steps by name."""
        steps: list[Step] = []
        for one in wanted:
            steps = runner.chain(one.run, "beyond")
            for done in runner.execute(steps):
                if done.built or done.step.stage is one.step.stage:
                    tell(one.name, done)
        return {step.stage.name: step for step in steps}

    def ask(self, out: Path) -> Rows:
        """Everybody's answers, asked where the ledger lacks them, and judged."""
        asked = evaluation.asked(self.run.benchmarks, list(self.contenders()))
        return evaluation.answers(asked, self.home, out, self.run.prompts.verdicts.workers)

    def best(self, answers: Rows) -> str:
        """The arm with most right answers; of several, the one that stands first."""
        right = Counter(row["model"].rpartition("-")[0] for row in answers if row["correct"])
        return max(ARMS, key=lambda arm: right[arm])

    def contenders(self) -> Iterator[Contender]:
        """Base and teacher as the scores stage serves them, then every arm from every seed. A teacher of the traces
        that is not the one of the probabilities has no place in the table."""
        assert self.student.distill
        told = set() if getattr(self.run.teacher, "model", None) == self.student.distill.teacher else {"teacher"}
        for one in self.trained:
            for found in scores.contenders(one.run, one.step.path, one.step.path, {}):
                name = one.name if found.name == "student" else found.name
                if name not in told:
                    yield replace(found, name=name)
                told.add(name)

    def read(self, packs: Path) -> dict[str, tuple[float, float]]:
        """(KL(teacher || model), cross-entropy) a token of the held-out traces, by model."""
        from r1distill.students.divergence import Reference

        assert self.student.distill
        given = (self.student.base, self.student.distill.teacher)
        folders = {name: models.materialise(ref, self.home) for name, ref in zip(GIVEN, given, strict=True)}
        folders |= {one.name: one.step.path for one in self.trained}
        reference = Reference(models.materialise(self.student.distill.teacher, self.home), list(held_out(packs)))
        bar = tqdm(folders.items(), desc="reading held-out traces", unit="model", disable=None, delay=2)
        return {name: reference.reading(folder) for name, folder in bar}

    def found(self, best: str, answers: Rows, readings: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """What is written of the study: what was asked of whom, and a table for each benchmark."""
        distill = self.student.distill
        assert distill
        arms: dict[str, list[str]] = {name: [name] for name in GIVEN}
        made: dict[str, dict[str, Any]] = {}
        for one in self.trained:
            arms.setdefault(one.arm, []).append(one.name)
            artifact = one.step.sealed()
            assert artifact
            made[one.name] = artifact.manifest
        training = {arm: trained(names, made, readings) for arm, names in arms.items()}
        tables: dict[str, Any] = {}
        for bench in self.run.benchmarks:
            rows = scored([row for row in answers if row["benchmark"] == bench.name], arms, best)
            tables[bench.name] = {
                "title": bench.title,
                **{key: getattr(bench, key) for key in ("temperature", "top_p", "max_tokens")},
                "arms": [{**row, **training[row["arm"]]} for row in rows],
            }
        weights = distill.model_dump(mode="json", include={"k", "temperature", "kl_weight", "ce_weight", "tail"})
        about = {"student": self.student.name, "teacher": models.title(distill.teacher), "distill": weights}
        about |= {"best": best, "beyond": self.beyond}
        return {**about, "seeds": len({one.seed for one in self.trained}), "benchmarks": tables}


def held_out(packs: Path) -> Iterator[Trace]:
    """The traces of the validation packs; raises RequestError where none was set aside."""
    from r1distill.students.divergence import Trace
    from r1distill.students.packing import member
    from r1distill.students.template import IGNORE

    table = schema.read(packs / "validation", schema.PACK) if (packs / "validation").is_dir() else None
    if not table:
        raise RequestError(f"{packs} holds no validation packs: raise prompts.dataset.validation_share.")
    for pack in schema.rows(table):
        for number in range(len(pack["members"])):
            ids, labels = member(pack, number)
            yield Trace(ids, sum(label == IGNORE for label in labels))


def trained(
    names: Sequence[str], made: Mapping[str, dict[str, Any]], readings: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """One arm's figures beside its scores, each a list over seeds; ``kl`` and ``loss`` are nats a held-out token."""
    manifests = [made[name] for name in names if name in made]
    return {
        "kl": [readings[name][0] for name in names],
        "loss": [readings[name][1] for name in names],
        "steps": [manifest["metrics"]["steps"] for manifest in manifests],
        "seconds": [manifest["seconds"] for manifest in manifests],
    }


def scored(answers: Rows, arms: Mapping[str, Sequence[str]], best: str) -> Rows:
    """Each arm's pass@1 over its runs with its interval, and its difference, paired by question and seed, from the
    first of ARMS (``against``) and, of those that went on from the ``best``, from that one (``gain``). ``by_seed`` are
    the runs' own means; ``k`` is how often a run was asked a question."""
    runs: dict[str, Rows] = {}
    for row in answers:
        runs.setdefault(row["model"], []).append(row)
    means = {arm: [question_means(runs[name]) for name in names] for arm, names in arms.items() if names[0] in runs}
    first = means[next(iter(ARMS))]
    table = []
    for arm, each in means.items():
        rows = [row for name in arms[arm] for row in runs[name]]
        counts = [row["completion_tokens"] for row in rows if row["completion_tokens"] is not None]
        table.append(
            {
                "arm": arm,
                **over_runs(each),
                "by_seed": [sum(run.values()) / len(run) for run in each],
                "k": len(rows) // sum(map(len, each)),
                "against": None if each is first or arm in GIVEN else paired_runs(each, first[: len(each)]),
                "gain": None if arm in (*GIVEN, *ARMS) else paired_runs(each, means[best][: len(each)]),
                "mean_tokens": sum(counts) / len(counts) if counts else None,
                "truncated": sum(row["reason"] == "truncated" for row in rows) / len(rows),
            }
        )
    return table


# In words, for the report.


def in_words(found: Mapping[str, Any]) -> str:
    """How the arms were trained."""
    weights = found["distill"]
    further = (
        f" {' and '.join(found['beyond'])} went on from the checkpoints of {found['best']}, which has most right "
        "answers here, in as many steps again on answers of their own."
    )
    return (
        f"{found['student']} learned from {found['teacher']} by its text alone, by its {weights['k']} most probable "
        f"tokens alone, and by both (KL x {weights['kl_weight']:g} + cross-entropy x {weights['ce_weight']:g}): the "
        f"same traces in as many steps, from {found['seeds']} seeds each, a seed being the order of the packs."
    ) + (further if found["beyond"] else "")


def asked_in_words(bench: Mapping[str, Any]) -> str:
    """How they were asked, and what the figures of ``cells`` are."""
    row = bench["arms"][-1]
    return (
        f"{row['questions']} held-out questions, k = {row['k']} answers of every seed to each; temperature "
        f"{bench['temperature']}, top-p {bench['top_p']}, {bench['max_tokens']:,} tokens. pass@1 is the mean over "
        "seeds, questions and answers; its interval runs from the 2.5th to the 97.5th percentile of the means of draws "
        "with replacement of questions and, by themselves, of seeds. Beside text: the differences in points, drawn by "
        "question and seed. Held-out loss and KL are nats a token of traces that were set aside: the mean over seeds "
        "and their range. Steps and seconds are of the training alone, with + of what came on top."
    )


def gains_in_words(found: Mapping[str, Any], bench: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each arm that went on, beside where it came from."""
    for row in bench["arms"]:
        if gain := row["gain"]:
            said = "no difference is shown" if gain["verdict"] == "open" else f"{gain['verdict']}"
            points = "{:+.1f} points (95%: {:+.1f} to {:+.1f})".format(*_points(gain))
            yield f"{row['arm']} against {found['best']}, where it went on from: {said}, {points}."


def _points(difference: Mapping[str, float]) -> list[float]:
    return [100 * difference[key] for key in ("difference", "low", "high")]


def cells(bench: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of a benchmark's table, an arm a row."""
    columns = ["arm", "pass@1", "95% interval", "beside text", "held-out loss", "KL to the teacher"]
    columns += ["tokens", "cut off", "steps", "seconds"]
    rows = []
    for row in bench["arms"]:
        against, tokens, more = row["against"], row["mean_tokens"], "+" if row["gain"] else ""
        rows.append(
            [
                row["arm"],
                f"{row['accuracy']:.1%}",
                f"{100 * row['low']:.1f} – {row['high']:.1%}",
                "{:+.1f} ({:+.1f} to {:+.1f})".format(*_points(against)) if against else "–",
                _spread(row["loss"]),
                _spread(row["kl"]),
                "–" if tokens is None else f"{tokens:.0f}",
                f"{row['truncated']:.1%}",
                *(f"{more}{sum(row[key]) / len(row[key]):.0f}" if row[key] else "–" for key in ("steps", "seconds")),
            ]
        )
    return columns, rows


def _spread(values: Sequence[float]) -> str:
    """The mean, and the range of several."""
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} – {max(values):.3f})"
