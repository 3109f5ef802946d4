"""What a student is: base and architecture, and how it is packed, trained, quantised, gated and published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from r1distill.data.config import Settings, execution
from r1distill.data.models import ModelRef
from r1distill.data.settings import CheckName
from r1distill.data.sources import FileSource, HubSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Llama3Scaling(Settings):
    """Llama 3.1's stretching of the rotary frequencies; the field names are those of transformers."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Architecture(Settings):
    """The student's shape as it is published; ``parameters`` is the published count."""

    model_type: Literal["qwen2", "llama"]
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    ffn: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    vocab: int = Field(gt=0)
    tied: bool  # input and output embedding are one matrix
    rope_theta: float = Field(gt=0)
    rope_scaling: Llama3Scaling | None = None
    max_position: int = Field(gt=0)
    rms_eps: float
    parameters: int = Field(gt=0)

    def training_flops(self, tokens: float, squares: float, *, frozen: bool) -> float:
        """Floating-point operations of training on ``tokens`` whose traces' squared lengths sum to ``squares``.

        6 a parameter and token (4 where the base is ``frozen``: no gradient of its weights) and 6 x layers x hidden x
        squares for causal attention (PaLM, arXiv 2204.02311, appendix B, halved for the mask; packed traces attend to
        themselves alone). Recomputation does not count.
        """
        return (4 if frozen else 6) * self.parameters * tokens + 6 * self.layers * self.hidden * squares

    def to_config(self) -> PretrainedConfig:
        """The transformers configuration of this shape."""
        from transformers import AutoConfig

        rope = self.rope_scaling.model_dump() if self.rope_scaling else {"rope_type": "default"}
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            rope_parameters={**rope, "rope_theta": self.rope_theta},
            max_position_embeddings=self.max_position,
            rms_norm_eps=self.rms_eps,
        )


class Packs(Settings):
    """How traces become packs of token ids. A trace that is longer than the context is never cut, since what it would
    lose is its answer: it is rejected and counted, or nothing is packed."""

    context_tokens: int = Field(gt=0)
    overlong: Literal["drop", "refuse"] = "drop"


class FullMethod(Settings):
    """Every weight is trained."""

    kind: Literal["full"]


class Adapter(Settings):
    """Low-rank updates of all linear layers, and the rows of the renamed tokens in both embeddings."""

    rank: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    train_renamed_rows: bool = True  # the rows behind <think> were never trained: left alone they are noise


class LoraMethod(Adapter):
    """An adapter on the base as it is."""

    kind: Literal["lora"]


class QloraMethod(Adapter):
    """An adapter on the base in 4 bits (NF4 with double quantisation; arXiv:2305.14314)."""

    kind: Literal["qlora"]


Method = Annotated[FullMethod | LoraMethod | QloraMethod, Field(discriminator="kind")]

# transformers' names; ``varlen`` is ours, over torch's own variable-length flash attention.
Attention = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"]


class Launch(Settings):
    """What the user wants of the training's layout; what is left out is chosen for the hardware (``layout.Layout``)."""

    strategy: Literal["auto", "one", "ddp", "fsdp2", "zero3"] = "auto"
    nodes: int | None = Field(None, ge=1)
    processes_per_node: int | None = Field(None, ge=1)
    sequence_parallel: int | None = Field(None, ge=1)
    packs_per_batch: int | None = Field(None, ge=1)  # packs that a process computes at once
    checkpointing: bool | None = None
    offload_activations: bool | None = None
    attention: Attention | None = None
    liger: bool | None = None  # Liger's kernels; null: on GPUs
    port: int | None = None
    options: dict[str, str | int | bool] = Field({})  # further options of `accelerate launch`


class Sft(Settings):
    """Supervised fine-tuning: AdamW, linear warm-up, cosine to ``min_lr_ratio`` of the initial rate."""

    method: Method = FullMethod(kind="full")
    learning_rate: float = Field(gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    epochs: float = Field(gt=0, le=1000)
    batch_traces: int = Field(gt=0)  # traces a step on average; the packs a step follow from how the packs were filled
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["bf16_autocast", "float32"] = "bf16_autocast"  # master weights are float32 in both
    seed: int = 0
    save_steps: int = execution(50, gt=0)
    tracking: Literal["trackio", "wandb", "tensorboard"] | None = execution(None)
    launch: Launch = execution(Launch())


class Distill(Settings):
    """Learning from the probabilities of a teacher that has the student's own vocabulary, and not from text alone.

    ``topk_kl``: forward KL to the teacher's ``k`` most probable tokens of every label, plus cross-entropy. ``tail``
    says what becomes of the rest of its mass, see ``kernels/README.md``.
    """

    kind: Literal["topk_kl"]
    teacher: ModelRef
    k: int = Field(64, gt=0, le=1024)
    temperature: float = Field(1.0, gt=0)
    kl_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.1, ge=0)
    tail: Literal["bucket", "renormalise"] = "bucket"

    @property
    def bytes_per_token(self) -> int:
        """On disk: 5 bytes an entry, and 2 for the label's own log-probability."""
        return 5 * self.k + 2

    @staticmethod
    def largest_k(bytes_per_token: float) -> int:
        """The largest k whose tokens take no more than that; 0 where there is none."""
        return max(0, min(1024, int((bytes_per_token - 2) // 5)))


class _Beyond(Settings):
    """Learning from answers of its own, from where the training on traces ended; with its method, precision and launch.

    Every step samples answers to ``prompts_per_step`` of the run's prompts and learns from them once.
    """

    steps: int = Field(gt=0)
    prompts_per_step: int = Field(32, gt=0)  # DeepSeek-R1-Zero's, arXiv 2501.12948
    max_completion_tokens: int | None = Field(None, gt=0)  # null: what the longest prompt leaves of the context
    temperature: float = Field(1.0, gt=0)  # of the sampling and of the loss; R1-Zero's
    learning_rate: float = Field(1e-6, gt=0)  # constant; TRL's
    seed: int = 0
    save_steps: int = execution(50, gt=0)
    rollouts: Literal["transformers", "vllm"] = execution("transformers")  # who samples; vLLM shares the GPUs

    @property
    def group(self) -> int:
        """Answers to one prompt."""
        return 1

    @property
    def answers_per_step(self) -> int:
        return self.prompts_per_step * self.group


class Grpo(_Beyond):
    """Each prompt is answered ``group_size`` times; an answer is worth by how much its reward, the weighted sum of the
    checks that it passes, is over its group's mean (arXiv 2402.03300). Only prompts that a rule can judge are asked."""

    kind: Literal["grpo"]
    group_size: int = Field(16, ge=2)  # R1-Zero's
    learning_rate: float = Field(3e-6, gt=0)  # R1-Zero's
    rewards: dict[CheckName, float] = Field({"correctness": 1.0, "format": 1.0}, min_length=1)  # R1-Zero's two

    @property
    def group(self) -> int:
        return self.group_size


class OnPolicy(_Beyond):
    """Each prompt is answered once; every token is drawn to the probabilities of a teacher of the student's own
    vocabulary: ``beta`` 0 is KL(teacher || student), 1 is KL(student || teacher), between them the generalised
    Jensen-Shannon divergence (arXiv 2306.13649)."""

    kind: Literal["on_policy"]
    teacher: ModelRef
    beta: float = Field(1.0, ge=0, le=1)  # TRL's


Beyond = Annotated[Grpo | OnPolicy, Field(discriminator="kind")]


class VariantGate(Settings):
    """What a variant must keep of the checkpoint, on the same questions and held-out traces, or it is withheld."""

    min_recovered: float = Field(0.97, ge=0)  # its accuracy / the checkpoint's
    max_truncation_rise: float = Field(0.02, ge=0)  # its truncation rate - the checkpoint's
    max_loop_rise: float = Field(0.02, ge=0)  # its rate of answers that go round in circles - the checkpoint's
    max_kl: float | None = Field(0.1, ge=0)  # mean KL divergence of the next token from the checkpoint's, nats


class _Variant(Settings):
    gate: VariantGate = VariantGate()
    tuning_steps: int = Field(0, ge=0)  # AutoRound's steps a block; 0 rounds to nearest (minutes instead of hours)
    calibration_traces: int = Field(512, gt=0)  # spread over the training split
    calibration_tokens: int = Field(8192, gt=0)  # of one piece; a longer trace gives several
    calibration_pieces: int = Field(64, gt=0)
    kl_tokens: int = Field(4096, ge=0)  # of held-out traces that the divergence is measured on; 0: not measured

    @property
    def calibrated(self) -> bool:
        """Whether its numbers depend on calibration text; rounding to nearest reads none."""
        return self.tuning_steps > 0


class GgufVariant(_Variant):
    """A file for llama.cpp. With ``importance``, scales are searched so as to err least where the calibration's
    activations are large (an importance matrix)."""

    kind: Literal["gguf"]
    scheme: Literal["q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"] = "q4_k_m"
    importance: bool = True

    @property
    def weighted(self) -> bool:
        """Whether an importance matrix is gathered: only the formats with blocks in blocks have a use for it."""
        return self.importance and "_k" in self.scheme and self.tuning_steps == 0

    @property
    def calibrated(self) -> bool:
        return self.weighted or super().calibrated


class GptqVariant(_Variant):
    """Weights of ``bits`` bits in groups, symmetric, in GPTQ's file format; AutoRound tunes their rounding."""

    kind: Literal["gptq"]
    bits: Literal[4, 8] = 4
    group_size: int = 128
    tuning_steps: int = Field(200, ge=0)


class AwqVariant(_Variant):
    """4-bit weights in groups, asymmetric, scaled by how large their inputs are (AWQ), in AWQ's file format."""

    kind: Literal["awq"]
    group_size: int = 128

    @property
    def calibrated(self) -> bool:
        return True


class Int8Variant(_Variant):
    """8-bit weights (a scale a channel) and activations (a scale a token), in compressed-tensors' format."""

    kind: Literal["int8"]


class Fp8Variant(_Variant):
    """8-bit floating-point weights and activations, in compressed-tensors' format; needs a GPU to serve.

    ``block``: a scale for 128 x 128 weights, as R1's own, and one for 128 activations of a token. ``channel``: a scale
    a channel, and one that calibration found for all activations of a layer.
    """

    kind: Literal["fp8"]
    scheme: Literal["channel", "block"] = "block"

    @property
    def calibrated(self) -> bool:
        return self.scheme == "channel" or super().calibrated


Variant = Annotated[
    GgufVariant | GptqVariant | AwqVariant | Int8Variant | Fp8Variant,
    Field(discriminator="kind"),
]

# What a student's file can ask for by name alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "q8_0": {"kind": "gguf", "scheme": "q8_0"},
    "q6_k": {"kind": "gguf", "scheme": "q6_k"},
    "q5_k_m": {"kind": "gguf", "scheme": "q5_k_m"},
    "q4_k_m": {"kind": "gguf", "scheme": "q4_k_m"},
    "gptq-4bit": {"kind": "gptq"},
    "awq-4bit": {"kind": "awq"},
    "int8": {"kind": "int8"},
    "fp8-block": {"kind": "fp8", "scheme": "block"},
    "fp8": {"kind": "fp8", "scheme": "channel"},
}


class Gate(Settings):
    """What the checkpoint must reach, or nothing is published; null asks for nothing."""

    min_gain: float | None = None  # accuracy over its base
    min_share_of_teacher: float | None = None


class Twin(Settings):
    """The published checkpoint of the same size: scored before the student's own scores count.

    ``recorded`` is a run of it that exists already: rows with question, completion (or reasoning, response) and
    finish_reason, several for a question.
    """

    repo: str
    revision: str = "main"
    recorded: Annotated[FileSource | HubSource, Field(discriminator="kind")] | None = None


ROLES = ("base", "teacher", "twin", "student", "checkpoint")  # names that scores and gates give to others
REPOSITORY = r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$"  # [owner/]name


class Publication(Settings):
    """Where it goes and under which terms. A repository without an owner goes to the uploading account."""

    repository: str = Field(pattern=REPOSITORY)
    dataset_repository: str = Field(pattern=REPOSITORY)
    license: str  # an identifier of the Hub, as the two below
    base_license: str
    teacher_license: str = "mit"  # under which the traces' author is; DeepSeek-R1's
    notice: str | None = None  # what the base's licence asks to be shown
    rejected_traces: bool = False  # as a second configuration of the dataset, with the reason against each
    accept_licences: tuple[str, ...] = ()  # of sources: those that stand against publishing, and that you may publish
    harmless: tuple[str, ...] = ()  # whole texts that look like keys or paths and are none
    collection: str = Field("R1 Distill", min_length=1, max_length=60)  # what ties model and dataset together

    @model_validator(mode="after")
    def _llama(self) -> Publication:
        """Section 1.b.i of Llama's licences: the name begins with Llama, and "Built with Llama" is displayed."""
        if self.base_license.startswith("llama"):
            if not self.repository.split("/")[-1].startswith("Llama"):
                raise ValueError(f"the licence {self.base_license} wants a repository whose name begins with 'Llama'")
            if self.notice != "Built with Llama":
                raise ValueError(f"the licence {self.base_license} wants the notice 'Built with Llama'")
        return self


class Student(Settings):
    """One student; ``configs/students/<name>.yaml``."""

    name: str = execution()
    base: ModelRef
    template: Literal["r1", "chatml"]
    architecture: Architecture
    packs: Packs
    sft: Sft
    distill: Distill | None = None  # null: from text alone, as DeepSeek's students
    beyond: Beyond | None = None  # null: it ends with the training on traces, as DeepSeek's students
    variants: dict[str, Variant] = Field({})
    gate: Gate = Gate()
    twin: Twin | None = None  # null: nobody has published one
    benchmarks: list[str] = Field(min_length=1)
    publication: Publication
    teacher: str = execution()
    score_teacher: bool = True
    variant_questions: int | None = Field(None, gt=0)  # of each benchmark, that a variant gets; null: all of them
    variant_samples: int | None = Field(None, gt=0)  # of each question, that a variant gives; null: the benchmark's k
    serve_options: dict[str, Any] = execution({})

    @model_validator(mode="before")
    @classmethod
    def _on_policy(cls, values: Any) -> Any:
        """``distill: {kind: on_policy}`` is another way to write ``beyond: {kind: on_policy}``."""
        distill = values.get("distill") if isinstance(values, dict) else None
        if not isinstance(distill, dict) or distill.get("kind") != "on_policy":
            return values
        if values.get("beyond") is not None:
            raise ValueError("distill with kind on_policy is the same as beyond: give one of the two")
        return {**values, "distill": None, "beyond": distill}

    @field_validator("variants", mode="before")
    @classmethod
    def _by_name(cls, variants: Any) -> Any:
        """A name alone, or a name with changes, stands for a known variant."""
        if not isinstance(variants, dict):
            return variants
        return {
            name: {**VARIANTS[name], **(one or {})}
            if name in VARIANTS and (one is None or (isinstance(one, dict) and "kind" not in one))
            else one
            for name, one in variants.items()
        }

    @model_validator(mode="after")
    def _consistent(self) -> Student:
        shape = self.architecture
        if self.packs.context_tokens > shape.max_position:
            raise ValueError(f"packs.context_tokens is over the architecture's max_position ({shape.max_position})")
        if self.distill and (self.sft.launch.sequence_parallel or 1) > 1:
            raise ValueError("'distill' and sft.launch.sequence_parallel over 1 don't go together: leave one out")
        for name, variant in self.variants.items():
            group = getattr(variant, "group_size", 1)
            if isinstance(variant, Fp8Variant) and variant.scheme == "block":
                group = 128
            sizes = [shape.hidden, shape.ffn]
            if isinstance(variant, Fp8Variant):
                sizes.append(shape.hidden // shape.heads * shape.kv_heads)
            if any(size % group for size in sizes):
                raise ValueError(f"variants.{name}: groups of {group} must divide {', '.join(map(str, sizes))}")
            if not name.replace("-", "").replace("_", "").isalnum() or name in ROLES:
                raise ValueError(
                    f"variants.{name}: a variant's name is letters, digits, - and _, and not a model's role"
                )
        return self
