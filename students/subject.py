"""A student beside the files that it ships, as the preflight looks at them; and reading files that may be damaged.

Ids are those of DeepSeek-R1-Distill-Qwen and -Llama.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data.config import load, names
from r1distill.data.errors import RequestError
from r1distill.data.thinking import CLOSE, OPEN
from r1distill.students import tensors
from r1distill.students.catalogue import Architecture, Student
from r1distill.students.template import ASSISTANT, BOS, EOS, TEMPLATES, USER, Message, Template, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
CONFIG, CHAT, ADAPTER = "config.json", "chat_template.jinja", "adapter/adapter_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """A base vocabulary after the published renaming."""

    tokens: Mapping[str, int]
    size: int  # tokens, the renamed included; the embedding has more rows
    probe: tuple[int, ...]  # the ids of PROBE


NAMES = (BOS, EOS, USER, ASSISTANT, OPEN, CLOSE)
PROBE = "Don't add 12345  to X²:\n\n\tdef f(x): return naïve, 数学 🙂  \n"
# fmt: off
VOCABULARIES = {
    "qwen2": Vocabulary(
        dict(zip(NAMES, (151646, 151643, 151644, 151645, 151648, 151649), strict=True)),
        151665,
        (8002, 944, 912, 220, 16, 17, 18, 19, 20, 220, 311, 1599, 29456, 1447, 7452, 282, 2075, 1648, 470,
         94880, 586, 11, 47685, 47764, 27484, 2303),
    ),
    "llama": Vocabulary(
        dict(zip(NAMES, (128000, 128001, 128011, 128012, 128013, 128014), strict=True)),
        128256,
        (8161, 956, 923, 220, 4513, 1774, 220, 311, 1630, 30556, 1473, 7604, 282, 2120, 1680, 471, 95980,
         588, 11, 48785, 48864, 28584, 2355),
    ),
}
# fmt: on

# What the checks write and read: spaces, tabs, code, blank lines, digits and letters of several alphabets.
SYSTEM: Message = {"role": "system", "content": "Answer in English.", "thinking": None}
QUESTION: Message = {"role": "user", "content": "What is 3 × (17 + 4)?\nBox it: \\boxed{}.", "thinking": None}
THINKING = (
    "Okay, 17 + 4 = 21.\n\nWait, don't  rush: 3 · 21 = 63.\n\n```python\ndef f(x):\n\treturn 3 * (x + 4)\n```\n\n"
    "    ∑ 1/n² ≈ 1.644934, naïve, 数学, 🙂\nSo f(17) → 63."
)
ANSWER: Message = {
    "role": "assistant",
    "content": "**63**, since\n\n- 3 × 21 = 63\n\n\\boxed{63}",
    "thinking": THINKING,
}


@dataclass(frozen=True)
class Subject:
    """A student beside a folder with its tokenizer and, where they are there, its settings and weights."""

    student: Student
    folder: Path
    tokenizer: PreTrainedTokenizerFast

    @property
    def template(self) -> Template:
        return TEMPLATES[self.student.template]

    @property
    def shape(self) -> Architecture:
        return self.student.architecture

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The published one, where the student's is."""
        return VOCABULARIES[self.shape.model_type] if self.template.renames else None

    @cached_property
    def spec(self) -> dict[str, Any]:
        return read_json(self.folder / TOKENIZER)

    def settings(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None where it has none."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else None

    @property
    def chat(self) -> str:
        """The file that holds the chat template."""
        return CHAT if (self.folder / CHAT).is_file() else SETTINGS

    @cached_property
    def published(self) -> Architecture | None:
        """The architecture that this project's own file of the student, or of its base, gives."""
        files = [load("students", name, Student) for name in names("students")]
        same = [one for one in files if one.name == self.student.name] or [
            one for one in files if one.base == self.student.base
        ]
        return same[0].architecture if same else None

    @cached_property
    def example(self) -> tuple[list[int], list[int]]:
        """(input_ids, labels) of a training example, made as the packs are."""
        return encode(self.template, self.tokenizer, [QUESTION, ANSWER])

    def plain(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def rendered(self, messages: Sequence[Message], *, prompt: bool) -> tuple[str, list[int]]:
        """The text of the shipped chat template, and the ids that transformers makes of it in one go."""
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        told: dict[str, Any] = {"add_generation_prompt": prompt}
        text = self.tokenizer.apply_chat_template(given, tokenize=False, **told)
        return str(text), list(self.tokenizer.apply_chat_template(given, tokenize=True, return_dict=False, **told))


def is_finished(student: Student, folder: Path, spec: dict[str, Any]) -> bool:
    """Whether a folder holds a finished student's tokenizer, and not its base's: it speaks of thinking."""
    texts = [file.read_text("utf-8") for name in (CHAT, SETTINGS) if (file := folder / name).is_file()]
    names = {added["content"] for added in spec["added_tokens"]}
    template = TEMPLATES[student.template]
    return any(CLOSE in text for text in texts) or (bool(template.renames) and names.issuperset(template.controls))


def has_vocabulary(student: Student, folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` has ids where the student's special tokens are."""
    vocabulary = VOCABULARIES[student.architecture.model_type] if TEMPLATES[student.template].renames else None
    with unpacked(folder) as files:
        ids = {added["id"] for added in refuse_damaged(files)["added_tokens"]}
    return vocabulary is None or ids.issuperset(vocabulary.tokens.values())


@contextmanager
def unpacked(folder: Path) -> Iterator[Path]:
    """The folder, or where its tokenizer.json is gzipped, a copy of its small files with that one unpacked."""
    packed = folder / (TOKENIZER + ".gz")
    if (folder / TOKENIZER).is_file() or not packed.is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for file in folder.iterdir():
            if file.suffix in (".json", ".jinja"):
                shutil.copyfile(file, Path(made) / file.name)
        try:
            (Path(made) / TOKENIZER).write_bytes(gzip.decompress(packed.read_bytes()))
        except (OSError, EOFError, zlib.error) as error:
            raise RequestError(damaged(packed, error)) from None
        yield Path(made)


def damaged(file: Path, error: object) -> str:
    return f"{file} is damaged, or no tokenizer of this kind ({error}). Fetch it again from where it came."


def read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RequestError(damaged(file, error)) from None
    if not isinstance(value, dict):
        raise RequestError(damaged(file, f"it holds a {type(value).__name__}, not a mapping"))
    return value


def refuse_damaged(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer.json; raises RequestError where there is none, or one without what every one has."""
    file = folder / TOKENIZER
    if not file.is_file():
        raise RequestError(
            f"{folder} has no {TOKENIZER}. Pass the folder of the base's tokenizer, or of a finished student: "
            "--tokenizer DIR"
        )
    spec = read_json(file)
    added, vocabulary = spec.get("added_tokens"), (spec.get("model") or {}).get("vocab")
    if not (isinstance(added, list) and isinstance(vocabulary, dict) and vocabulary):
        raise RequestError(damaged(file, "it has no added_tokens, or no vocabulary"))
    if wrong := [entry for entry in added if not {"id", "content", "special"} <= set(entry)]:
        raise RequestError(damaged(file, f"an added token reads {json.dumps(wrong[0])}"))
    return spec


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    """As a user loads it; raises RequestError where that fails."""
    from transformers import AutoTokenizer

    try:
        loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library has no exception of its own
        raise RequestError(damaged(folder / TOKENIZER, error)) from None
    return loaded


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder's safetensors files; raises RequestError where one is damaged."""
    try:
        return tensors.shapes(folder)
    except ValueError as error:
        raise RequestError(damaged(folder, error)) from None
