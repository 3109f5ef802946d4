"""How a variant is run by those who download it: an Ollama Modelfile, a vLLM command line.

Ollama lays conversations out with a template of its own kind (Go's), so the student's layout is said once more in it; a
test holds it to the chat template that the student ships.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from r1distill.data.thinking import OPEN
from r1distill.students.base import SAMPLING
from r1distill.students.catalogue import GgufVariant, Student
from r1distill.students.template import TEMPLATES, Template


def go_template(template: Template) -> str:
    """The layout as a Go template over ``.Messages``, whose texts come from actions alone: no stray white space.

    An assistant's turn at the end is left open, to be gone on with. Ollama hands over earlier answers without their
    thinking, which it keeps apart.
    """

    def text(literal: str) -> str:
        return "{{ " + json.dumps(literal, ensure_ascii=False) + " }}" if literal else ""

    def turn(before: str, after: str) -> str:
        return text(before) + "{{ .Content }}" + text(after)

    closed = "{{ if not $last }}" + text(template.end + template.after_end) + "{{ end }}"
    return (
        text(template.bos)
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + '{{ if eq .Role "system" }}'
        + turn(*template.system)
        + '{{ else if eq .Role "user" }}'
        + turn(*template.user)
        + '{{ else if eq .Role "assistant" }}'
        + turn(template.assistant, "")
        + closed
        + "{{ end }}"
        + '{{ if and $last (ne .Role "assistant") }}'
        + text(template.assistant + OPEN + "\n")
        + "{{ end }}{{ end }}"
    )


def modelfile(student: Student, gguf: str) -> str:
    """The Modelfile that lies beside a GGUF file: ``ollama create NAME -f Modelfile``."""
    template = TEMPLATES[student.template]
    return "\n".join(
        [
            f"FROM ./{gguf}",
            f'TEMPLATE """{go_template(template)}"""',
            f"PARAMETER temperature {SAMPLING['temperature']}",
            f"PARAMETER top_p {SAMPLING['top_p']}",
            f"PARAMETER num_ctx {student.packs.context_tokens}",
            f'PARAMETER stop "{template.end}"',
            "",
        ]
    )


def vllm_options(student: Student) -> dict[str, Any]:
    """vLLM's flags, without their dashes, for the checkpoint and every variant that vLLM loads."""
    options: dict[str, Any] = {"max-model-len": student.packs.context_tokens, "reasoning-parser": "deepseek_r1"}
    return options


def commands(student: Student, repository: str, name: str | None = None) -> list[str]:
    """What to type to run a published student, or one of its variants, from its repository on the Hub."""
    flags = " ".join(f"--{key} {shlex.quote(str(value))}" for key, value in vllm_options(student).items())
    if name is None:
        return [f"vllm serve {repository} {flags}"]
    fetch = f"hf download {repository} --include 'variants/{name}/*' --local-dir ."
    if isinstance(student.variants[name], GgufVariant):
        return [
            fetch,
            f"ollama create {student.name}-{name} -f variants/{name}/Modelfile && ollama run {student.name}-{name}",
            f"llama-server -m variants/{name}/*.gguf --jinja -c {student.packs.context_tokens}",
        ]
    return [fetch, f"vllm serve ./variants/{name} {flags}"]
