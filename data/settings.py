"""The recipe of the data, as settings: prompts and what they are kept apart from, verdicts, selection, benchmarks.

They stand apart from the code that uses them, so that planning and `--help` load nothing heavy.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from r1distill.data.config import Settings, execution
from r1distill.data.sources import Source
from r1distill.data.verify.filters import FilterSettings
from r1distill.data.verify.sandbox import SandboxSettings

CheckName = Literal["format", "truncation", "correctness", "agreement", "repetition", "language"]
# In the order in which a trace's first reason is looked for: form before content.
CHECKS: tuple[CheckName, ...] = ("format", "truncation", "correctness", "agreement", "repetition", "language")


class Decontaminate(Settings):
    """Which benchmarks the prompts are kept apart from, and how: by id, by shared word n-grams, and by meaning.

    ``ngram: null`` is for benchmarks made from templates, all of whose questions share their words: by id alone.
    ``reworded`` is the share of a question's weight that a prompt has to hold (see ``data.decontaminate``).
    """

    against: list[str] = []
    ngram: int | None = Field(10, gt=0)  # the R1 paper's
    reworded: float | None = Field(0.65, gt=0, le=1)


class NearDuplicates(Settings):
    """From which Jaccard similarity of their 3-word shingles on two prompts are one (see ``data.dedup``)."""

    threshold: float = Field(0.8, gt=0, le=1)


class Judge(Settings):
    """Another model that settles what no verifier can."""

    teacher: str  # a name from configs/teachers
    domains: tuple[str, ...] = Field(min_length=1)  # whose unverifiable answers it is asked about


class VerdictSettings(Settings):
    """Which checks a trace has to pass, and their thresholds."""

    required: tuple[CheckName, ...] = CHECKS
    keep_unverified: tuple[str, ...] = ()  # domains without a rule, whose unverifiable traces are kept
    limits: FilterSettings = FilterSettings()
    judge: Judge | None = None
    timeout_seconds: float = Field(10, gt=0)  # for one trace; then its process is killed. Code has limits of its own
    code: SandboxSettings = SandboxSettings()
    workers: int | None = execution(None, ge=1)  # processes; null: one for each core, at most 16


class Band(Settings):
    """Shares of right traces between which a prompt is neither too hard nor too easy; both ends belong to it."""

    min: float = Field(0.0, ge=0, le=1)
    max: float = Field(1.0, ge=0, le=1)


class Selection(Settings):
    """Which of the passing traces are kept, and how many prompts are set aside for validation."""

    policy: Literal["first", "shortest", "all"] = "first"
    per_prompt: int = Field(1, gt=0)  # at most so many of a prompt's traces; `all` keeps every one
    pass_rate: Band | None = None  # null: prompts of every difficulty
    near_duplicates: float | None = Field(None, gt=0, le=1)  # Jaccard similarity of two thinkings; null: all may stay
    proportions: dict[str, NonNegativeFloat] = {}  # domain → weight: the largest selection that keeps them; {}: all
    validation_share: float = Field(0.02, ge=0, lt=1)  # of the prompts, by hash: it is stable as prompts are added


class PromptSet(Settings):
    """The recipe of the data; ``configs/prompts/<name>.yaml``."""

    name: str = execution()
    sources: list[Source] = Field(min_length=1)
    instruction: str | dict[str, str] = ""  # put behind the question, for all domains or by domain
    decontaminate: Decontaminate = Decontaminate()
    near_duplicates: NearDuplicates | None = None  # null: only equal questions are one
    verdicts: VerdictSettings = VerdictSettings()
    dataset: Selection = Selection()


class Plain(Settings):
    """A question in one column, asked as it stands, with the benchmark's ``instruction`` behind it."""

    kind: Literal["plain"] = "plain"


class Choices(Settings):
    """Multiple choice: the right and the wrong choices in columns of their own, shuffled for each question by a seed.

    ``prompt`` holds {question} and {choices}, which are laid out line by line as "A) ...".
    """

    kind: Literal["choices"]
    right: str
    wrong: tuple[str, ...] = Field(min_length=1, max_length=9)
    seed: int = 0
    prompt: str


Day = Annotated[str, BeforeValidator(str), Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class LiveCodeBench(Settings):
    """Problems of livecodebench/code_generation_lite: those of a release, asked in contests from ``first`` to ``last``.

    ``stdin`` and ``starter`` are the prompts of problems without and with starter code; they hold {question} and
    {starter}.
    """

    kind: Literal["livecodebench"]
    release: int = Field(ge=1)  # release_v5 is the files test.jsonl, test2.jsonl … test5.jsonl
    first: Day
    last: Day
    stdin: str
    starter: str


class Benchmark(Settings):
    """One benchmark; ``configs/benchmarks/<name>.yaml``. Sampling is DeepSeek's unless its file says why not."""

    name: str = execution()
    title: str
    source: Source
    layout: Annotated[Plain | Choices | LiveCodeBench, Field(discriminator="kind")] = Plain()
    instruction: str | dict[str, str] = ""
    private: bool = False  # its text must not be shown: no artifact holds more than ids, letters and verdicts
    difficulty: str | None = None  # the source's column that says how hard a question is
    k: int = Field(gt=0)  # samples a question
    limit: int | None = Field(None, gt=0)
    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(32768, gt=0)
    seed: int | None = None
