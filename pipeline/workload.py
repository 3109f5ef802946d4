"""How much a run asks for: traces, tokens and questions, as far as the settings tell without reading any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r1distill.data.settings import Benchmark, PromptSet
from r1distill.data.sources import HubSource, ReasoningGymSource, Source
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import RecordedTeacher, Teacher

# The published data set: arXiv 2501.12948, supplement, table 5.
RECIPE_TRACES = 804_745
RECIPE_MEAN_TOKENS = 5_355

# Questions of public benchmarks, for those files that set no limit. LiveCodeBench's card: release 5 has 880 problems,
# and release 3, which ends in July 2024, 612.
QUESTIONS = {"aime2024": 30, "aime2025": 30, "math500": 500, "gpqa-diamond": 198, "livecodebench": 268, "gsm8k": 1_319}


@dataclass(frozen=True)
class Workload:
    """Completions to sample and their mean length; None where only the data would tell."""

    completions: int | None = None
    mean_tokens: float | None = None
    assumptions: tuple[str, ...] = ()
    counted: bool = False  # from the prompts, and not assumed

    @property
    def tokens(self) -> int | None:
        """Tokens to be generated."""
        return int(self.completions * self.mean_tokens) if self.completions and self.mean_tokens else None

    def plus(self, other: Workload) -> Workload:
        """Both together; unknown where one is."""
        if not self.tokens or not other.tokens:
            return self if other.completions == 0 else other if self.completions == 0 else Workload()
        completions = (self.completions or 0) + (other.completions or 0)
        return Workload(completions, (self.tokens + other.tokens) / completions)


def workload(student: Student, teacher: Teacher, prompts: PromptSet | None) -> Workload:
    """What the traces stage asks for; where an R1 student's prompts can't be counted, the published recipe's number."""
    asked = None if prompts is None else _prompts(prompts.sources)
    if isinstance(teacher, RecordedTeacher):
        return Workload(assumptions=("how many traces are recorded is known when they are read: no hours",))
    mean = min(RECIPE_MEAN_TOKENS, teacher.sampling.max_tokens)
    length = f"a trace has {mean:,} tokens" + (
        " (the published mean)" if mean == RECIPE_MEAN_TOKENS else " (its limit)"
    )
    if asked is not None:
        traces = asked * teacher.sampling.samples
        return Workload(traces, mean, (f"{traces:,} traces, all of them kept", length), counted=True)
    if student.template == "r1":
        return Workload(RECIPE_TRACES, mean, (f"{RECIPE_TRACES:,} traces, as in the published recipe", length))
    return Workload(None, mean, ("how many prompts there are is not known: no hours",))


def mean_tokens(student: Student, work: Workload) -> float:
    """The mean length of a trace; where only the data would tell, the published one, or half a context if less."""
    return work.mean_tokens or min(RECIPE_MEAN_TOKENS, student.packs.context_tokens / 2)


def _prompts(sources: Sequence[Source]) -> int | None:
    """Prompts of all sources together, before duplicates are dropped; None where a source can't be counted."""
    total = 0
    for source in sources:
        if isinstance(source, ReasoningGymSource):
            total += sum(task.count for task in source.tasks.values())
        elif isinstance(source, HubSource) and source.limit:
            total += source.limit
        else:
            return None
    return total


def questions_asked(
    benchmarks: Sequence[Benchmark], models: int, most: int | None = None, samples: int | None = None
) -> Workload:
    """The completions of the scores: every question (or ``most`` of a benchmark) k (or ``samples``) times a model."""
    total, tokens = 0, 0.0
    for bench in benchmarks:
        questions = bench.limit or QUESTIONS.get(bench.name) or _prompts([bench.source])
        if questions is None:
            return Workload()
        asked = min(questions, most or questions) * min(bench.k, samples or bench.k) * models
        total += asked
        tokens += asked * min(RECIPE_MEAN_TOKENS, bench.max_tokens)
    return Workload(total, tokens / total) if total else Workload(0 if benchmarks else None)
