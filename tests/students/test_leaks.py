"""Keys, tokens and paths are found in whatever form a file has, and plain text is not taken for them."""

from __future__ import annotations

import json
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1distill.data.errors import R1DistillError
from r1distill.students.inventory import Entry
from r1distill.students.leaks import Leaks

TOKEN = "hf_" + "aB3" * 12


@pytest.fixture
def check(tmp_path):
    """Whether a file of this name and content may go out."""

    def found(name: str, content: bytes, **more) -> None:
        (tmp_path / name).write_bytes(content)
        Leaks(tmp_path / "home", **more).check(tmp_path, [Entry(name, len(content), "")])

    return found


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        "key: sk-" + "a1b2" * 8,
        "sk-proj-" + "A1_b-" * 8,
        "ghp_" + "a1" * 18,
        "AKIA" + "ABCD" * 4,
        "AIza" + "x" * 35,
        "-----BEGIN RSA PRIVATE KEY-----",
        '{"_name_or_path": "/home/somebody/models/base"}',
        "see /tmp/run/out.log",
        "base at (/workspace/models)",
        "/root/x",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "notes", "Modelfile.weird", "README.md"])
def test_keys_and_paths_are_found_in_text_of_any_name(check, text, name):
    with pytest.raises(R1DistillError, match=f"{name} holds"):
        check(name, b"x" * 5000 + b"\n" + text.encode() + b"\n")


@pytest.mark.parametrize(
    "text",
    [
        "a task-specific-fine-tuning-of-2-models and risk-averse-agents-of-2024-and-later",
        "https://example.org/home/user/x and example.org/tmp/file",
        "./data/train.jsonl and ../home/x/y and and/or/tmp/x",
        "sk-oriented-words-with-dashes-alone",
        "hf_short and hf_hub_download_a_long_name_of_a_function",
        "/usr/bin/env python",
    ],
)
def test_plain_text_is_no_leak(check, text):
    check("notes.txt", text.encode())


def test_a_token_across_the_edge_of_a_chunk_is_found(check, monkeypatch):
    monkeypatch.setattr("r1distill.students.leaks.CHUNK", 1 << 16)
    with pytest.raises(R1DistillError, match="key or token"):
        check("big.txt", b" " * ((1 << 16) - 10) + TOKEN.encode())


def test_a_secret_of_this_environment_is_found_by_its_value(check, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    with pytest.raises(R1DistillError, match="environment variable SOME_API_KEY") as refused:
        check("scores.json", b'{"note": "correct-horse-battery"}')
    assert "correct-horse" not in str(refused.value)


def test_a_message_never_shows_the_key(check):
    with pytest.raises(R1DistillError) as refused:
        check("config.json", TOKEN.encode())
    assert TOKEN[:10] not in str(refused.value)


def test_of_weights_the_header_is_read(check):
    header = json.dumps({"__metadata__": {"made by": TOKEN}}).encode()
    with pytest.raises(R1DistillError, match="key or token"):
        check("model.safetensors", struct.pack("<Q", len(header)) + header)
    header = json.dumps({"x": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]}}).encode()
    check("model.safetensors", struct.pack("<Q", len(header)) + header + TOKEN.encode())  # numbers that look like one


def test_of_gguf_what_stands_before_the_tensors_is_read(tmp_path):
    import numpy as np
    from gguf import GGUFWriter

    for name, author, wanted in (("fine.gguf", "somebody", False), ("leak.gguf", TOKEN, True)):
        writer = GGUFWriter(tmp_path / name, "llama")
        writer.add_author(author)
        writer.add_tensor("x", np.frombuffer(TOKEN.encode() * 8, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if wanted:
            with pytest.raises(R1DistillError, match="leak.gguf holds what looks like a key"):
                Leaks(tmp_path / "home").check(tmp_path, [Entry(name, 0, "")])
        else:
            Leaks(tmp_path / "home").check(tmp_path, [Entry(name, 0, "")])


def test_a_row_of_a_table_is_named(tmp_path):
    messages = [[{"role": "user", "content": f"question {n}, see /tmp/x/y"}] for n in range(3000)]
    messages[2500].append({"role": "assistant", "content": f"use {TOKEN} for it"})
    table = pa.table({"prompt_id": [f"p{n}" for n in range(3000)], "messages": messages})
    pq.write_table(table, tmp_path / "train.parquet", compression="zstd")
    with pytest.raises(R1DistillError, match=r"train.parquet, row 2500 \(prompt p2500\), holds what looks like a key"):
        Leaks(tmp_path / "home").check(tmp_path, [Entry("train.parquet", 0, "")])
    Leaks(tmp_path / "home", harmless=[TOKEN]).check(tmp_path, [Entry("train.parquet", 0, "")])


def test_the_runs_own_folder_is_no_part_of_a_table_either(tmp_path):
    text = [f"loaded from {tmp_path}/home/checkpoint/x"]
    pq.write_table(pa.table({"prompt_id": ["p"], "text": text}), tmp_path / "train.parquet")
    with pytest.raises(R1DistillError, match="a path of this machine"):
        Leaks(tmp_path / "home").check(tmp_path, [Entry("train.parquet", 0, "")])
