"""Small real parts: a word-level tokenizer with the base vocabularies' special tokens, tiny random models, datasets."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1distill.data import schema
from r1distill.students.catalogue import Student

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
    """A byte-level tokenizer without merges: ``words`` and all bytes, then ``special`` tokens from id ``first`` on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names = [*words, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<unused {number}>" for number in range(len(names), first)]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in [*words, *special]])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, model_type: str, vocabulary: int) -> None:
    """Two random layers of 32 dimensions with tied embeddings, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


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
