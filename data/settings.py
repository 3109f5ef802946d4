"""The recipe of the data, as settings: prompts and what they are kept apart from, verdicts, selection, benchmarks.

They stand apart from the code that uses them, so that planning and `--help` load nothing heavy.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat

from r1distill.data.config import Settings, execution
from r1distill.data.sources import Source
from r1distill.data.verify.filters import FilterSettings

CheckName = Literal["format", "truncation", "correctness", "repetition", "language"]
# In the order in which a trace's first reason is looked for: form before content.
CHECKS: tuple[CheckName, ...] = ("format", "truncation", "correctness", "repetition", "language")


class Decontaminate(Settings):
    """Which benchmarks the prompts are kept apart from, by id and by shared word n-grams (null: by id alone)."""

    against: list[str] = []
    ngram: int | None = Field(10, gt=0)  # the R1 paper's


class VerdictSettings(Settings):
    """Which checks a trace has to pass, and their thresholds."""

    required: tuple[CheckName, ...] = CHECKS
    keep_unverified: tuple[str, ...] = ()  # domains without a rule, whose unverifiable traces are kept
    limits: FilterSettings = FilterSettings()
    timeout_seconds: float = Field(10, gt=0)  # for one trace; then its process is killed
    workers: int | None = execution(None)  # processes; null: one for each core, at most 16


class Band(Settings):
    """Shares of right traces between which a prompt is neither too hard nor too easy; both ends belong to it."""

    min: float = Field(0.0, ge=0, le=1)
    max: float = Field(1.0, ge=0, le=1)


class Selection(Settings):
    """Which of the passing traces are kept, and how many prompts are set aside for validation."""

    policy: Literal["first", "shortest", "all"] = "first"
    per_prompt: int = Field(1, gt=0)  # at most so many of a prompt's traces; `all` keeps every one
    pass_rate: Band | None = None  # null: prompts of every difficulty
    proportions: dict[str, NonNegativeFloat] = {}  # domain → weight: the largest selection that keeps them; {}: all
    validation_share: float = Field(0.02, ge=0, lt=1)  # of the prompts, by hash: it is stable as prompts are added


class PromptSet(Settings):
    """The recipe of the data; ``configs/prompts/<name>.yaml``."""

    name: str = execution()
    sources: list[Source] = Field(min_length=1)
    instruction: str | dict[str, str] = ""  # put behind the question, for all domains or by domain
    decontaminate: Decontaminate = Decontaminate()
    verdicts: VerdictSettings = VerdictSettings()
    dataset: Selection = Selection()


class Benchmark(Settings):
    """One benchmark; ``configs/benchmarks/<name>.yaml``. Sampling is DeepSeek's unless its file says why not."""

    name: str = execution()
    title: str
    source: Source
    instruction: str | dict[str, str] = ""
    k: int = Field(gt=0)  # samples a question
    limit: int | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int | None = None
