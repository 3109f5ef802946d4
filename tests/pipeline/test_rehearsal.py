"""Rehearsals: a Qwen in full and a Llama with LoRA through the real stages; what breaks is named where it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1distill.data.errors import RequestError
from r1distill.pipeline.rehearsal import Rehearsal, r1_students, written

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
needs_tokenizers = pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers are not on this machine")
BOTH = [SHARED / "qwen2.5", SHARED / "llama-3.1"]
ONE_VARIANT = "student.variants={q4_k_m: }"


def passed(rehearsal: Rehearsal) -> dict[str, str]:
    """Every step's note; fails with what broke."""
    steps = list(rehearsal.steps())
    assert all(step.passed for step in steps), steps[-1]
    assert all(step.seconds > 0 and step.note for step in steps)
    return {step.name: step.note for step in steps}


@needs_tokenizers
@pytest.mark.slow
def test_a_qwen_is_trained_in_full_killed_resumed_served_and_published(tmp_path: Path) -> None:
    rehearsal = Rehearsal("qwen-1.5b", tmp_path, False, BOTH, [ONE_VARIANT])
    notes = passed(rehearsal)
    assert list(notes)[-4:] == ["files", "variants", "scores", "publication"]
    published = next(rehearsal.home.glob("publication/*/model"))
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        file.name for file in published.iterdir()
    }


@needs_tokenizers
@pytest.mark.slow
def test_a_llamas_adapter_is_trained_by_two_processes_killed_resumed_and_merged(tmp_path: Path) -> None:
    rehearsal = Rehearsal("llama-8b", tmp_path, True, BOTH, [ONE_VARIANT], until="checkpoint")
    notes = passed(rehearsal)
    assert "adapter merged" in notes["files"] and notes["training, killed"].startswith("killed after")
    assert "shrunk" not in notes and "8 layers" not in rehearsal.shrunk and "32 layers of 4096" in rehearsal.shrunk


@needs_tokenizers
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", r1_students())
def test_every_student_passes(name: str, lora: bool, tmp_path: Path) -> None:
    rehearsal = Rehearsal(name, tmp_path, lora, BOTH)
    passed(rehearsal)
    rehearsal.clear()
    assert not list(tmp_path.iterdir())


@needs_tokenizers
def test_the_first_step_that_breaks_is_the_last(tmp_path: Path) -> None:
    rehearsal = Rehearsal("qwen-7b", tmp_path, False, BOTH, ["student.architecture.tied=true"])
    (step,) = rehearsal.steps()
    assert (step.name, step.passed) == ("preflight", False)
    assert "tied" in step.note


@needs_tokenizers
def test_a_tokenizer_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no vocabulary of meta-llama/Llama-3.1-8B.*--tokenizer DIR"):
        Rehearsal("llama-8b", tmp_path, False, BOTH[:1])


def test_without_the_hub_it_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RequestError, match="--tokenizer DIR"):
        Rehearsal("qwen-7b", tmp_path)


def test_the_written_traces_are_right_and_differ() -> None:
    rows = [written(number) for number in range(40)]
    assert len({row["question"] for row in rows}) == 40
    for row in rows:
        numbers = [int(word) for word in row["question"].split() if word.isdigit()]
        assert int(row["answer"]) == numbers[0] * numbers[1] - numbers[2]
        assert f"\\boxed{{{row['answer']}}}" in row["completion"] and "<think>" not in row["completion"]
