"""The publication holds what passed, names what was withheld, can be read by others' libraries, and is refused whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess

import pytest

from r1distill.data.config import load
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.students import inventory, publish
from r1distill.students.catalogue import Student

from .conftest import sealed


def test_both_repositories_are_complete(publication, publishing):
    model = publication / "model"
    assert {path.name for path in model.iterdir()} >= {
        "README.md", "LICENSE", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "model.safetensors.index.json", "scores.json", "variants",
    }  # fmt: skip
    assert not list(publication.rglob("loss.json"))
    assert not list(model.rglob("manifest.json"))
    assert {path.name for path in (model / "variants").iterdir()} == set(publishing.variants)
    done = subprocess.run(
        ["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=publication, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout
    _, entries = publish.check(publication, publication.parent.parent)
    assert len(entries) == len((publication / "SHA256SUMS").read_text().splitlines())
    for one in entries:
        assert one.sha256 == hashlib.sha256((publication / one.path).read_bytes()).hexdigest()


def test_the_models_card_counts_the_traces_that_it_was_trained_on(inputs, publishing, lay_out):
    """Not those that were set aside for validation, or were too long for its packs."""
    sealed(inputs["checkpoint"], "checkpoint", metrics={"steps": 100}, kept=17)
    card = (lay_out(publishing) / "model" / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned on 17 reasoning traces of" in card


def test_what_it_learned_beyond_is_published_and_its_own_answers_are_not(inputs, publishing, lay_out):
    folder = inputs["beyond"] = inputs["checkpoint"].parent.parent / "beyond" / "tiny-beyond"
    shutil.copytree(inputs["checkpoint"], folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "state.json").write_text("{}")
    sealed(folder, "beyond", metrics={"steps": 1200, "last_right": 0.5})
    grpo = {"kind": "grpo", "steps": 1200}
    model = lay_out(Student.model_validate({**publishing.model_dump(), "beyond": grpo})) / "model"
    for file in folder.glob("*.safetensors"):
        assert (model / file.name).read_bytes() == file.read_bytes() != (inputs["checkpoint"] / file.name).read_bytes()
    assert not list(model.rglob("rollouts*"))
    card = (model / "README.md").read_text(encoding="utf-8")
    fingerprint = hashlib.sha256(b"beyond").hexdigest()
    for words in ("1,200 steps with GRPO", "- group size: 16", "- last right: 0.5", f"- beyond: `{fingerprint}`"):
        assert words in card


def test_the_hubs_own_parser_reads_the_models_card(publication):
    from huggingface_hub import ModelCard

    card = ModelCard.load(publication / "model" / "README.md")
    assert card.data.license == "mit"
    assert card.data.datasets == ["Tiny-Traces"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("pass@1", 70.0, "Sums")
    assert (result.dataset_type, result.dataset_revision) == ("org/sums", "2" * 40)
    assert result.metric_args == {"interval_95": [60.0, 80.0], "questions": 10, "k": 2}
    assert card.data.model_name == "Tiny-R1"
    stages = re.findall(r"^- (\w+): `[0-9a-f]{64}`", card.text, re.MULTILINE)
    assert stages == ["prompts", "traces", "verdicts", "dataset", "packs", "checkpoint", "variants", "scores"]
    for words in (
        "60.0% – 80.0%",
        "vllm serve Tiny-R1",
        "variants/int8",
        "0.0100",
        "0.001 GB | 0.002 GB | 40 |",
        "98.7%",
        "## Limits",
        "Earlier turns",
    ):
        assert words in card.text
    assert "__" not in card.text


def test_the_card_says_whose_probabilities_were_learned(inputs, publishing, tmp_path):
    out = tmp_path / "home" / "publication" / "tiny-taught"
    out.mkdir(parents=True)
    lineage = {"base": "base", "teacher": "r1", "probabilities_of": f"first@{'e' * 64}"}
    publish.build(publishing, inputs, inputs["checkpoint"], out, tmp_path / "home", lineage=lineage)
    card = (out / "model" / "README.md").read_text()
    assert f"also learned the probabilities that `first@{'e' * 64}` gives" in card
    assert f"- probabilities of: `first@{'e' * 64}`" in card


def test_the_datasets_card_opens_with_datasets(changed, lay_out, tmp_path):
    from datasets import load_dataset
    from huggingface_hub import DatasetCard

    folder = lay_out(changed(rejected_traces=True)) / "dataset"
    card = DatasetCard.load(folder / "README.md")
    assert (card.data.license, card.data.size_categories) == ("mit", ["n<1K"])
    splits = load_dataset(str(folder), "default", cache_dir=str(tmp_path / "cache"))
    rejected = load_dataset(str(folder), "rejected", split="rejected", cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, splits.values())) == 9
    assert rejected["reason"] == ["correctness: another answer"] * 3
    assert [one["content"] for one in rejected["messages"][0]] == ["What is 3+1?", "\\boxed{4}"]
    chosen = {row["prompt_id"] for split in splits.values() for row in split}
    assert chosen | set(rejected["prompt_id"]) == {f"p{number:03}" for number in range(12)}
    assert "| correctness: another answer | 3 |" in card.text
    assert len(re.findall(r"^- \w+: `[0-9a-f]{64}`", card.text, re.MULTILINE)) == 4


def test_rejected_traces_stay_here_unless_asked_for(publication):
    assert not (publication / "dataset" / "rejected").exists()
    assert 'config_name": "rejected' not in (publication / "dataset" / "README.md").read_text()


def test_a_variant_that_failed_its_gate_is_withheld_and_named(failing, lay_out, publishing):
    failing("int8")
    folder = lay_out(publishing)
    assert json.loads((folder / "manifest.json").read_text())["rejected"] == {"failed its gate": 1}
    assert {path.name for path in (folder / "model" / "variants").iterdir()} == {"int8-b"}
    card = (folder / "model" / "README.md").read_text()
    assert "withheld: recovered accuracy: 50.0%" in card
    assert "vllm serve ./variants/int8 " not in card
    assert publish.check(folder, folder.parent.parent)


@pytest.mark.parametrize("model", ["checkpoint", "reproduction"])
def test_a_gate_that_stands_before_all_stops_the_publication(failing, lay_out, publishing, model):
    failing(model)
    with pytest.raises(R1DistillError, match=f"{model}: recovered accuracy: 50.0%. Nothing is published"):
        lay_out(publishing)


def test_files_that_fail_their_preflight_are_not_published(inputs, lay_out, publishing):
    template = inputs["checkpoint"] / "chat_template.jinja"
    template.write_text(template.read_text().replace("<think>", ""))
    with pytest.raises(R1DistillError, match=r"(?s)fail their preflight.*\n- generation prompt: .*chat_template.jinja"):
        lay_out(publishing)


# Licences.


@pytest.mark.parametrize(
    ("licence", "why"),
    [
        ("cc-by-nc-4.0", "it allows no commercial use"),
        ("cc-by-nd-4.0", "it allows no works made from it"),
        ("cc-by-sa-4.0", "has to carry the same licence"),
        ("other", "it is not known"),
        ("", "it is not known"),
        ("my-own", "not in the table"),
    ],
)
def test_a_sources_licence_that_forbids_it_stops_the_publication(licensed, lay_out, changed, licence, why):
    licensed(licence)
    with pytest.raises(RequestError, match=f"sums: 9 rows under '{licence}': .*{why}") as refused:
        lay_out(changed())
    assert "student.publication.accept_licences=" in str(refused.value)
    assert lay_out(changed(accept_licences=[licence]))


def test_llamas_terms_go_along_word_for_word(changed, inputs, lay_out, tiny_base):
    from r1distill.students import terms

    settings = {
        "license": "llama3.1",
        "base_license": "llama3.1",
        "repository": "Llama-Tiny",
        "notice": "Built with Llama",
    }
    with pytest.raises(R1DistillError, match="holds no file LICENSE"):
        lay_out(changed(**settings))
    base = inputs["checkpoint"].parent / "base"
    base.mkdir()
    text = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: …\n"
    (base / "LICENSE").write_text(text)
    (base / "USE_POLICY.md").write_text("# Use policy\n")
    student = changed(**settings)
    folder = lay_out(student.model_copy(update={"base": student.base.model_copy(update={"path": str(base)})}))
    model = folder / "model"
    assert (model / "LICENSE").read_text() == text
    assert (model / "USE_POLICY.md").read_text() == "# Use policy\n"
    assert (
        (model / "NOTICE")
        .read_text()
        .startswith("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright")
    )
    assert (model / "LICENSE-mit").read_text() == (terms.SHIPPED / "mit.txt").read_text()
    assert "**Built with Llama**" in (model / "README.md").read_text()
    (base / "LICENSE").write_text("another licence")
    with pytest.raises(R1DistillError, match="not the Llama 3.1 Community License"):
        lay_out(student.model_copy(update={"base": student.base.model_copy(update={"path": str(base)})}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repository": "me/R1-Distill-8B"}, "begins with 'Llama'"),
        ({"notice": None}, "Built with Llama"),
        ({"repository": "a/b/c"}, "publication.repository"),
    ],
)
def test_a_name_or_notice_that_llama_does_not_allow_is_an_error_of_the_configuration(change, words):
    with pytest.raises(RequestError, match=words):
        load("students", "llama-8b", Student, {f"publication.{key}": value for key, value in change.items()})


def test_qwens_students_carry_mit_and_apache(changed, lay_out):
    folder = lay_out(changed(license="mit", base_license="apache-2.0")) / "model"
    assert "Copyright (c) 2023 DeepSeek" in (folder / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in (folder / "LICENSE-apache-2.0").read_text()


def test_a_leak_stops_the_publication_when_it_is_laid_out(inputs, lay_out, publishing, changed):
    config = inputs["checkpoint"] / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "origin": "/scratch/me/base"}))
    with pytest.raises(R1DistillError, match="model/generation_config.json holds a path of a machine"):
        lay_out(publishing)
    assert publish.check(lay_out(changed(harmless=["/scratch/me"])), inputs["checkpoint"].parent.parent)


# Damage.


def cut(folder):
    file = next((folder / "model").glob("*.safetensors"))
    data = file.read_bytes()
    file.unlink()  # it is a hard link
    file.write_bytes(data[:-10])


def change_a_byte(folder):
    file = folder / "model" / "config.json"
    data = file.read_text()
    file.unlink()
    file.write_text(data.replace("512", "513", 1))


def other_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["decides"]["publication"] = {"repo": "x"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no publication"),
    "no card": (lambda folder: (folder / "model" / "README.md").unlink(), "model/README.md is missing"),
    "no sums": (lambda folder: (folder / "SHA256SUMS").unlink(), "not laid out by this version"),
    "cut weights": (cut, "its manifest says"),
    "another byte": (change_a_byte, "model/config.json is another than was built"),
    "a stray file": (lambda folder: (folder / "dataset" / "notes.txt").write_text("x"), "belongs to no publication"),
    "another version": (other_version, "not laid out by this version"),
    "another artifact": (lambda folder: (folder / "manifest.json").write_text('{"stage": "scores"}'), "no publication"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_in_one_message(publication, name):
    damage, words = DAMAGE[name]
    damage(publication)
    with pytest.raises(R1DistillError, match=words):
        publish.check(publication, publication.parent.parent)


def test_weights_that_are_cut_off_are_never_laid_out(inputs, lay_out, publishing):
    shard = sorted(inputs["checkpoint"].glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(R1DistillError, match=f"{shard.name} has .* it is cut off or damaged"):
        lay_out(publishing)
    shard.unlink()
    with pytest.raises(R1DistillError, match="can't be followed to its shards"):
        lay_out(publishing)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 64, (9).to_bytes(8, "little") + b"{]       "])
def test_a_file_that_is_no_safetensors_has_a_problem(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    assert "cut off or damaged" in inventory.safetensors_problem(tmp_path / "x.safetensors")
