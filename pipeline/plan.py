"""What a run would need of a hardware: memory, layout, hours and dollars of its stages, and whether it fits.

Pure arithmetic on settings: nothing is downloaded, started or imported that takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from r1distill.data import hub
from r1distill.data.config import names
from r1distill.data.errors import RequestError
from r1distill.data.hub import Access, Kind
from r1distill.data.models import HubModel
from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.sources import HubSource
from r1distill.pipeline import calibration, estimate, stageplan, storage, training
from r1distill.pipeline.calibration import Measurement
from r1distill.pipeline.estimate import Memory
from r1distill.pipeline.hardware import GIB, Hardware, detect, named
from r1distill.pipeline.run import Run
from r1distill.pipeline.stageplan import StagePlan
from r1distill.pipeline.workload import Workload, mean_tokens, workload
from r1distill.students.catalogue import Distill, OnPolicy, Student
from r1distill.students.layout import Layout
from r1distill.teacher.settings import RecordedTeacher, Teacher, VllmTeacher


@dataclass(frozen=True)
class Plan:
    """The stages of a run that take memory and time."""

    student: str
    teacher: str
    hardware: str
    hardware_title: str
    stages: tuple[StagePlan, ...]
    disk: Memory
    disk_free_gib: float
    assumptions: tuple[str, ...]
    training_layout: Layout  # what the training is started with
    via: str | None = None  # the student that is trained first
    scored_tokens: int | None = None  # that the logits are kept of
    counted: bool = False  # whether how many traces there will be is known, and not assumed
    access: dict[str, Access] = field(default_factory=dict)  # repository → whether this account may have it

    def stage(self, name: str) -> StagePlan:
        """The plan of one stage, the student's own where one is trained before it."""
        return next(stage for stage in reversed(self.stages) if stage.stage == name)

    def after(self, first: Plan) -> Plan:
        """With what the student's teacher of probabilities takes before it. Both have the same traces, and the
        checkpoints of a training under way are gone when the next one starts."""
        one, other = first.disk, self.disk
        disk = {part: one.get(part, 0.0) + other.get(part, 0.0) for part in {**one, **other}}
        disk |= {part: max(one[part], other[part]) for part in ("teacher", "training checkpoints") if part in disk}
        disk["traces and packs"] -= storage.TEXT_SHARE * other["traces and packs"]
        before = [stage for stage in first.stages if stage.stage != "variants"]
        return replace(
            self,
            via=first.student,
            stages=(*before, *(stage for stage in self.stages if stage.stage != "traces")),
            disk=disk,
        )

    @property
    def totals(self) -> dict[str, Any]:
        """Hours, GPU-hours and dollars of all stages together, as far as they are known; None where none is."""
        found: dict[str, Any] = {}
        for name in ("hours", "gpu_hours", "usd"):
            known = [value for stage in self.stages if (value := getattr(stage, name)) is not None]
            found[name] = sum(known) if known else None
        return found

    @property
    def largest_k(self) -> int | None:
        """The largest k whose logits the disk has room for; None where none are kept, or how many is not known."""
        if not self.scored_tokens or "logits" not in self.disk:
            return None
        room = self.disk_free_gib - sum(self.disk.values()) + self.disk["logits"]
        return Distill.largest_k(room * GIB / self.scored_tokens)

    @property
    def disk_fits(self) -> bool:
        return sum(self.disk.values()) <= self.disk_free_gib

    @property
    def fits(self) -> bool:
        return self.disk_fits and all(stage.fits for stage in self.stages)

    @property
    def problems(self) -> list[str]:
        """What is missing, a line each."""
        lines = [f"{stage.stage}: {stage.reason}" for stage in self.stages if not stage.fits]
        if not self.disk_fits:
            need = f"{sum(self.disk.values()):,.0f} GiB are needed ({stageplan.parts(self.disk)})"
            room = f"{self.disk_free_gib:,.0f} are free."
            lines.append(f"disk: {need}, {room}{self._advice}")
        return lines

    @property
    def _advice(self) -> str:
        """Which k there is room for, where that is another one."""
        if self.disk_fits or not self.disk.get("logits") or (most := self.largest_k) is None:
            return ""
        return f" The largest k that fits is {most}: --set student.distill.k={most}" if most else " No k fits."

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        stages = [
            {
                **asdict(stage),
                "needed_gib": stage.needed_gib,
                "usd": None if stage.usd is None else str(stage.usd),
                "measured": stage.measured and stage.measured.model_dump(mode="json"),
            }
            for stage in self.stages
        ]
        layout = self.training_layout.model_dump(mode="json")
        return {
            **asdict(self),
            "training_layout": layout,
            **self.totals,
            "usd": None if self.totals["usd"] is None else str(self.totals["usd"]),
            "largest_k": self.largest_k,
            "fits": self.fits,
            "disk_fits": self.disk_fits,
            "stages": stages,
        }

    def text(self) -> str:
        """The plan as a person reads it."""
        via = f" via {self.via}" if self.via else ""
        lines = [f"{self.student}{via}, taught by {self.teacher}, on {self.hardware}: {self.hardware_title}", ""]
        for stage in self.stages:
            lines += stage.lines(whose=bool(self.via))
        if self.via:
            lines += [f"{'in all':<12}{self._in_all()}", ""]
        verdict, sizes = "fits" if self.disk_fits else "DOES NOT FIT", stageplan.parts(self.disk)
        lines.append(f"{'disk':<12}{verdict}  {sum(self.disk.values()):,.0f} of {self.disk_free_gib:,.0f} GiB: {sizes}")
        if self.largest_k is not None:
            rows = f"the logits of {self.scored_tokens or 0:,} tokens: the disk has room for k up to {self.largest_k}"
            lines.append(" " * 12 + rows)
        lines += [""] if self.access else []
        lines += [f"{'access':<12}{state}  {', '.join(found)}" for state, found in self._by_access().items()]
        lines += ["", *(f"assumed: {line}" for line in self.assumptions), ""]
        return "\n".join([*lines, f"{self.student}{via} {'fits' if self.fits else 'does not fit'} on {self.hardware}."])

    def _in_all(self) -> str:
        totals = self.totals
        words = [stageplan.duration(totals["hours"]) if totals["hours"] is not None else "hours not known"]
        words += [f"{totals['gpu_hours']:,.1f} GPU-hours"] if totals["gpu_hours"] is not None else []
        words += [f"${totals['usd']:,}"] if totals["usd"] is not None else []
        unknown = [f"{one.stage} of {one.subject}" for one in self.stages if one.hours is None]
        return ", ".join(words) + (f"; without {', '.join(unknown)}, whose hours are not known" if unknown else "")

    def _by_access(self) -> dict[str, list[str]]:
        """Repositories by what is known of them, in words."""
        words = {
            "granted": "granted",
            "gated": "GATED, ask for it on the Hub and set HF_TOKEN:",
            "missing": "MISSING, or private:",
            "not checked": "not checked (no answer from the Hub)",
        }
        found: dict[str, list[str]] = {}
        for repo, state in sorted(self.access.items()):
            found.setdefault(words[state], []).append(repo)
        return found


def plan(
    student: Student,
    teacher: Teacher,
    hardware: Hardware,
    prompts: PromptSet | None = None,
    benchmarks: Sequence[Benchmark] = (),
    measured: Sequence[Measurement] = (),
    via: Student | None = None,
) -> Plan:
    """Plan one student's stages; without ``prompts`` and ``benchmarks``, what depends on their number has no hours.

    What was ``measured`` of the same work on the same kind of hardware takes the place of what is predicted. ``via`` is
    the student whose checkpoint makes the logits, where the run trains it first: ``of_run`` plans that too.
    """
    work = workload(student, teacher, prompts)
    choice = training.choose(student, hardware, mean_tokens(student, work))
    stages = [
        stageplan.checkpoint(student, hardware, work, choice),
        *_beyond(student, hardware, mean_tokens(student, work)),
        stageplan.variants(student, hardware),
        stageplan.scores(student, teacher, hardware, benchmarks),
    ]
    if student.distill:
        stages = [stageplan.logits(student, hardware, work, via), *stages]
    stages = [replace(stage, subject=student.name) for stage in stages]
    stages = [replace(stageplan.traces(teacher, hardware, work), subject=teacher.name), *stages]
    return Plan(
        student=student.name,
        teacher=teacher.name,
        hardware=hardware.name,
        hardware_title=hardware.title,
        stages=tuple(stage.calibrated(measured, hardware) for stage in stages),
        disk=storage.needed(student, teacher, work),
        disk_free_gib=hardware.disk_gib,
        assumptions=(*work.assumptions, *_assumptions(hardware)),
        training_layout=choice.layout,
        scored_tokens=work.tokens if student.distill else None,
        counted=work.counted,
    )


def of_run(run: Run) -> Plan:
    """The plan of a run, with what was measured under its home, and what the Hub says of its repositories."""
    return replace(_of_run(run, calibration.read(run.home)), access=hub.access(_repositories(run)))


def _of_run(run: Run, measured: Sequence[Measurement] = ()) -> Plan:
    via = run.via.student if run.via else None
    answer = plan(run.student, run.teacher, run.hardware, run.prompts, run.benchmarks, measured, via)
    return answer.after(_of_run(run.via, measured)) if run.via else answer


def _repositories(run: Run) -> list[tuple[Kind, str]]:
    """What a run would take from the Hub."""
    models = [run.student.base, *([run.teacher.model] if isinstance(run.teacher, VllmTeacher) else [])]
    models += [run.student.beyond.teacher] if isinstance(run.student.beyond, OnPolicy) else []
    models += [run.student.distill.teacher] if run.student.distill else []
    models += [run.via.student.base] if run.via else []
    sources = [*run.prompts.sources, *(bench.source for bench in [*run.benchmarks, *run.held_out])]
    sources += [run.teacher.source] if isinstance(run.teacher, RecordedTeacher) else []
    found: list[tuple[Kind, str]] = [("model", one.repo) for one in models if isinstance(one, HubModel)]
    found += [("dataset", one.repo) for one in sources if isinstance(one, HubSource)]
    return list(dict.fromkeys(found))


def training_layout(run: Run) -> Layout:
    """How the run's training is spread over its hardware."""
    work = workload(run.student, run.teacher, run.prompts)
    return training.choose(run.student, run.hardware, mean_tokens(run.student, work)).layout


def scoring_gpus(run: Run) -> int:
    """Over how many GPUs one copy of the teacher of the run's logits is laid."""
    return stageplan.scoring_gpus(run.student, run.hardware, run.via.student if run.via else None)


def beyond_layout(run: Run) -> Layout:
    """The same for the stage beyond, which can't cut a sequence over several processes."""
    work = workload(run.student, run.teacher, run.prompts)
    return training.choose(_uncut(run.student), run.hardware, mean_tokens(run.student, work)).layout


def _beyond(student: Student, hardware: Hardware, mean: float) -> list[StagePlan]:
    if student.beyond is None:
        return []
    return [stageplan.beyond(student, hardware, training.choose(_uncut(student), hardware, mean))]


def _uncut(student: Student) -> Student:
    launch = student.sft.launch.model_copy(update={"sequence_parallel": 1})
    return student.model_copy(update={"sft": student.sft.model_copy(update={"launch": launch})})


def record(
    run: Run, stage: str, metrics: Mapping[str, Any], seconds: float, peak_gib: float, resumed: bool = False
) -> None:
    """Put down what a stage took beside what was predicted, for the stages that are predicted. Its seconds say nothing
    where it ``resumed`` from what a killed attempt had, or found what it asks for: then only a speed is put down."""
    found = next((each for each in reversed(_of_run(run).stages) if each.stage == stage), None)
    rate = metrics.get("tokens_per_second")
    partly = resumed or metrics.get("found") or stage in ("traces", "logits")
    if found is None or not found.work or (rate is None and partly):
        return
    tokens = metrics.get("tokens", metrics.get("completion_tokens")) or found.tokens
    hours = found.at(tokens, found.tokens_per_second, run.hardware).hours
    reserved = run.hardware.gpus and stage in ("traces", "scores")  # vLLM takes nine tenths of a GPU whatever it needs
    calibration.append(
        run.home,
        Measurement(
            stage=stage,
            subject=found.subject,
            work=found.work,
            hardware=run.hardware.kind,
            layout=found.layout,
            tokens=tokens,
            predicted_seconds=None if hours is None else round(hours * 3600, 1),
            seconds=round(seconds, 1),
            predicted_tokens_per_second=found.tokens_per_second and round(found.tokens_per_second, 1),
            tokens_per_second=rate,
            predicted_gib=round(found.needed_gib, 2) or None,
            gib=None if reserved else round(peak_gib, 2) or None,
        ),
    )


def check(
    student: Student,
    teacher: Teacher,
    hardware: Hardware,
    *,
    here: Hardware | None = None,
    stages: Sequence[str] = (),
    prompts: PromptSet | None = None,
    via: Student | None = None,
    asks_in: str | None = "logits",
) -> None:
    """Raise RequestError where the run can't be carried, saying what is missing and what would work.

    ``here`` is the machine that this runs on (detected by default): it must have what ``hardware`` promises.
    ``stages`` limits the check to those that will run; empty means all. ``via`` is the student that is trained first,
    where the stage ``asks_in`` will run.
    """
    _check_here(hardware, here)

    def asked(machine: Hardware) -> Plan:
        answer = _only(plan(student, teacher, machine, prompts, via=via), stages)
        if via is None or (stages and asks_in not in stages):
            return answer
        return answer.after(_only(plan(via, teacher, machine, prompts), ()))

    answer = asked(hardware)
    if not answer.fits:
        raise RequestError(_refusal(student, teacher, answer, _fitting(lambda machine: asked(machine).fits)))


def check_run(run: Run, stages: Sequence[str]) -> None:
    """The same for the stages of a run."""
    via = run.via.student if run.via else None
    check(run.student, run.teacher, run.hardware, stages=stages, prompts=run.prompts, via=via, asks_in=run.asks_in)


def check_teacher(teacher: Teacher, hardware: Hardware) -> None:
    """Raise RequestError where the hardware can't serve the teacher."""
    answer = stageplan.traces(teacher, hardware, Workload())
    if not answer.fits:
        fitting = _fitting(lambda other: stageplan.traces(teacher, other, Workload()).fits)
        raise RequestError(
            f"{hardware.name} ({hardware.title}) can't serve the teacher '{teacher.name}': {answer.reason}\n"
            f"It fits on: {', '.join(fitting) or 'nothing in configs/hardware'}. "
            "Another way: an endpoint that serves it already (--teacher deepseek-api)."
        )


def _only(answer: Plan, stages: Sequence[str]) -> Plan:
    """The plan without the stages that won't run; the disk is counted where one that fills it does, and without the
    traces, nor the logits of traces that nobody has counted: how many are assumed refuses nobody."""
    kept = tuple(stage for stage in answer.stages if not stages or stage.stage in stages)
    trains = not stages or {"logits", "checkpoint", "beyond", "variants", "scores"} & set(stages)
    uncounted = {"traces and packs", *([] if answer.counted else ["logits"])}
    sizes = {part: 0.0 if part in uncounted else size for part, size in answer.disk.items()}
    return replace(answer, stages=kept, disk={part: sizes[part] for part in sizes if part == "teacher" or trains})


def _check_here(hardware: Hardware, here: Hardware | None) -> None:
    if hardware.name == "local" or not hardware.gpus_per_node:
        return
    machine = here or detect()
    if machine.gpus_per_node < hardware.gpus_per_node:
        raise RequestError(
            f"HARDWARE={hardware.name} promises {hardware.gpus_per_node} x {hardware.gpu} on this machine, found "
            f"{machine.gpus_per_node}. A run works on the machine that it is started on: start it there, or leave "
            f"HARDWARE away. 'r1distill plan --hardware {hardware.name}' answers anywhere."
        )


def _refusal(student: Student, teacher: Teacher, answer: Plan, fitting: Sequence[str]) -> str:
    best = fitting[0] if fitting else "8xh200"
    failing = {stage.stage for stage in answer.stages if not stage.fits}
    via, add = (f" via '{answer.via}'", f" --via {answer.via}") if answer.via else ("", "")
    title = f"'{student.name}'{via} taught by '{teacher.name}'"
    lines = [f"{title} does not fit on {answer.hardware}: {answer.hardware_title}."]
    lines += [f"  {problem}" for problem in answer.problems]
    lines += ["What would work:"]
    lines += [f"  a machine that fits: {', '.join(fitting)}"] if fitting else []
    lines += [f"  r1distill plan --student {student.name}{add} --hardware {best}    memory, time and cost there"]
    add = add and f" VIA={answer.via}"
    lines += [f"  make distill STUDENT={student.name}{add} HARDWARE={best}    started on such a machine"]
    if "traces" in failing and isinstance(teacher, VllmTeacher):
        rest = "" if failing == {"traces"} else "; training needs its own machine all the same"
        lines += [f"  TEACHER=recorded or TEACHER=deepseek-api    traces without serving the teacher here{rest}"]
        lines += ["  TEACHER=recorded UNTIL=dataset    as far as this machine goes"] if rest else []
    lines += ["  make distill    the default student, made for two cores without a GPU"]
    return "\n".join(lines)


def _fitting(fits: Callable[[Hardware], bool]) -> list[str]:
    """The names in configs/hardware that fit, the smallest first."""
    known = sorted((named(name) for name in names("hardware")), key=lambda h: (h.gpus * h.gpu_memory_gib, h.name))
    return [hardware.name for hardware in known if fits(hardware)]


def _assumptions(hardware: Hardware) -> tuple[str, ...]:
    if not hardware.gpus:
        return ("speed on the CPU: measured with SmolLM2-135M on two cores, scaled by cores and parameters",)
    price = hardware.price_usd_per_gpu_hour
    return (
        f"training reaches {hardware.training_utilisation:.0%} of the GPU's bf16 peak, recomputation not counted, "
        f"collectives {training.COLLECTIVE_SHARE:.0%} of a link; decoding {estimate.DECODING_UTILISATION:.0%} of the "
        "memory's bandwidth, with every slot filled",
        f"of a GPU's memory vLLM may use {estimate.GPU_SHARE:.0%} unless it is told otherwise, training leaves "
        f"{training.reserve_gib(hardware.gpu_memory_gib):.1f} GiB to CUDA, NCCL and fragmentation; optimiser states "
        "stay on the GPUs",
        f"${price} a GPU-hour, for all GPUs of it"
        if price is not None
        else "no dollars: set a price, --set hardware.price_usd_per_gpu_hour=2.50",
    )
