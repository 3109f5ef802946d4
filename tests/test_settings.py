"""What is wrong with a configuration is answered with its place and the nearest right word."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from r1distill.data import config
from r1distill.data.config import Settings, changed, execution, load, parse_overrides
from r1distill.data.errors import RequestError


class Full(Settings):
    kind: Literal["full"]


class Lora(Settings):
    kind: Literal["lora"]
    rank: int = 16


class Sft(Settings):
    method: Annotated[Full | Lora, Field(discriminator="kind")]
    epochs: int = 2
    workers: int = execution(4)


class Thing(Settings):
    name: str = execution()
    sft: Sft
    items: list[Lora] = []


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    (tmp_path / "students").mkdir()

    def write(name: str, text: str) -> Path:
        path = tmp_path / "students" / f"{name}.yaml"
        path.write_text(text)
        return path

    return write


GOOD = "sft:\n  method: {kind: lora, rank: 8}\n  epochs: 3\n"


def test_the_file_name_is_the_name_and_execution_stays_out_of_identity(write):
    write("good", GOOD)
    thing = load("students", "good", Thing)
    assert thing.name == "good"
    assert thing.identity() == {"sft": {"method": {"kind": "lora", "rank": 8}, "epochs": 3}, "items": []}


def test_overrides_reach_into_nested_settings(write):
    write("good", GOOD)
    values = parse_overrides(["student.sft.epochs=5", "student.sft.method={kind: full}"], ["student", "teacher"])
    thing = load("students", "good", Thing, values["student"])
    assert thing.sft.epochs == 5
    assert thing.sft.method.kind == "full"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "sft:\n  method: {kind: full}\n  epoch: 3\n",
            r"bad\.yaml:3: unknown key 'sft\.epoch'\. Did you mean 'epochs'",
        ),
        ("sft:\n  method:\n    kind: lora\n    rang: 3\n", r"bad\.yaml:4: .*'sft\.method\.rang'\. Did you mean 'rank'"),
        ("sft:\n  method: {kind: full, rank: 3}\n", r"bad\.yaml:2: unknown key 'sft\.method\.rank'"),
        ("sft:\n  method: {kind: full}\n  epochs: many\n", r"bad\.yaml:3: 'sft\.epochs': .*found 'many'"),
        ("sft:\n  epochs: 3\n", r"bad\.yaml:1: 'sft\.method' is required"),
        ("sft:\n  method: {kind: fool}\n", r"bad\.yaml:2: unknown kind 'fool'\. Did you mean 'full'"),
        ("sft:\n  method: {kind: full}\nitems:\n- {kind: lora, rnk: 3}\n", r"bad\.yaml:4: .*Did you mean 'rank'"),
        (
            "sft:\n  method: {kind: full}\nsft:\n  epochs: 5\n",
            r"bad\.yaml:3: 'sft' stands there twice, first at .*:1\.",
        ),
        ("sft:\n  method: {kind: full, kind: lora}\n", r"bad\.yaml:2: 'sft\.method\.kind' stands there twice"),
        ("sft: [unclosed\n", r"bad\.yaml can't be read as YAML"),
        ("- a\n- b\n", r"should hold a mapping"),
    ],
)
def test_a_bad_file_is_answered_with_its_line_and_a_remedy(write, text, message):
    write("bad", text)
    with pytest.raises(RequestError, match=message):
        load("students", "bad", Thing)


def test_extends_merges_once_and_a_changed_kind_replaces(write):
    write("base", GOOD)
    write("child", "extends: base\nsft:\n  method: {kind: full}\n")
    write("grandchild", "extends: child\n")
    child = load("students", "child", Thing)
    assert child.sft.method == Full(kind="full")
    assert child.sft.epochs == 3
    with pytest.raises(RequestError, match="one level"):
        load("students", "grandchild", Thing)


def test_an_empty_mapping_takes_away_what_the_extended_file_has(write):
    class Named(Settings):
        name: str = execution()
        variants: dict[str, int] = {}

    write("base", "variants: {a: 1}\n")
    write("child", "extends: base\nvariants: {}\n")
    assert load("students", "child", Named).variants == {}


def test_a_wrong_name_is_answered_with_the_nearest(write):
    write("qwen-14b", GOOD)
    with pytest.raises(RequestError, match="Did you mean 'qwen-14b'"):
        load("students", "qwen14b", Thing)


@pytest.mark.parametrize("pair", ["student", "student=1", "studnt.sft.epochs=1", "student.sft=[1"])
def test_a_bad_override_is_refused(pair):
    with pytest.raises(RequestError, match="--set"):
        parse_overrides([pair], ["student"])


def test_a_misspelt_override_is_answered_as_such(write):
    write("good", GOOD)
    with pytest.raises(RequestError, match=r"--set sft\.epoch.*Did you mean 'epochs'"):
        load("students", "good", Thing, {"sft.epoch": 1})


def test_an_override_into_what_is_no_mapping_is_refused(write):
    class Listing(Settings):
        name: str = execution()
        words: list[str]

    write("good", "words: [one, two]\n")
    assert load("students", "good", Listing, {"words.1": "three"}).words == ["one", "three"]
    with pytest.raises(RequestError, match="number 0 of the list is 'one', it has no 'more'"):
        load("students", "good", Listing, {"words.0.more": 1})


def test_changes_of_settings_that_are_loaded_are_checked_alike():
    full = Full(kind="full")
    assert changed(Sft(method=full), {"epochs": 5}) == Sft(method=full, epochs=5)
    with pytest.raises(RequestError, match=r"--set epoch: unknown key 'epoch'\. Did you mean 'epochs'"):
        changed(Sft(method=full), {"epoch": 5})
    with pytest.raises(RequestError, match=r"--set epochs: 'epochs': .*found 'many'"):
        changed(Sft(method=full), {"epochs": "many"})
