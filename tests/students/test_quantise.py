"""Every kind of variant of a tiny checkpoint, made for real; what becomes of those that are damaged on purpose."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.pipeline import gates
from r1distill.pipeline.rendering import Renderings
from r1distill.students import quantise
from r1distill.students.catalogue import Student, VariantGate
from r1distill.students.dequantise import weights
from r1distill.students.divergence import Reference, held_out
from r1distill.students.soundness import KEPT_FILES, problems
from r1distill.students.template import TEMPLATES, write_tokenizer

pytestmark = pytest.mark.slow

# How far the dequantised weights may be from the checkpoint's, relative to their size. AWQ rescales them.
ERROR = {
    "q8_0": 0.01,
    "q4_k_m": 0.1,
    "gptq-4bit": 0.15,
    "int8": 0.012,
    "fp8": 0.04,
    "fp8-block": 0.04,
    "awq-4bit": None,
}
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[..., None], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers that FP8's blocks of 128 and GGUF's of 32 divide, sharp enough to have an opinion."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("checkpoint")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_model(base, "llama", 320, **shape, initializer_range=0.08)
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = write_tokenizer(TEMPLATES["chatml"], tiny_base, folder, max_tokens=512)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.update(ends)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, **ends)
    model.save_pretrained(folder)
    return folder


def with_variants(student: Student) -> Student:
    few = {"tuning_steps": 0, "calibration_traces": 8, "calibration_tokens": 64, "kl_tokens": 100}
    shape = {"hidden": 128, "ffn": 256, "heads": 4, "kv_heads": 4}
    variants = {name: few | ({"group_size": 64} if name in ("gptq-4bit", "awq-4bit") else {}) for name in ERROR}
    whole = student.model_dump()
    return Student.model_validate(whole | {"architecture": whole["architecture"] | shape, "variants": variants})


@pytest.fixture(scope="module")
def made(checkpoint: Path, sums_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Every kind of variant, made in one worker."""
    from r1distill.data.config import load

    student = with_variants(load("students", "smollm2-135m", Student, {"name": "tiny"}))
    out, here = tmp_path_factory.mktemp("variants"), tmp_path_factory.mktemp("here")
    (out / ".work").mkdir()
    with contextlib.chdir(here):
        result = quantise.build(student, checkpoint, sums_dataset, out)
    return SimpleNamespace(student=student, out=out, here=here, result=result)


def test_every_variant_is_sound_near_its_checkpoint_and_has_its_files(made, checkpoint: Path) -> None:
    made.result.check("variants")
    for name, facts in made.result.metrics.items():
        assert facts["problems"] == [] and 80 <= facts["kl_tokens"] <= 100, name
        assert 0 <= facts["kl"] < 0.1, (name, facts)
        if facts["kind"] != "gguf":
            assert all((made.out / name / f).read_bytes() == (checkpoint / f).read_bytes() for f in KEPT_FILES)
            assert json.loads((made.out / name / "config.json").read_text())["dtype"] == "bfloat16"
    assert "FROM ./tiny-Q8_0.gguf" in (made.out / "q8_0" / "Modelfile").read_text()
    eight, four = (made.result.metrics[name]["kl"] for name in ("q8_0", "gptq-4bit"))
    assert eight < four
    assert not list(made.here.iterdir())  # nothing is left where the command was typed


@pytest.mark.parametrize("name", ERROR)
def test_dequantised_weights_are_the_checkpoints(made, checkpoint: Path, name: str) -> None:
    theirs, ours = weights(checkpoint), weights(made.out / name)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        one, other = (which.get(f"model.layers.1.{kind}.weight") for which in (theirs, ours))
        assert one.shape == other.shape
        if ERROR[name] is not None:
            assert float((one - other).norm() / one.norm()) < ERROR[name], kind
    assert (ours.inputs(LAYER) is not None) == (name in ("int8", "fp8", "fp8-block"))


def test_a_second_run_keeps_what_is_whole_and_asks_for_what_is_not(made, checkpoint, sums_dataset, monkeypatch) -> None:
    asked: list[dict] = []
    monkeypatch.setattr(quantise.worker, "run", lambda module, job, work, launchers: asked.append(job) or iter(()))
    assert quantise.build(made.student, checkpoint, sums_dataset, made.out).metrics == made.result.metrics
    assert asked == []
    facts = made.out / ".work" / "int8.json"
    told = facts.read_text()
    facts.unlink()  # as if it had been cut off before it was told of
    kept = made.out / "int8" / "config.json"
    folder = made.out.parent / "int8-aside"
    shutil.copytree(made.out / "int8", folder)
    with pytest.raises(FileNotFoundError):  # the worker that would make it is not there
        quantise.build(made.student, checkpoint, sums_dataset, made.out)
    assert [job["variants"] for job in asked] == [["int8"]] and not kept.exists()
    folder.rename(made.out / "int8")
    facts.write_text(told)


def test_scales_searched_for_in_pieces_make_the_same_file(
    made, checkpoint, sums_dataset, tmp_path, monkeypatch
) -> None:
    from auto_round.data_type import gguf
    from transformers import AutoTokenizer

    pieces: dict[str, int] = {}

    def seen(name: str, search: Callable) -> Callable:
        def searched(*args, **kwargs):
            pieces[name] = max(pieces.get(name, 1), kwargs["split_num"])
            return search(*args, **kwargs)

        return searched

    for name in ("make_qx_quants_chunk", "iterative_wls_quant_search"):
        monkeypatch.setattr(gguf, name, seen(name, getattr(gguf, name)))
    monkeypatch.setattr(quantise, "SEARCHED_AT_ONCE", 1 << 10)
    student, tokenizer = made.student, AutoTokenizer.from_pretrained(checkpoint)
    calibrated = quantise.calibration(student, student.variants["q4_k_m"], tokenizer, sums_dataset)
    file = next(quantise.make(student, "q4_k_m", calibrated, checkpoint, tmp_path).glob("*.gguf"))
    assert file.read_bytes() == (made.out / "q4_k_m" / file.name).read_bytes()
    assert len(pieces) == 2 and min(pieces.values()) > 4


# Damaged on purpose.


@pytest.fixture
def damaged(made, tmp_path) -> Callable[..., Path]:
    """A copy of a variant in safetensors whose tensors ``change`` has changed."""
    from safetensors.torch import load_file, save_file

    def copy(name: str, change: Callable[[dict], None] = lambda tensors: None) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(made.out / name, folder)
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return copy


@pytest.fixture
def verdicts(made, checkpoint, sums_dataset) -> Callable[[Path], dict[str, bool]]:
    """Whether a variant's folder passes its gates, found out as the variants stage does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = quantise._rows(sums_dataset, "validation")
    traces = (quantise._target(made.student, tokenizer, row["messages"]) for row in rows)
    reference = Reference(checkpoint, held_out(traces, 100))

    def look(folder: Path) -> dict[str, bool]:
        values = weights(folder)
        facts = {"problems": problems(folder, checkpoint, values), "kl": reference.divergence(values)}
        return {gate["name"]: gate["passed"] for gate in gates.variant("it", VariantGate(), facts, [], None, None)}

    return look


def test_zeroed_scales_and_shuffled_tensors_are_caught(damaged, verdicts) -> None:
    def zero(tensors: dict) -> None:
        tensors[f"{LAYER}.scales"].zero_()

    def shuffle(tensors: dict) -> None:
        tensors[f"{LAYER}.qweight"] = tensors[f"{LAYER}.qweight"].roll(5, 0).flip(1).contiguous()

    assert verdicts(damaged("gptq-4bit")) == {"soundness": True, "divergence in nats": True}
    assert verdicts(damaged("gptq-4bit", zero)) == {"soundness": False, "divergence in nats": False}
    assert verdicts(damaged("gptq-4bit", shuffle)) == {"soundness": True, "divergence in nats": False}


def test_wrong_templates_missing_ends_and_missing_tensors_are_caught(damaged, made, checkpoint, tmp_path) -> None:
    def found(folder: Path) -> str:
        return "\n".join(problems(folder, checkpoint, weights(folder)))

    def lose(tensors: dict) -> None:
        tensors["model.norm.weight"][0] = float("nan")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].clone()
        del tensors[f"{LAYER}.weight"], tensors[f"{LAYER}.weight_scale"]

    lost = found(damaged("int8", lose))
    assert all(problem in lost for problem in ("not finite", "has shape", f"{LAYER}.weight is missing"))

    folder = damaged("int8")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    assert "chat_template.jinja is not the checkpoint's" in found(folder)
    assert "config.json has eos_token_id None" in found(folder)

    # A GGUF file carries both itself: another checkpoint's file must not pass for this one's.
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    (other / "chat_template.jinja").write_text("another")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "eos_token_id": 5, "rope_parameters": {"rope_theta": 5e5}})
    )
    wrong = "\n".join(problems(made.out / "q8_0", other, weights(made.out / "q8_0")))
    assert all(key in wrong for key in ("chat_template", "eos_token_id", "rope.freq_base"))


def test_a_runtime_with_another_template_is_caught(made, checkpoint, tmp_path) -> None:
    from r1distill.teacher.serve import LlamaSpec, serving

    probes = json.loads((made.out / quantise.PROBES).read_text())
    assert len(probes["conversations"]) == 3 and probes["texts"]
    gguf = next((made.out / "q8_0").glob("*.gguf"))
    system = "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    for template, right in ((None, True), (system + TEMPLATES["chatml"].chat_template(), False)):
        spec = LlamaSpec(gguf, "tiny", context_tokens=256, slots=1, chat_template=template)
        renderings = Renderings(tmp_path, probes)
        with serving(spec, tmp_path) as endpoint:
            renderings.look(endpoint, "llama.cpp", f"tiny {right}")
        found = Renderings(tmp_path, probes).of(f"tiny {right}")  # by another run, without serving again
        assert found is not None and (found == []) is right, found
    assert Renderings(tmp_path, probes).of("never served") is None


def test_calibration_reads_the_middle_and_the_end_of_long_traces(made, checkpoint, sums_dataset) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings = made.student.variants["int8"].model_copy(update={"calibration_traces": 24})
    pieces = quantise.calibration(made.student, settings, tokenizer, sums_dataset)
    assert pieces.shape[1] == 64 and len(pieces) > 10
    text = "".join(tokenizer.decode(piece) for piece in pieces)
    for number in (4, 9, 14):  # the longest traces: thinking of four lines
        assert f"{number}+{number * 7}=?" in text and f"{number}+3={number + 3}" in text
        assert f"\\boxed{{{number * 8}}}<|im_end|>" in text


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Split", "pattern": {"Regex": quantise.QWEN2}}, {"type": "ByteLevel", "use_regex": False}], "qwen2"),
        ([{"type": "Split", "pattern": {"Regex": quantise.LLAMA3}}, {"type": "ByteLevel"}], "llama-bpe"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": "\\s+"}}, {"type": "ByteLevel"}], None),
        ([{"type": "Metaspace"}], None),
    ],
)
def test_llama_cpp_is_told_how_text_is_cut(tmp_path, parts, name) -> None:
    spec = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    if name is None:
        with pytest.raises(R1DistillError, match="Leave the GGUF variants out"):
            quantise.pre_tokenizer(tmp_path)
    else:
        assert quantise.pre_tokenizer(tmp_path) == name
