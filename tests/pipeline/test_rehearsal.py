"""Rehearsals: a Qwen in full and a Llama with LoRA through the real stages; what breaks is named where it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1distill.data.errors import RequestError
from r1distill.pipeline.rehearsal import Rehearsal, r1_students
from r1distill.pipeline.standin import written

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
needs_tokenizers = pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers are not on this machine")
BOTH = [SHARED / "qwen2.5", SHARED / "llama-3.1"]


def passed(rehearsal: Rehearsal) -> dict[str, str]:
    """Every step's note; fails with what broke."""
    steps = list(rehearsal.steps())
    assert all(step.passed for step in steps), steps[-1]
    assert all(step.seconds > 0 and step.note for step in steps)
    return {step.name: step.note for step in steps}


@needs_tokenizers
@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("qwen-1.5b", False), ("llama-8b", True)])
def test_it_is_trained_by_two_processes_killed_and_resumed(name: str, lora: bool, tmp_path: Path) -> None:
    """Up to the checkpoint, whose files pass the preflight; the soak tests go on to the publication."""
    rehearsal = Rehearsal(name, tmp_path, lora, BOTH, until="checkpoint")
    notes = passed(rehearsal)
    assert list(notes)[:2] == ["preflight", "set up"] and list(notes)[-1] == "files"
    assert notes["training, killed"].startswith("killed after the checkpoint of step")
    assert ("adapter merged" in notes["files"]) == lora
    (checkpoint,) = rehearsal.home.glob(f"checkpoint/{name}-*")
    assert (checkpoint / "model.safetensors").is_file()
    assert "32,768" in rehearsal.shrunk and "random weights" in rehearsal.shrunk


@needs_tokenizers
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", r1_students())
def test_every_student_passes(name: str, lora: bool, tmp_path: Path) -> None:
    rehearsal = Rehearsal(name, tmp_path, lora, BOTH)
    assert list(passed(rehearsal))[-3:] == ["variants", "scores", "publication"]
    (model,) = rehearsal.home.glob("publication/*/model")
    files = {str(file.relative_to(model)) for file in model.rglob("*") if file.is_file()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= files
    assert {file.split("/")[1] for file in files if file.startswith("variants/")} == set(rehearsal.student.variants)
    rehearsal.clear()
    assert [file.name for file in tmp_path.iterdir()] == [f".{rehearsal.name}.lock"]


@needs_tokenizers
def test_the_layout_is_of_the_real_ones_kind(tmp_path: Path) -> None:
    """Where the real training cuts sequences over GPUs the rehearsal cuts them over its two processes."""
    spread = {}
    for name, hardware in (("qwen-1.5b", "8xh100"), ("qwen-32b", "8xh200"), ("qwen-32b", "16xh100")):
        launch = Rehearsal(name, tmp_path, False, BOTH, hardware=hardware)._settings()["sft"]["launch"]
        spread[name, hardware] = (launch["strategy"], launch["sequence_parallel"])
    assert spread == {
        ("qwen-1.5b", "8xh100"): ("ddp", 1),
        ("qwen-32b", "8xh200"): ("ddp", 1),
        ("qwen-32b", "16xh100"): ("zero3", 2),
    }


@needs_tokenizers
def test_two_at_once_do_not_spoil_each_other(tmp_path: Path) -> None:
    first, second = (Rehearsal("qwen-7b", tmp_path, False, BOTH, until="prompts") for _ in range(2))
    steps = first.steps()
    next(steps)
    with pytest.raises(RequestError, match=r"another run is building .*qwen-7b"):
        next(second.steps())
    assert [step.name for step in steps][-1] == "prompts"
    assert all(step.passed for step in second.steps())


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
