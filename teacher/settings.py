"""Teachers as settings: a model that we serve with vLLM, somebody else's endpoint, or traces that exist already."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from r1distill.data import config
from r1distill.data.config import Settings, execution
from r1distill.data.models import ModelRef
from r1distill.data.sources import FileSource, HubSource


class Sampling(Settings):
    """How every answer is drawn: ``samples`` a prompt; with a ``seed`` repeatable, as far as the server can."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(gt=0)
    samples: int = Field(1, ge=1)
    seed: int | None = None

    def of_one(self) -> dict[str, Any]:
        """What decides one answer: more samples a prompt don't ask again for those that are there."""
        return self.model_dump(exclude={"samples"})


class Client(Settings):
    """How the server is asked: it decides how long it takes and not what is answered."""

    in_flight: int = Field(64, ge=1)  # requests at the server at any moment
    attempts: int = Field(6, ge=1)
    backoff_seconds: float = Field(1.0, ge=0)  # doubled at every attempt, up to a minute, with jitter
    timeout_seconds: float = Field(3600, gt=0)  # for one answer; also how long a rate limit is waited out


class VllmTeacher(Settings):
    """Weights that we serve with vLLM: on one node, on several over Ray, or on the CPU."""

    kind: Literal["vllm"]
    name: str = execution()
    prompts: str = execution()  # the set it is asked by default
    model: ModelRef
    served_name: str  # what the server calls it, and so the traces
    options: dict[str, Any] = execution({})  # vLLM's flags without their dashes
    environment: dict[str, str] = execution({})
    opens_thinking: bool = False  # the template's generation prompt ends in <think>, and no reasoning parser is on
    sampling: Sampling
    client: Client = execution(Client())
    max_failed_share: float = execution(0.01, ge=0, le=1)


class Price(Settings):
    """US dollars for a million tokens."""

    input: Decimal = Field(ge=0)
    output: Decimal = Field(ge=0)


class EndpointTeacher(Settings):
    """An OpenAI-compatible service that somebody else runs. The key stays in the environment variable that is named."""

    kind: Literal["endpoint"]
    name: str = execution()
    prompts: str = execution()
    base_url: str
    model: str  # as the service calls it; traces take what the service reports
    revision: str | None = None  # what is known of the weights behind that name
    key_variable: str | None = execution(None)
    price_usd_per_million: Price | None = execution(None)
    budget_usd: Decimal | None = execution(None, ge=0)  # for all that this teacher was ever paid for these settings
    opens_thinking: bool = False
    sampling: Sampling
    client: Client = execution(Client())
    max_failed_share: float = execution(0.01, ge=0, le=1)

    @field_validator("base_url")
    @classmethod
    def _plain(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("a base_url starts with http:// or https://")
        if "@" in url or "?" in url:
            raise ValueError("a base_url holds no key: name the variable that does as 'key_variable'")
        return url.rstrip("/")


class RecordedTeacher(Settings):
    """Traces that exist already. Columns: prompt (as it was sent), completion (or reasoning, response), finish_reason,
    and question, where the prompt says more than the question."""

    kind: Literal["recorded"]
    name: str = execution()
    prompts: str = execution()
    source: Annotated[FileSource | HubSource, Field(discriminator="kind")]
    model: str  # who is said to have written them
    revision: str | None = None
    opens_thinking: bool = False


Teacher = Annotated[VllmTeacher | EndpointTeacher | RecordedTeacher, Field(discriminator="kind")]


def load_teacher(name: str, overrides: dict[str, Any] | None = None) -> VllmTeacher | EndpointTeacher | RecordedTeacher:
    """Read ``configs/teachers/<name>.yaml``; raises RequestError as ``config.load`` does."""
    return config.load("teachers", name, Teacher, overrides)
