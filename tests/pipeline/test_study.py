"""Studies: arms share what they can, every figure of the table is counted right, and nothing is made twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from r1distill.data import schema
from r1distill.data.errors import RequestError
from r1distill.pipeline import page, runner, study
from r1distill.pipeline.evaluation import Contender
from r1distill.pipeline.standin import written
from r1distill.pipeline.study import Study
from r1distill.teacher.settings import EndpointTeacher, Sampling

SHAPE = {"layers": 2, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 1, "vocab": 320, "rope_theta": 10000,
         "max_position": 1024, "rms_eps": 1.0e-6, "parameters": 25696}  # fmt: skip
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_model(folder: Path, layers: int, seed: int) -> dict[str, str]:
    """A random Llama over bytes and ChatML's tokens, as a reference to it."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    words = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama", vocab_size=SHAPE["vocab"], hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return {"kind": "folder", "path": str(folder)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of a tiny student that learns from a tiny teacher's probabilities and from written traces."""
    folder = tmp_path_factory.mktemp("study")
    rows = [written(number) for number in range(30)]
    for name, part in (("traces", rows[:24]), ("questions", rows[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    asks = {"question": "question", "reference_answer": "answer"}
    says = {"question": "question", "prompt": "prompt", "completion": "completion", "finish_reason": "finish_reason"}

    def source(name: str, columns: dict[str, str]) -> dict:
        return {"kind": "file", "path": str(folder / f"{name}.jsonl"), "columns": columns, "license": "mit"}

    path = {name: str(folder / f"{name}.yaml") for name in ("tiny", "teacher", "prompts", "held-out")}
    values = {
        "tiny": {
            "extends": "smollm2-135m",
            "base": write_model(folder / "base", 2, 0),
            "architecture": SHAPE,
            "packs": {"context_tokens": 1024},
            "sft": {"learning_rate": 1.0e-2, "epochs": 1, "batch_traces": 8, "precision": "float32"},
            "distill": {"kind": "topk_kl", "teacher": write_model(folder / "larger", 3, 1), "k": 8},
            "variants": {},
            "benchmarks": [path["held-out"]],
            "teacher": path["teacher"],
        },
        "teacher": {"kind": "recorded", "prompts": path["prompts"], "source": source("traces", says), "model": "w"},
        "prompts": {
            "sources": [source("traces", asks)],
            "instruction": "",
            "decontaminate": {"against": [path["held-out"]], "ngram": None},
            "dataset": {"validation_share": 0.2},
        },
        "held-out": {"title": "Pens", "source": source("questions", asks), "k": 2, "max_tokens": 64},
    }
    for name, one in values.items():
        Path(path[name]).write_text(yaml.safe_dump(one))
    return path


def fingerprints(one: study.Trained) -> dict[str, str]:
    return {step.stage.name: step.fingerprint for step in runner.chain(one.run, "beyond")}


def test_arms_share_all_that_they_can(files: dict[str, str], tmp_path: Path) -> None:
    made = {one.name: fingerprints(one) for one in Study(tmp_path, files["tiny"], seeds=2).trained}
    assert list(made) == ["text-0", "top-k-0", "both-0", "text-1", "top-k-1", "both-1"]
    for stage in ("prompts", "traces", "verdicts", "dataset", "packs"):
        assert len({one[stage] for one in made.values()}) == 1, stage
    assert [name for name, one in made.items() if "logits" not in one] == ["text-0", "text-1"]
    assert len({one["logits"] for one in made.values() if "logits" in one}) == 1
    assert len({one["checkpoint"] for one in made.values()}) == len(made)


def test_the_whole_file_decides_and_a_study_changes_with_it(files: dict[str, str], tmp_path: Path) -> None:
    one = Study(tmp_path, files["tiny"], seeds=1)
    other = Study(tmp_path, files["tiny"], seeds=1, changes=["student.distill.k=4"])
    assert (
        one.identity()
        != other.identity()
        == Study(tmp_path, files["tiny"], seeds=1, changes=["student.distill.k=4"]).identity()
    )
    by_arm = [{each.arm: fingerprints(each)["checkpoint"] for each in made.trained} for made in (one, other)]
    assert by_arm[0]["text"] == by_arm[1]["text"] and by_arm[0]["both"] != by_arm[1]["both"]


def test_a_student_without_a_teacher_of_its_vocabulary_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a student whose file has 'distill'"):
        Study(tmp_path, "smollm2-135m")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arms", [("text", "top-k"), pytest.param(("text", "top-k", "grpo", "on-policy"), marks=pytest.mark.soak)]
)
def test_it_is_trained_asked_and_read_for_real_and_never_twice(
    arms: tuple[str, ...], files: dict[str, str], tmp_path: Path, fast_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed; a server of the test's own answers in the models' place, right every second time."""

    def answer(question: str, number: int) -> str:
        boxes, pens, gone = (int(word) for word in question.replace("?", "").split() if word.isdigit())
        return f"Hm.\n</think>\n\nIt is \\boxed{{{boxes * pens - gone + number % 2}}}."

    server = fast_model(answer)

    def served(self: Study):
        for name in ("base", *(one.name for one in self.trained)):
            endpoint = EndpointTeacher(kind="endpoint", name=name, prompts="", base_url=server.url, model="fast",
                                       sampling=Sampling(max_tokens=1))  # fmt: skip
            yield Contender(name, endpoint, name, None, True)

    monkeypatch.setattr(study, "ARMS", {name: study.ARMS[name] for name in arms[:2]})
    few = {"prompts_per_step": 2, "max_completion_tokens": 8, "learning_rate": 1.0e-2}
    monkeypatch.setattr(study, "BEYOND", {name: study.BEYOND[name] | few for name in arms[2:]})
    monkeypatch.setattr(Study, "contenders", served)
    told: list[tuple[str, str, bool]] = []

    def execute() -> study.Artifact:
        del told[:]
        whole = Study(tmp_path, files["tiny"], seeds=1)
        return whole.execute(lambda name, done: told.append((name, done.step.stage.name, done.built)))

    artifact = execute()
    assert [name for name in told if name[1] in ("packs", "logits", "checkpoint", "beyond") and name[2]] == [
        ("text-0", "packs", True), ("text-0", "checkpoint", True), ("top-k-0", "logits", True), ("top-k-0", "checkpoint", True),
        *((f"{arm}-0", "beyond", True) for arm in arms[2:]),
    ]  # fmt: skip
    models = 1 + len(arms)
    assert artifact.manifest["read"] == models * 6 * 2 and artifact.manifest["kept"] == models * 6
    found = artifact.manifest["metrics"]["study"]
    rows = found["benchmarks"]["held-out"]["arms"]
    assert [row["arm"] for row in rows] == ["base", *arms] and found["best"] == "text"
    for row in rows:
        assert (row["accuracy"], row["questions"], row["k"], row["low"], row["high"]) == (0.5, 6, 2, 0.5, 0.5)
        assert (row["against"] is not None) == (row["arm"] in arms[1:])
        assert (row["gain"] is not None) == (row["arm"] in arms[2:])
    untrained, text, topk, *further = rows
    for row in further:
        assert row["steps"] == text["steps"]
        assert row["arm"] == "grpo" or row["kl"] != text["kl"]  # random weights earn no reward to learn from
    assert text["steps"] == topk["steps"] and text["steps"][0] > 0 and untrained["steps"] == []
    assert text["loss"][0] < untrained["loss"][0] and topk["kl"][0] < untrained["kl"][0]
    assert text["loss"][0] < topk["loss"][0] and topk["kl"][0] < text["kl"][0]  # each is best at what it was taught

    files_of = page.write(tmp_path, "tiny", tmp_path / "report")
    assert "Study: ways to learn from one teacher" in files_of[0].read_text()
    assert "| top-k | 50.0% | 50.0 – 50.0% | +0.0 (+0.0 to +0.0) |" in files_of[0].read_text()
    asked = len(server.bodies)
    assert execute().fingerprint == artifact.fingerprint and not told

    (artifact.path / "manifest.json").unlink()  # as if it had been killed before it was sealed
    artifact.path.rename(artifact.path.with_name("gone"))
    again = execute()
    assert {name for name in told if name[2]} == set() and len(server.bodies) == asked
    assert again.manifest["metrics"] == artifact.manifest["metrics"]


def test_held_out_traces_are_the_members_of_the_validation_packs_each_alone(tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7], "labels": [-100, 2, 3, -100, -100, 6, 7], "seq_lengths": [3, 4],
             "members": [{"prompt_id": f"p{n}", "sample": 0, "domain": "math"} for n in range(2)]}]  # fmt: skip
    schema.write(tmp_path / "packs" / "validation", schema.PACK, rows)
    found = list(study.held_out(tmp_path / "packs"))
    assert [(one.ids, one.first) for one in found] == [([1, 2, 3], 1), ([4, 5, 6, 7], 2)]
    with pytest.raises(RequestError, match="validation_share"):
        list(study.held_out(tmp_path))


def answers(model: str, right: np.ndarray, tokens: int = 10) -> list[dict]:
    """(questions, k) answers of one run; a wrong one was cut off."""
    return [
        {"model": model, "prompt_id": f"q{question}", "correct": bool(correct), "completion_tokens": tokens,
         "reason": None if correct else "truncated"}
        for question, row in enumerate(right) for correct in row
    ]  # fmt: skip


def test_the_table_counts_questions_answers_and_seeds() -> None:
    draw = np.random.default_rng(0)
    right = {
        f"{arm}-{seed}": draw.binomial(1, chance, (40, 2))
        for arm, chance in (("text", 0.2), ("both", 0.8))
        for seed in range(3)
    }
    rows = [row for name, each in right.items() for row in answers(name, each, tokens=20 if name == "both-2" else 10)]
    arms = {arm: [f"{arm}-{seed}" for seed in range(3)] for arm in ("text", "both")}
    text, both = study.scored(rows, arms, "text")
    for row in (text, both):
        each = [right[name] for name in arms[row["arm"]]]
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["by_seed"] == pytest.approx([np.mean(one) for one in each])
        assert (row["questions"], row["k"]) == (40, 2)
        assert row["truncated"] == pytest.approx(1 - row["accuracy"])
        assert row["low"] < row["accuracy"] < row["high"]
    assert text["against"] is None and (text["mean_tokens"], both["mean_tokens"]) == (10, pytest.approx(40 / 3))
    gain = both["against"]
    assert gain["difference"] == pytest.approx(both["accuracy"] - text["accuracy"])
    assert gain["low"] > 0.3 and gain["verdict"] == "better"
