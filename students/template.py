"""From messages to exact token ids and a loss mask, and the tokenizer that a student ships.

Training text is laid out here and never by a chat template: R1's own deletes the thinking. A training example is a
prefix, which ends in ``<think>\\n`` and is token for token what the shipped chat template gives as generation prompt,
and a target, which is what the student must learn to write: thinking, response, end token. Prefix and target are
tokenised apart, because a model that answers sees the prefix alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1distill.data.errors import RequestError
from r1distill.data.thinking import CLOSE, OPEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORE = -100  # the label that takes no loss
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "vocab.json", "merges.txt"]

Message = Mapping[str, str | None]


class Unusable(ValueError):
    """A row that can't become a training example; its text is the reason."""


@dataclass(frozen=True)
class Template:
    """How turns are laid out. ``renames`` maps token ids of a base vocabulary to (new name, special)."""

    bos: str
    system: tuple[str, str]  # what stands before and after the text
    user: tuple[str, str]
    assistant: str
    end: str  # the end token, which the student learns to write
    after_end: str  # between an assistant's turn and the next one
    pads: tuple[str, ...]  # the first that the vocabulary has; never the end token, or masking pads would mask the end
    renames: Mapping[str, Mapping[int, tuple[str, bool]]] = field(default_factory=dict)

    def prefix(self, messages: Sequence[Message]) -> str:
        """The text up to the assistant's answer, ``<think>\\n`` included; earlier turns are shown without thinking."""
        parts = [self.bos]
        for message in messages:
            role, text = message["role"], message["content"] or ""
            if role == "assistant":
                parts.append(self.assistant + text + self.end + self.after_end)
            elif role in ("system", "user"):
                before, after = self.system if role == "system" else self.user
                parts.append(before + text + after)
            else:
                raise Unusable(f"unknown role: {role}")
        return "".join(parts) + self.assistant + OPEN + "\n"

    def target(self, message: Message) -> str:
        """What follows the prefix: thinking (empty where there was none), response, end token."""
        return f"{message['thinking'] or ''}\n{CLOSE}\n\n{message['content'] or ''}{self.end}"

    def texts(self, messages: Sequence[Message]) -> tuple[str, str]:
        """(prefix, target) of a conversation whose last turn is the target.

        Raises Unusable for one without a target, or with control tokens inside its texts.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise Unusable("no assistant turn at the end")
        if not (messages[-1]["content"] or messages[-1]["thinking"]):
            raise Unusable("empty target")
        controls = self.controls
        for message in messages:
            for text in (message["content"], message["thinking"]):
                if text and any(mark in text for mark in controls):
                    raise Unusable("control token inside the text")
        return self.prefix(messages[:-1]), self.target(messages[-1])

    @property
    def controls(self) -> tuple[str, ...]:
        """The strings that structure a conversation and must not occur inside its texts."""
        user, assistant = self.user[0].split("\n")[0], self.assistant.split("\n")[0]
        turns = user.removesuffix("user"), assistant.removesuffix("assistant")
        marks = (self.bos, *turns, self.end, OPEN, CLOSE)
        return tuple(dict.fromkeys(mark for mark in marks if mark))

    def chat_template(self) -> str:
        """The Jinja template to ship: a last assistant turn keeps its ``thinking``, earlier ones lose theirs."""
        system, user = (" + message['content'] + ".join(map(_quote, pair)) for pair in (self.system, self.user))
        whole = f"{_quote(OPEN + chr(10))} + message['thinking'] + {_quote(chr(10) + CLOSE + chr(10) * 2)}"
        return (
            f"{{{{- {_quote(self.bos)} }}}}"
            "{%- for message in messages %}"
            f"{{%- if message['role'] == 'system' %}}{{{{- {system} }}}}"
            f"{{%- elif message['role'] == 'user' %}}{{{{- {user} }}}}"
            "{%- elif message['role'] == 'assistant' %}"
            f"{{{{- {_quote(self.assistant)} }}}}"
            "{%- if loop.last and message['thinking'] is defined and message['thinking'] is not none %}"
            f"{{{{- {whole} + message['content'] }}}}"
            f"{{%- else %}}{{{{- message['content'].split({_quote(CLOSE)})[-1].lstrip() }}}}{{%- endif %}}"
            f"{{{{- {_quote(self.end + self.after_end)} }}}}"
            "{%- endif %}{%- endfor %}"
            f"{{%- if add_generation_prompt %}}{{{{- {_quote(self.assistant + OPEN + chr(10))} }}}}{{%- endif %}}"
        )


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"

# The published students' tokens are renamed special tokens of the base, so no embedding is resized (FACTS: the ids are
# those of DeepSeek-R1-Distill-Qwen and -Llama). The published ones pad with the end token; ours don't.
TEMPLATES = {
    "r1": Template(
        bos=BOS,
        system=("", ""),
        user=(USER, ""),
        assistant=ASSISTANT,
        end=EOS,
        after_end="",
        pads=("<｜▁pad▁｜>", "<|vision_pad|>"),
        renames={
            "<|endoftext|>": {
                151643: (EOS, True),
                151644: (USER, False),
                151645: (ASSISTANT, False),
                151646: (BOS, True),
                151647: ("<|EOT|>", False),
                151648: (OPEN, False),
                151649: (CLOSE, False),
            },
            "<|begin_of_text|>": {
                128000: (BOS, True),
                128001: (EOS, True),
                128011: (USER, False),
                128012: (ASSISTANT, False),
                128013: (OPEN, False),
                128014: (CLOSE, False),
                128015: ("<｜▁pad▁｜>", True),
            },
        },
    ),
    "chatml": Template(
        bos="",  # ChatML opens with a turn's own mark
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant="<|im_start|>assistant\n",
        end="<|im_end|>",
        after_end="\n",
        pads=("<|endoftext|>",),
    ),
}


def encode(
    template: Template, tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of one conversation whose last turn is the target; labels are ``IGNORE`` on the prefix.

    Raises Unusable for a conversation without target, or with control tokens inside its texts.
    """
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in template.texts(messages))
    return before + after, [IGNORE] * len(before) + after


def renamed_rows(template: Template, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids whose names changed: their embedding rows mean something new and have to be trained."""
    known = {added.content for added in tokenizer.added_tokens_decoder.values()}
    for table in template.renames.values():
        if all(name in known for name, _ in table.values()):
            return sorted(table)
    return []


def write_tokenizer(template: Template, base: Path, out: Path, *, max_tokens: int) -> PreTrainedTokenizerFast:
    """Write the base's tokenizer to ``out`` with the template's names, end, pad and chat template, and load it.

    The chat template alone writes the BOS: a post-processor that added another would give two.
    Raises RequestError where ``base`` has no such vocabulary.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = base / "tokenizer.json"
    if not file.is_file():
        raise RequestError(f"{base} has no tokenizer.json; a student's base needs a fast tokenizer.")
    spec = _renamed(template, json.loads(file.read_text(encoding="utf-8")), file)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    names = {added["content"] for added in spec["added_tokens"]}
    pad = next((name for name in template.pads if name in names), None)
    if template.end not in names or pad is None:
        raise RequestError(
            f"{file} lacks {template.end} or one of {', '.join(template.pads)}; this template needs both."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(out / "tokenizer.json"),
        bos_token=template.bos or None,
        eos_token=template.end,
        pad_token=pad,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
        chat_template=template.chat_template(),
    )
    tokenizer.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that older readers don't know
    config["add_bos_token"] = False  # llama.cpp adds one to Llama's vocabulary unless it is told not to
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(out)
    return loaded


def _renamed(template: Template, spec: dict[str, Any], file: Path) -> dict[str, Any]:
    """A tokenizer.json with the template's names in place of the base's, and without a BOS of its own."""
    names = {added["content"]: added["id"] for added in spec["added_tokens"]}
    if template.renames:
        tables = [table for mark, table in template.renames.items() if names.get(mark) in table]
        if not tables and not all(name in names for name in template.controls):
            known = " or ".join(template.renames)
            raise RequestError(f"{file} is none of the vocabularies that this template renames (they have {known}).")
        for added in spec["added_tokens"] if tables else []:
            if added["id"] in tables[0]:
                added["content"], added["special"] = tables[0][added["id"]]
                added["normalized"] = added["lstrip"] = added["rstrip"] = False
    spec["post_processor"] = _without_bos(spec.get("post_processor"))
    return spec


def _without_bos(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor and processor["type"] == "Sequence":
        kept = [part for part in processor["processors"] if part["type"] != "TemplateProcessing"]
        return {**processor, "processors": kept} if kept else None
    return None if processor and processor["type"] == "TemplateProcessing" else processor
