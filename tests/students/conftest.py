"""Small real parts: a word-level tokenizer with the base vocabularies' special tokens, tiny random models, datasets."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.data.settings import CHECKS
from r1distill.students.catalogue import Student

from . import own_answers

# Fixtures of test_beyond, test_rollouts and test_onpolicy.
prompts, checkpoint, student = own_answers.prompts, own_answers.checkpoint, own_answers.student
teacher, here = own_answers.teacher, own_answers.here

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

QWEN = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
]


def row(prompt_id: str, question: str, thinking: str | None, response: str, sample: int = 0) -> dict:
    """A row of the dataset."""
    return {
        "prompt_id": prompt_id,
        "sample": sample,
        "messages": [
            {"role": "user", "content": question, "thinking": None},
            {"role": "assistant", "content": response, "thinking": thinking},
        ],
        "domain": "math",
        "source": "test",
        "license": "mit",
        "completion_tokens": 1,
        "pass_rate": 1.0,
    }


def sums(count: int, start: int = 0) -> list[dict]:
    """Worked sums of several lengths."""
    return [
        row(f"p{n}", f"{n}+{n * 7}=?", "\n".join(f"{n}+{k}={n + k}" for k in range(n % 5)), f"\\boxed{{{n * 8}}}")
        for n in range(start, start + count)
    ]


def write_tokenizer(folder: Path, words: list[str], special: list[str], first: int) -> None:
    """A byte-level tokenizer with one merge: ``words`` and all bytes, then ``special`` tokens from id ``first`` on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = [*words, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    names += [f"<unused {number}>" for number in range(len(names), first)]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in [*words, *special]])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, model_type: str, vocabulary: int, **changes: object) -> None:
    """Two random layers of 32 dimensions with tied embeddings, in bf16; ``changes`` are of its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    }
    config = AutoConfig.for_model(model_type, **(shape | changes))
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., None]:
    """``write_model``, for shapes of a test's own."""
    return write_model


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer has ChatML's special tokens."""
    folder = tmp_path_factory.mktemp("tiny-base")
    write_tokenizer(folder, CHATML, [], 0)
    write_model(folder, "llama", 320)
    return folder


@pytest.fixture(scope="session")
def tiny_r1_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with Qwen2.5's special tokens at their ids."""
    folder = tmp_path_factory.mktemp("tiny-r1-base")
    write_tokenizer(folder, [], QWEN, 151643)
    write_model(folder, "qwen2", 151936)
    return folder


@pytest.fixture
def tiny_student(tiny_base: Path) -> Student:
    return Student.model_validate(
        {
            "name": "tiny",
            "base": {"kind": "folder", "path": str(tiny_base)},
            "template": "chatml",
            "architecture": {
                "model_type": "llama",
                "layers": 2,
                "hidden": 32,
                "ffn": 64,
                "heads": 2,
                "kv_heads": 1,
                "vocab": 320,
                "tied": True,
                "rope_theta": 10000,
                "max_position": 512,
                "rms_eps": 1e-6,
                "parameters": 25696,
            },
            "packs": {"context_tokens": 256},
            "sft": {
                "learning_rate": 1e-2,
                "epochs": 2,
                "batch_traces": 4,
                "precision": "float32",
                "launch": {"checkpointing": False},
                "save_steps": 2,
            },
            "benchmarks": ["arithmetic"],
            "teacher": "embedded",
            "publication": {
                "repository": "Tiny-R1",
                "dataset_repository": "Tiny-Traces",
                "license": "mit",
                "base_license": "apache-2.0",
            },
        }
    )


@pytest.fixture
def tiny_r1_student(tiny_student: Student, tiny_r1_base: Path) -> Student:
    """LoRA on a base whose tied embeddings are untied, as for qwen-1.5b."""
    shape = {"model_type": "qwen2", "vocab": 151936, "tied": False, "parameters": 1}
    whole = tiny_student.model_dump()
    changes = {
        "base": {"kind": "folder", "path": str(tiny_r1_base)},
        "template": "r1",
        "architecture": whole["architecture"] | shape,
        "sft": whole["sft"] | {"method": {"kind": "lora", "rank": 2, "alpha": 4}, "epochs": 1},
    }
    return Student.model_validate(whole | changes)


@pytest.fixture(scope="session")
def sums_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset artifact of 24 training and 4 validation rows."""
    folder = tmp_path_factory.mktemp("dataset")
    schema.write(folder / "train", schema.TRAINING_ROW, sums(24))
    schema.write(folder / "validation", schema.TRAINING_ROW, sums(4, start=50))
    schema.write_splits(folder, ["train", "validation"])
    return folder


QUESTIONS = 12
SCORED = {"accuracy": 0.7, "low": 0.6, "high": 0.8, "questions": 10, "k": 2, "truncated": 0.0, "mean_tokens": 40.0, "cons": 0.75, "looped": None,
          "size_bytes": 1_000_000, "runtime": "vllm", "seconds": 1.0}  # fmt: skip


def sealed(folder: Path, stage: str, **more: object) -> Path:
    """Give a folder the manifest of an artifact."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    manifest = {
        "stage": stage,
        "fingerprint": hashlib.sha256(stage.encode()).hexdigest(),
        **{"read": QUESTIONS, "kept": QUESTIONS, "rejected": {}, "unit": "rows", "metrics": {}},
        **{"identity": {"decides": {}}, "versions": {"torch": "2.13.0"}, "files": files},
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def traces_of_sums(licence: str = "mit") -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of prompts, traces and verdicts; every fourth trace is wrong."""
    prompts, traces, verdicts = [], [], []
    for number in range(QUESTIONS):
        key, question = f"p{number:03}", f"What is {number}+1?"
        prompts.append({"prompt_id": key, "question": question, "domain": "math", "reference_answer": str(number + 1),
                        "verifier": "math", "verifier_args": "{}", "source": "sums", "source_id": key,
                        "license": licence})  # fmt: skip
        traces.append({"prompt_id": key, "sample": 0, "teacher": "deepseek-r1", "teacher_revision": "1" * 40,
                       "sampling": "{}", "request_text": json.dumps([{"role": "user", "content": question}]),
                       "completion": "…", "reasoning": f"{number} and one.", "response": f"\\boxed{{{number + 1}}}",
                       "finish_reason": "stop", "state": "done", "error": None, "prompt_tokens": 9,
                       "reasoning_tokens": 5, "completion_tokens": 11, "seconds": 1.0, "cost_usd": None,
                       "created_at": "2026-01-01T00:00:00+00:00"})  # fmt: skip
        for check in CHECKS:
            wrong = check == "correctness" and number % 4 == 3
            verdicts.append({"prompt_id": key, "sample": 0, "check": check, "outcome": "fail" if wrong else "pass",
                             "reason": "another answer" if wrong else None, "detail": None, "version": "1"})  # fmt: skip
    return prompts, traces, verdicts


def build_dataset(home: Path, licence: str = "mit", **selection: object) -> dict[str, Path]:
    """Prompts, traces and verdicts on disk, and the dataset that the real stage makes of them."""
    from r1distill.data import dataset
    from r1distill.data.settings import Selection, VerdictSettings

    names = {"prompts": schema.PROMPT, "traces": schema.TRACE, "verdicts": schema.VERDICT}
    folders = {name: home / name / f"sums-{name}" for name in (*names, "dataset")}
    for (name, columns), rows in zip(names.items(), traces_of_sums(licence), strict=True):
        schema.write(folders[name], columns, rows)
        sealed(folders[name], name, identity={"decides": {"verdicts": {"required": list(CHECKS)}}})
    folders["dataset"].mkdir(parents=True)
    result = dataset.build(
        Selection.model_validate({"validation_share": 0.3, **selection}), VerdictSettings(),
        *(folders[name] for name in names), folders["dataset"], title="sums", lineage={"teacher": "r1"},
    )  # fmt: skip
    sealed(folders["dataset"], "dataset", read=result.read, kept=result.kept, rejected=result.rejected)
    return folders


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training leaves it: random weights in two shards, ChatML's tokenizer, generation settings."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from r1distill.students.template import TEMPLATES, write_tokenizer

    folder = tmp_path_factory.mktemp("finished")
    tokenizer = write_tokenizer(TEMPLATES["chatml"], tiny_base, folder, max_tokens=512)
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.from_pretrained(tiny_base)
    config.update(tokens)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, config=config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, **tokens)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "loss.json").write_text("[]")
    return folder


@pytest.fixture
def inputs(tmp_path: Path, finished: Path, publishing: Student) -> dict[str, Path]:
    """The artifacts that a publication reads, as the stages leave them under ``tmp_path/home``."""
    home = tmp_path / "home"
    folders = build_dataset(home)
    folders |= {stage: home / stage / f"tiny-{stage}" for stage in ("packs", "checkpoint", "variants", "scores")}
    shutil.copytree(finished, folders["checkpoint"])
    sealed(folders["checkpoint"], "checkpoint", metrics={"steps": 100})
    for number, name in enumerate(publishing.variants, 1):
        shutil.copytree(finished, folders["variants"] / name)
        for file in (folders["variants"] / name).glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + bytes([number]))
    sealed(folders["variants"], "variants", metrics={"int8": {"kind": "int8", "bytes": 1_000_000, "kl": 0.01}})
    for stage in ("packs", "scores"):
        folders[stage].mkdir(parents=True)
        sealed(folders[stage], stage)
    write_gates(folders, publishing)
    return folders


def write_gates(folders: dict[str, Path], student: Student, failed: str | None = None) -> None:
    models = dict.fromkeys(("base", "student", *student.variants), SCORED)
    gates = [
        {"name": "recovered accuracy", "model": name, "passed": name != failed, "message": "recovered accuracy: 50.0%"}
        for name in ("checkpoint", "reproduction", *student.variants)
    ]
    of_variant = {"memory_tokens": 512, "memory_bytes": 2_000_000, "tokens_per_second": 40.0, "recovered": 0.987}
    of_variant |= {"kind": "int8", "bytes": 1_000_000, "kl": 0.01, "note": ""}
    scores = {
        "variants": dict.fromkeys(student.variants, of_variant),
        "benchmarks": {
            "sums": {"title": "Sums", "settings": {"repo": "org/sums", "revision": "2" * 40}, "models": models}
        },
        "gates": gates,
    }
    (folders["scores"] / "scores.json").write_text(json.dumps(scores))


@pytest.fixture
def publishing(tiny_student: Student) -> Student:
    """The tiny student with two variants."""
    whole = tiny_student.model_dump()
    return Student.model_validate({**whole, "variants": {"int8": {"kind": "int8"}, "int8-b": {"kind": "int8"}}})


LINEAGE = {"student": "tiny", "base": "base", "base_revision": "1", "teacher": "r1", "prompts": "sums"}


Failing = Callable[[str | None], None]
LayOut = Callable[[Student], Path]


@pytest.fixture
def failing(inputs: dict[str, Path], publishing: Student) -> Failing:
    """Let the gate of one model have failed."""
    return lambda model: write_gates(inputs, publishing, model)


@pytest.fixture
def licensed(inputs: dict[str, Path], tmp_path: Path) -> Callable[[str], None]:
    """Have the dataset made from a source under another licence."""

    def again(licence: str) -> None:
        for stage in ("prompts", "traces", "verdicts", "dataset"):
            shutil.rmtree(tmp_path / "home" / stage)
        build_dataset(tmp_path / "home", licence)

    return again


@pytest.fixture
def lay_out(inputs: dict[str, Path], tmp_path: Path) -> LayOut:
    """Run the real stage for a student and seal what it made, under ``tmp_path/home``."""
    from r1distill.students import publish

    def again(student: Student) -> Path:
        out = tmp_path / "home" / "publication" / "tiny-00000000"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        result = publish.build(
            student, inputs, inputs.get("beyond", inputs["checkpoint"]), out, tmp_path / "home", lineage=LINEAGE
        )
        result.check("publication")
        decides = {"publication": student.identity()["publication"]}
        return sealed(out, "publication", identity={"decides": decides}, rejected=result.rejected)

    return again


@pytest.fixture
def publication(publishing: Student, lay_out: LayOut) -> Path:
    return lay_out(publishing)


@pytest.fixture
def changed(publishing: Student) -> Callable[..., Student]:
    """The student with other settings of its publication."""

    def student(**settings: object) -> Student:
        whole = publishing.model_dump()
        return Student.model_validate({**whole, "publication": {**whole["publication"], **settings}})

    return student
