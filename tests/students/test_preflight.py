"""The preflight: every R1 student passes, and everything that was ever got wrong is caught by the check for it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from r1distill.data.config import load
from r1distill.data.errors import RequestError
from r1distill.pipeline.cli import app
from r1distill.students import preflight
from r1distill.students.catalogue import Student
from r1distill.students.checks import CHECKS
from r1distill.students.subject import ANSWER, PROBE, QUESTION, SYSTEM
from r1distill.students.template import TEMPLATES, write_tokenizer

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
needs_tokenizers = pytest.mark.skipif(not SHARED.is_dir(), reason="the published tokenizers are not on this machine")

FAMILY = {"qwen2": "qwen2.5", "llama": "llama-3.1"}
SIX = ["qwen-1.5b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-8b", "llama-70b"]


def lora(**settings: Any) -> dict[str, Any]:
    return {"sft.method": {"kind": "lora", "rank": 16, "alpha": 32, **settings}}


def student(name: str, changes: dict[str, Any] | None = None) -> Student:
    return load("students", name, Student, changes)


def failed(findings: list[preflight.Finding]) -> set[str]:
    assert {finding.check for finding in findings} >= set(CHECKS)  # none was left out
    return {finding.check for finding in findings if not finding.passed}


@needs_tokenizers
@pytest.mark.parametrize("name", SIX)
def test_every_r1_student_is_sound(name: str, tmp_path: Path) -> None:
    one = student(name)
    what, findings = preflight.look(one, SHARED / FAMILY[one.architecture.model_type], tmp_path)
    assert failed(findings) == set(), [str(finding) for finding in findings]
    assert "would ship" in what


@needs_tokenizers
@pytest.mark.parametrize(("name", "file"), [("qwen-7b", "qwen2"), ("llama-8b", "llama-bpe")])
def test_what_is_shipped_gives_the_golden_ids(name: str, file: str, tmp_path: Path) -> None:
    one = student(name)
    with preflight.unpacked(SHARED / FAMILY[one.architecture.model_type]) as base:
        tokenizer = write_tokenizer(TEMPLATES["r1"], base, tmp_path, max_tokens=131072)
    texts = (SHARED / "golden" / f"{file}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")[:-1]
    lines = (SHARED / "golden" / f"{file}.out").read_text("utf-8").splitlines()
    assert len(texts) == len(lines) == 46
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [int(token) for token in line.split()]


@needs_tokenizers
@pytest.mark.parametrize(("name", "family"), [("qwen-7b", "qwen"), ("llama-8b", "llama")])
def test_the_published_tokenizers_known_faults_are_named(name: str, family: str, tmp_path: Path) -> None:
    """They pad with the end token, cut at 16,384, add a second BOS and delete the thinking, and today's transformers
    makes of their tokenizer_class one that loses spaces."""
    what, findings = preflight.look(student(name), SHARED / f"deepseek-r1-distill-{family}", tmp_path)
    assert what.startswith("the files in")
    assert failed(findings) >= {"padding", "truncation", "one BOS", "thinking kept", "encoding"}
    assert not failed(findings) & {"special tokens", "generation prompt", "end token", "rope", "tied"}


# Small tokenizers: the real ones, with those merges alone that can occur in the texts of the checks.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    if not SHARED.is_dir():
        pytest.skip("the published tokenizers are not on this machine")
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            spec = json.loads(gzip.decompress((SHARED / FAMILY[model_type] / "tokenizer.json.gz").read_bytes()))
            made[model_type] = tmp_path_factory.mktemp(model_type)
            (made[model_type] / "tokenizer.json").write_text(json.dumps(reduced(spec)))
        return made[model_type]

    return make


def reduced(spec: dict[str, Any]) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    template = TEMPLATES["r1"]
    said = template.prefix([SYSTEM, QUESTION, {"role": "assistant", "content": "Two."}]) + template.target(ANSWER)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = level.pre_tokenize_str(said + PROBE + " 7 7\n\n")[0][0]
    model = spec["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**spec, "model": {**model, "merges": [pair for pair in pairs if "".join(pair) in text]}}


@pytest.fixture(scope="module")
def finished(small: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders as a checkpoint leaves them, with the tensors' names and shapes for weights."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            from transformers import GenerationConfig

            from r1distill.students import base

            one, folder = student(name), tmp_path_factory.mktemp(name)
            source = small(one.architecture.model_type)
            tokenizer = write_tokenizer(TEMPLATES["r1"], source, folder, max_tokens=one.architecture.max_position)
            base.config(one.architecture, None, tokenizer).save_pretrained(folder)
            GenerationConfig(**base.SAMPLING, **base.marks(tokenizer)).save_pretrained(folder)
            rows = [one.architecture.vocab, one.architecture.hidden]
            write_header(folder, {"model.embed_tokens.weight": rows, "lm_head.weight": rows})
            made[name] = folder
        return made[name]

    return make


def write_header(folder: Path, shapes: dict[str, list[int]]) -> None:
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())


@pytest.mark.parametrize("name", ["qwen-1.5b", "llama-8b"])
def test_a_finished_folder_is_sound(name: str, finished: Callable[[str], Path]) -> None:
    findings = preflight.check_folder(student(name), finished(name))
    assert failed(findings) == set(), [str(finding) for finding in findings]


# What is changed in a file of a finished folder, and the check that must find it.

Spec = dict[str, Any]


def renamed(spec: Spec, **names: str) -> None:
    for added in spec["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])


def swap_user_and_assistant(spec: Spec) -> None:
    renamed(spec, **{"<｜User｜>": "<｜Assistant｜>", "<｜Assistant｜>": "<｜User｜>"})


def add_think(spec: Spec) -> None:
    renamed(spec, **{"<think>": "<|was|>"})
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 151665, "content": "<think>", "special": False})


def forget_think(spec: Spec) -> None:
    renamed(spec, **{"</think>": "<|box_end|>"})


def make_think_special(spec: Spec) -> None:
    next(added for added in spec["added_tokens"] if added["content"] == "</think>")["special"] = True


def eat_spaces(spec: Spec) -> None:
    next(added for added in spec["added_tokens"] if added["content"] == "</think>").update(lstrip=True, rstrip=True)


def add_bos(spec: Spec) -> None:
    bos = {"SpecialToken": {"id": "<｜begin▁of▁sentence｜>", "type_id": 0}}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<｜begin▁of▁sentence｜>": {"id": "<｜begin▁of▁sentence｜>", "ids": [151646], "tokens": ["<｜begin▁of▁sentence｜>"]}},
    }  # fmt: skip


def lowercase(spec: Spec) -> None:
    spec["normalizer"] = {"type": "Lowercase"}


def split_otherwise(spec: Spec) -> None:
    split = spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    split["Regex"] = split["Regex"].replace("\\s+(?!\\S)|", "")  # two spaces go together


def lose_merges(spec: Spec) -> None:
    del spec["model"]["merges"][::3]


def cut_at_16k(spec: Spec) -> None:
    spec["truncation"] = {"direction": "Right", "max_length": 16384, "strategy": "LongestFirst", "stride": 0}


def official(name: str) -> str:
    return (SHARED / "chat_templates" / f"deepseek-r1-family.{name}.jinja").read_text("utf-8")


IN_TOKENIZER: dict[str, tuple[Callable[[Spec], None], str]] = {
    "user and assistant swapped": (swap_user_and_assistant, "special tokens"),
    "<think> added as a new row": (add_think, "special tokens"),
    "</think> not renamed": (forget_think, "special tokens"),
    "</think> marked special": (make_think_special, "special tokens"),
    "</think> eats the blank lines": (eat_spaces, "round trip"),
    "post-processor adds a BOS": (add_bos, "one BOS"),
    "text is lowercased": (lowercase, "encoding"),
    "text is split otherwise": (split_otherwise, "encoding"),
    "merges are missing": (lose_merges, "encoding"),
    "truncation is baked in": (cut_at_16k, "truncation"),
}
IN_SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pads with the end token": ("tokenizer_config.json", {"pad_token": "<｜end▁of▁sentence｜>"}, "padding"),
    "pads with nothing": ("tokenizer_config.json", {"pad_token": None}, "padding"),
    "cuts at 16,384": ("tokenizer_config.json", {"model_max_length": 16384}, "truncation"),
    "ends with the base's token": ("tokenizer_config.json", {"eos_token": "<｜User｜>"}, "end token"),
    "another begin": ("tokenizer_config.json", {"bos_token": "<｜User｜>"}, "one BOS"),
    "config.json begins otherwise": ("config.json", {"bos_token_id": 151643}, "one BOS"),
    "config.json ends otherwise": ("config.json", {"eos_token_id": 151645}, "end token"),
    "config.json pads with the end": ("config.json", {"pad_token_id": 151643}, "padding"),
    "embedding resized": ("config.json", {"vocab_size": 151667}, "special tokens"),
    "the base's context": ("config.json", {"max_position_embeddings": 4096}, "context"),
    "a sliding window": ("config.json", {"use_sliding_window": True, "sliding_window": 4096}, "context"),
    "faster rotation": ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}, "rope"),
    "tied": ("config.json", {"tie_word_embeddings": True}, "tied"),
    "answers cut": ("generation_config.json", {"max_new_tokens": 2048}, "context"),
    "greedy": ("generation_config.json", {"do_sample": False}, "context"),
    "generation never ends": ("generation_config.json", {"eos_token_id": 151645}, "end token"),
}  # fmt: skip


def altered(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    return copy


@pytest.mark.parametrize("fault", IN_TOKENIZER)
def test_a_broken_tokenizer_is_caught(fault: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    change, check = IN_TOKENIZER[fault]
    folder = altered(finished("qwen-1.5b"), tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    caught(preflight.check_folder(student("qwen-1.5b"), folder), check, "tokenizer.json")


@pytest.mark.parametrize("fault", IN_SETTINGS)
def test_broken_settings_are_caught(fault: str, finished: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, check = IN_SETTINGS[fault]
    folder = altered(finished("qwen-1.5b"), tmp_path)
    settings = {**json.loads((folder / name).read_text()), **change}
    (folder / name).write_text(json.dumps(settings))
    caught(preflight.check_folder(student("qwen-1.5b"), folder), check, name)


def caught(findings: list[preflight.Finding], check: str, file: str) -> None:
    mine = [finding for finding in findings if finding.check == check and not finding.passed]
    assert mine, [str(finding) for finding in findings if not finding.passed]
    assert any(finding.file.endswith(file) for finding in mine)
    assert all(finding.found and finding.remedy for finding in mine)


@pytest.mark.parametrize(
    ("template", "check"),
    [
        (lambda: official("initial-2025-01"), "generation prompt"),  # its prompt has no <think>
        (lambda: official("current-2025-02"), "thinking kept"),
        (lambda: "{{ 'You are helpful.' }}" + TEMPLATES["r1"].chat_template(), "generation prompt"),
        (lambda: TEMPLATES["r1"].chat_template().replace("{{- '<｜begin▁of▁sentence｜>' }}", ""), "one BOS"),
        (lambda: TEMPLATES["r1"].chat_template().replace("{%- endfor %}", ""), "generation prompt"),
    ],
    ids=["no think", "deletes the thinking", "a system prompt of its own", "no BOS", "no Jinja"],
)
def test_a_broken_chat_template_is_caught(template, check: str, finished, tmp_path: Path) -> None:
    folder = altered(finished("qwen-1.5b"), tmp_path)
    (folder / "chat_template.jinja").write_text(template(), encoding="utf-8")
    caught(preflight.check_folder(student("qwen-1.5b"), folder), check, "chat_template.jinja")


@pytest.mark.parametrize(
    ("name", "change", "check"),
    [
        ("qwen-7b", {"architecture.tied": True}, "tied"),
        ("qwen-7b", {"architecture.rope_theta": 5000}, "rope"),
        ("llama-8b", {"architecture.rope_scaling": None}, "rope"),
        ("llama-8b", {"architecture.rope_scaling.factor": 2}, "rope"),
        ("llama-70b", {"architecture.vocab": 128000}, "special tokens"),
        ("llama-8b", lora(train_renamed_rows=False), "renamed rows"),
    ],
)
def test_a_broken_configuration_is_caught(name: str, change: dict, check: str, small, tmp_path: Path) -> None:
    one = student(name, change)
    findings = preflight.check(one, small(one.architecture.model_type))
    assert check in failed(findings), [str(finding) for finding in findings if not finding.passed]


def test_lora_trains_the_renamed_rows(small) -> None:
    one = student("llama-8b", lora())
    assert failed(preflight.check(one, small("llama"))) == set()
    slower = student("qwen-7b", {"architecture.rope_theta": 300000})  # open-r1's
    assert failed(preflight.check(slower, small("qwen2"))) == set()


def test_an_adapter_without_the_renamed_rows_is_caught(finished, tmp_path: Path) -> None:
    folder = altered(finished("llama-8b"), tmp_path)
    (folder / "adapter").mkdir()
    rows = [128000, 128001, 128011, 128012, 128013, 128014, 128015]
    settings = {"trainable_token_indices": {"embed_tokens": rows}}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    caught(preflight.check_folder(student("llama-8b", lora()), folder), "renamed rows", "adapter_config.json")
    settings["trainable_token_indices"]["lm_head"] = rows
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert failed(preflight.check_folder(student("llama-8b", lora()), folder)) == set()


def test_tensors_of_another_model_are_caught(finished, tmp_path: Path) -> None:
    folder = altered(finished("qwen-1.5b"), tmp_path)
    write_header(folder, {"model.embed_tokens.weight": [151667, 1536]})
    caught(preflight.check_folder(student("qwen-1.5b"), folder), "tied", "model.safetensors")


def test_a_base_of_another_shape_is_caught(small, finished, tmp_path: Path) -> None:
    folder = altered(small("qwen2"), tmp_path)
    shutil.copy(finished("qwen-1.5b") / "config.json", folder)
    findings = preflight.check(student("qwen-7b"), folder)
    assert any(not finding.passed and "hidden_size 1536" in finding.found for finding in findings)


def test_another_familys_tokenizer_is_caught(small) -> None:
    assert {"special tokens", "encoding"} <= failed(preflight.check(student("qwen-7b"), small("llama")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {}}'),
        ("tokenizer.json", b'{"added_tokens": [{"id": 1}], "model": {"vocab": {"a": 0}}}'),
        ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}}'),
        ("tokenizer.json", b"\xff\xfe\x00garbage"),
        ("tokenizer.json.gz", b"\x1f\x8b\x08 not gzip"),
        ("tokenizer_config.json", b"{"),
        ("model.safetensors", b"\xff" * 20),
        ("config.json", b"{"),
    ],
)
def test_a_damaged_file_gets_one_clear_message(name: str, content: bytes, finished, tmp_path: Path) -> None:
    folder = altered(finished("qwen-1.5b"), tmp_path)
    if name.endswith(".gz"):
        (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(RequestError, match="damaged|Fetch it again") as error:
        preflight.look(student("qwen-1.5b"), folder, tmp_path)
    assert str(folder) in str(error.value) and "Traceback" not in str(error.value)


def test_a_folder_without_a_tokenizer_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--tokenizer DIR"):
        preflight.look(student("qwen-1.5b"), tmp_path, tmp_path)


def test_the_command_answers_and_its_exit_code_says_which(small, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path))
    command = ["preflight", "--student", "llama-8b", "--tokenizer", str(small("llama"))]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "Nothing to mend" in done.output, done.output
    broken = ["--json", "--set", f"student.sft.method={json.dumps(lora(train_renamed_rows=False)['sft.method'])}"]
    done = CliRunner().invoke(app, [*command, *broken])
    answer = json.loads(done.output)
    assert done.exit_code == 2 and answer["passed"] is False
    assert [row["check"] for row in answer["findings"] if not row["passed"]] == ["renamed rows"]
