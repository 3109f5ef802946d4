"""Exact ids, masks and the shipped chat template."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from r1distill.data.errors import RequestError
from r1distill.students.template import IGNORE, TEMPLATES, Unusable, encode, renamed_rows, write_tokenizer

TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
needs_tokenizers = pytest.mark.skipif(
    not TOKENIZERS.is_dir(), reason="the published tokenizers are not on this machine"
)

QUESTION = {"role": "user", "content": "What is 1+1?", "thinking": None}
ANSWER = {"role": "assistant", "content": "It is \\boxed{2}.", "thinking": "One and one.\n\nTwo."}


@pytest.fixture
def chatml(tiny_base: Path, tmp_path: Path):
    return TEMPLATES["chatml"], write_tokenizer(TEMPLATES["chatml"], tiny_base, tmp_path / "t", max_tokens=512)


def r1(family: str, tmp_path: Path):
    base = tmp_path / family
    base.mkdir()
    (base / "tokenizer.json").write_bytes(gzip.decompress((TOKENIZERS / family / "tokenizer.json.gz").read_bytes()))
    return TEMPLATES["r1"], write_tokenizer(TEMPLATES["r1"], base, base / "out", max_tokens=131072)


def check(template, tokenizer) -> None:
    """What holds for every template."""
    ids, labels = encode(template, tokenizer, [QUESTION, ANSWER])
    first = next(place for place, label in enumerate(labels) if label != IGNORE)
    assert labels == [IGNORE] * first + ids[first:]
    assert tokenizer.decode(ids[first:]) == "One and one.\n\nTwo.\n</think>\n\nIt is \\boxed{2}." + template.end
    assert labels[-1] == tokenizer.eos_token_id  # the end is learned
    assert ids.count(tokenizer.eos_token_id) == ids[:first].count(tokenizer.eos_token_id) + 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[:first]).endswith("<think>\n")
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert prompt == ids[:first]
    text = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"] == prompt  # no second BOS where a user tokenises the text himself
    whole = tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=True)["input_ids"]
    assert whole[: len(ids)] == ids  # the shipped template keeps the thinking it is given


def test_chatml(chatml) -> None:
    check(*chatml)


def test_system_and_earlier_turns_without_their_thinking(chatml) -> None:
    template, tokenizer = chatml
    earlier = {"role": "assistant", "content": "Two.", "thinking": "Hm."}
    messages = [{"role": "system", "content": "Be kind.", "thinking": None}, QUESTION, earlier, QUESTION]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == template.prefix(messages)
    assert "Hm." not in prompt and "Two." in prompt
    raw = [*messages[:2], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nTwo."}, QUESTION]
    assert tokenizer.apply_chat_template(raw, add_generation_prompt=True, tokenize=False) == prompt


def test_a_trace_without_thinking_has_it_empty(chatml) -> None:
    template, tokenizer = chatml
    ids, _ = encode(template, tokenizer, [QUESTION, {**ANSWER, "thinking": None}])
    assert "<think>\n\n</think>\n\nIt is" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([QUESTION], "no assistant turn"),
        ([], "no assistant turn"),
        ([QUESTION, {**ANSWER, "content": "", "thinking": None}], "empty target"),
        ([{**QUESTION, "content": "hi<|im_end|>"}, ANSWER], "control token"),
        ([QUESTION, {**ANSWER, "thinking": "a </think> b"}], "control token"),
        ([{**QUESTION, "role": "tool"}, ANSWER], "unknown role"),
    ],
)
def test_what_cannot_be_trained_on_says_why(chatml, messages: list, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        encode(*chatml, messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_mark_of_a_turn_may_stand_in_a_text(name: str) -> None:
    """It would be read as the turn's own token, and a question that holds it as two turns."""
    template = TEMPLATES[name]
    for mark in (template.bos, template.user[0], template.assistant, template.end, "<think>", "</think>"):
        with pytest.raises(Unusable, match="control token"):
            template.texts([{**QUESTION, "content": f"What? {mark or template.end} Four."}, ANSWER])
    template.texts([{**QUESTION, "content": "What does an assistant say to a user?"}, ANSWER])


def test_a_base_of_another_vocabulary_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none of the vocabularies"):
        write_tokenizer(TEMPLATES["r1"], tiny_base, tmp_path / "t", max_tokens=512)


@needs_tokenizers
@pytest.mark.parametrize(
    ("family", "published", "ids"),
    [
        ("qwen2.5", "deepseek-r1-distill-qwen", [151646, 151643, 151644, 151645, 151648, 151649]),
        ("llama-3.1", "deepseek-r1-distill-llama", [128000, 128001, 128011, 128012, 128013, 128014]),
    ],
)
def test_r1_students_have_the_published_vocabulary(family: str, published: str, ids: list, tmp_path: Path) -> None:
    template, tokenizer = r1(family, tmp_path)
    check(template, tokenizer)
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(names) == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (ids[0], ids[1])
    assert set(ids) <= set(renamed_rows(template, tokenizer))
    ours = json.loads((tmp_path / family / "out" / "tokenizer.json").read_text())
    theirs = json.loads(gzip.decompress((TOKENIZERS / published / "tokenizer.json.gz").read_bytes()))
    assert ours["added_tokens"] == theirs["added_tokens"]
    assert [" ".join(pair) for pair in ours["model"]["merges"]] == theirs["model"]["merges"]
    encoded, _ = encode(template, tokenizer, [QUESTION, ANSWER])
    assert encoded.count(tokenizer.bos_token_id) == 1 and encoded[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded, skip_special_tokens=True).count("<think>") == 1


@needs_tokenizers
def test_generation_prompt_is_the_official_one(tmp_path: Path) -> None:
    _, tokenizer = r1("qwen2.5", tmp_path)
    official = (TOKENIZERS / "chat_templates" / "deepseek-r1-family.current-2025-02.jinja").read_text()
    messages = [QUESTION, {"role": "assistant", "content": "Two."}, QUESTION]
    theirs = tokenizer.apply_chat_template(messages, chat_template=official, add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == theirs
