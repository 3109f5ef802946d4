"""tiktoken gives a student's exact ids, for the tokenizers that it can stand in for, and stands aside for the others."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import pytest

from r1distill.data.config import ROOT
from r1distill.students import bpe
from r1distill.students.template import TEMPLATES, write_tokenizer

TOKENIZERS = ROOT / ".." / "shared" / "data" / "tokenizers"
MARK = "\n__ggml_vocab_test__\n"


def loaded(name: str, folder: Path):
    source = TOKENIZERS / name / "tokenizer.json.gz"
    if not source.is_file():
        pytest.skip("needs the tokenizers in ../shared/data")
    (folder / "base").mkdir()
    (folder / "base" / "tokenizer.json").write_bytes(gzip.decompress(source.read_bytes()))
    return write_tokenizer(TEMPLATES["r1"], folder / "base", folder / "out", max_tokens=32768)


def texts() -> list[str]:
    """Golden inputs, strange Unicode (composed and not), whitespace, control tokens, and random characters."""
    golden = [part for file in sorted((TOKENIZERS / "golden").glob("*.inp")) for part in file.read_text().split(MARK)]
    rng = random.Random(0)
    ranges = [(32, 126), (160, 591), (768, 879), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (9, 13), (0x0900, 0x097F)]
    noise = ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(80))) for _ in range(400)]
    marks = ["<think>\nSo.\n</think>\n\n42", "a<｜end▁of▁sentence｜>b", "<｜User｜>hi<｜Assistant｜>", "<|im_start|>x"]
    odd = ["e\u0301 é ﬁ \u212b", "\r\n\r\n \t x", " " * 300 + "x", "1234567 12 3", "I'LL we've DON'T", "ſ'ſ"]
    return [*golden, *noise, *marks, *odd, ""]


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.1"])
def test_the_ids_are_the_tokenizers_own(name: str, tmp_path: Path) -> None:
    tokenizer = loaded(name, tmp_path)
    fast = bpe.encoder(tokenizer)
    assert fast is not None
    for text in texts():
        assert fast(text).tolist() == tokenizer.encode(text, add_special_tokens=False), repr(text)


def test_another_kind_of_tokenizer_is_left_to_itself(tiny_student, tmp_path: Path) -> None:
    base = Path(tiny_student.base.path)
    assert bpe.encoder(write_tokenizer(TEMPLATES["chatml"], base, tmp_path, max_tokens=512)) is None
