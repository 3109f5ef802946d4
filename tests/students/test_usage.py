"""What people type to run a variant: Ollama's template lays out what ours does."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
import pytest

from r1distill.data.config import load
from r1distill.students.catalogue import Student
from r1distill.students.template import TEMPLATES
from r1distill.students.usage import go_template, modelfile

TALKS = [
    [("user", "What is 2 + 2?")],
    [("system", 'Be "brief" {{ x }}.'), ("user", "数学\n\n x² 'q' \\boxed{4}")],
    [("user", "a"), ("assistant", "4"), ("user", "Why <b>?")],
]


def parsed(actions: list[str]) -> list[Any]:
    """The actions of a Go template up to an end or an else, as a tree: texts, and (word, condition, body, otherwise)."""
    nodes: list[Any] = []
    while actions and not actions[0].startswith(("end", "else")):
        word, _, rest = actions.pop(0).partition(" ")
        nodes.append((word, rest, *branches(actions)) if word in ("if", "range") else (word + " " + rest).strip())
    return nodes


def branches(actions: list[str]) -> tuple[list[Any], list[Any]]:
    """The body of an if or a range, and what stands in its else; takes the end as well."""
    body, otherwise = parsed(actions), []
    closing = actions.pop(0)
    if closing.startswith("else if "):
        otherwise = [("if", closing.removeprefix("else if "), *branches(actions))]
    return body, otherwise


def rendered(nodes: list[Any], talk: list[tuple[str, str]], number: int = 0) -> str:
    """What Go's text/template makes of the few actions that our templates use."""
    role, text = talk[number]
    last = number == len(talk) - 1
    conditions = {"not $last": not last, 'and $last (ne .Role "assistant")': last and role != "assistant"}
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += text if node == ".Content" else json.loads(node) if node.startswith('"') else ""
        elif node[0] == "range":
            out += "".join(rendered(node[2], talk, turn) for turn in range(len(talk)))
        else:
            named = re.fullmatch(r'eq \.Role "(\w+)"', node[1])
            holds = role == named[1] if named else conditions[node[1]]
            out += rendered(node[2] if holds else node[3], talk, number)
    return out


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk", TALKS, ids=("question", "system", "three turns"))
def test_ollama_lays_out_what_the_chat_template_does(name: str, talk: list[tuple[str, str]]) -> None:
    pieces = re.split(r"\{\{ (.*?) \}\}", go_template(TEMPLATES[name]), flags=re.S)
    assert not any(pieces[::2]), "white space between actions would be printed"
    messages = [{"role": role, "content": text} for role, text in talk]
    ours = jinja2.Environment().from_string(TEMPLATES[name].chat_template())
    expected = ours.render(messages=messages, add_generation_prompt=True)
    assert rendered(parsed(pieces[1::2]), talk) == expected


def test_a_modelfile_names_its_file_and_stops_at_the_end_token() -> None:
    student = load("students", "qwen-7b", Student)
    text = modelfile(student, "x.gguf")
    assert text.startswith("FROM ./x.gguf\n") and 'PARAMETER stop "<｜end▁of▁sentence｜>"' in text
    assert "PARAMETER num_ctx 32768" in text and text.count('"""') == 2
