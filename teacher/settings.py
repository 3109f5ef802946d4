"""Teachers as settings: a model that we serve with vLLM, somebody else's endpoint, or traces that exist already."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from r1distill.data import config
from r1distill.data.config import Settings, execution
from r1distill.data.models import ModelRef
from r1distill.data.sources import FileSource, HubSource


def plain_url(url: str) -> str:
    """A server's address without a key in it; raises ValueError for what is none."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("a base_url starts with http:// or https://")
    if "@" in url or "?" in url:
        raise ValueError("a base_url holds no key: name the variable that does as 'key_variable'")
    return url.rstrip("/")


class Drop(Settings):
    """An answer that was cut off at ``max_tokens`` stays cut off."""

    kind: Literal["drop"] = "drop"


class Continue(Settings):
    """It is sent back as the beginning of the answer, and goes on from there, once.

    R1's template deletes a thinking that has been closed: what was cut off after ``</think>`` vLLM refuses to go on
    with, and it stays cut off. DeepSeek's own service takes both parts.
    """

    kind: Literal["continue"]
    max_tokens: int = Field(gt=0)  # of the whole answer
    protocol: Literal["vllm", "deepseek"] = "vllm"  # how the server is told; DeepSeek's base_url then ends in /beta


class Raise(Settings):
    """It is asked for anew, once, with more room."""

    kind: Literal["raise"]
    max_tokens: int = Field(gt=0)


class Sampling(Settings):
    """How every answer is drawn: ``samples`` a prompt; with a ``seed`` repeatable, as far as the server can."""

    temperature: float = Field(0.6, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(gt=0)
    samples: int = Field(1, ge=1)
    seed: int | None = None
    truncated: Annotated[Drop | Continue | Raise, Field(discriminator="kind")] = Drop()

    @model_validator(mode="after")
    def _more(self) -> Sampling:
        if not isinstance(self.truncated, Drop) and self.truncated.max_tokens <= self.max_tokens:
            raise ValueError("truncated.max_tokens must be more than max_tokens: it is the room of the second attempt")
        return self

    def of_one(self) -> dict[str, Any]:
        """What decides one answer: neither more samples a prompt nor another policy ask again for those there are."""
        return self.model_dump(exclude={"samples", "truncated"})


class Client(Settings):
    """How the server is asked: it decides how long it takes and not what is answered.

    ``base_urls`` are servers of the teacher's very model, asked in place of its own ``base_url``, or of one that we
    would start; a request goes to the one with the fewest in flight.
    """

    base_urls: list[str] = []

    in_flight: int = Field(64, ge=1)  # requests at the server at any moment
    attempts: int = Field(6, ge=1)
    backoff_seconds: float = Field(1.0, ge=0)  # doubled at every attempt, up to a minute, with jitter
    timeout_seconds: float = Field(3600, gt=0)  # for one answer; also how long a rate limit is waited out
    down_seconds: float = Field(300, ge=0)  # how long nobody may be there to ask before the run stops
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)  # of questions and answers together

    @field_validator("base_urls")
    @classmethod
    def _plain(cls, urls: list[str]) -> list[str]:
        return [plain_url(url) for url in urls]


class VllmTeacher(Settings):
    """Weights that we serve with vLLM: on one node, on several over Ray, or on the CPU."""

    kind: Literal["vllm"]
    name: str = execution()
    prompts: str = execution()  # the set it is asked by default
    model: ModelRef
    served_name: str  # what the server calls it, and so the traces
    options: dict[str, Any] = execution({})  # vLLM's flags without their dashes
    environment: dict[str, str] = execution({})
    host: str = execution("127.0.0.1")  # where it listens; 0.0.0.0: for other machines too, all of which may then ask
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
        return plain_url(url)


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
