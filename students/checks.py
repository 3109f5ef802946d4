"""The preflight's checks, each a generator of the problems that it finds in a student's files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from r1distill.data.thinking import CLOSE, OPEN
from r1distill.students.base import SAMPLING
from r1distill.students.subject import (
    ADAPTER,
    ANSWER,
    CONFIG,
    GENERATION,
    PROBE,
    QUESTION,
    SETTINGS,
    SYSTEM,
    THINKING,
    TOKENIZER,
    Subject,
    shapes,
)
from r1distill.students.template import BOS, EOS, IGNORE, Message, renamed_rows

WEIGHTS, STUDENT = "model.safetensors", "the student's file"
SHIP = "Ship the chat template that the packs stage writes."


@dataclass(frozen=True)
class Problem:
    """A file of the folder (or the student's), what was found in it, and what to do."""

    file: str
    found: str
    remedy: str


Check = Callable[[Subject], Iterator[Problem]]
CHECKS: dict[str, Check] = {}  # in the order in which they are told


def check_named(name: str) -> Callable[[Check], Check]:
    """Append the decorated function to the checks; its docstring is what holds where it finds nothing."""

    def add(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return add


@check_named("special tokens")
def _special_tokens(subject: Subject) -> Iterator[Problem]:
    """every special token is one id, renamed in the base vocabulary, and no row is added to the embedding"""
    rename = "Rename the base's token at that id, as the packs stage does; add no tokens."
    counts = Counter(added["content"] for added in subject.spec["added_tokens"])
    ids = {added["content"]: added["id"] for added in subject.spec["added_tokens"]}
    special = {added["content"] for added in subject.spec["added_tokens"] if added["special"]}
    expected = subject.vocabulary.tokens if subject.vocabulary else {}
    for name in expected or [mark for mark in subject.template.controls if mark not in (OPEN, CLOSE)]:
        if name not in ids:
            yield Problem(TOKENIZER, f"{name} is no token of its own", rename)
        elif counts[name] > 1:
            yield Problem(TOKENIZER, f"{name} stands at {counts[name]} ids", rename)
        elif expected and ids[name] != expected[name]:
            yield Problem(TOKENIZER, f"{name} has id {ids[name]}, published is {expected[name]}", rename)
    for name in expected:
        if name in ids and (name in special) != (name in (BOS, EOS)):
            state = "special" if name in special else "not special"
            yield Problem(
                TOKENIZER,
                f"{name} is marked {state}",
                "Only begin and end are special: what is special is left out of a decoded answer.",
            )
    last = max([*ids.values(), *subject.spec["model"]["vocab"].values()])
    if last >= subject.shape.vocab:
        yield Problem(TOKENIZER, f"it has id {last}, the embedding has {subject.shape.vocab} rows", rename)
    elif subject.vocabulary and last + 1 != subject.vocabulary.size:
        yield Problem(TOKENIZER, f"it has {last + 1} ids, the base's has {subject.vocabulary.size}", rename)
    config = subject.settings(CONFIG) or {}
    if config.get("vocab_size", subject.shape.vocab) != subject.shape.vocab:
        yield Problem(
            CONFIG, f"vocab_size is {config['vocab_size']}, published is {subject.shape.vocab}", "Don't resize it."
        )


@check_named("encoding")
def _encoding(subject: Subject) -> Iterator[Problem]:
    """text is cut into the published ids, by transformers as by the tokenizer's own file"""
    from tokenizers import Tokenizer

    own = tuple(Tokenizer.from_file(str(subject.folder / TOKENIZER)).encode(PROBE, add_special_tokens=False).ids)
    if subject.vocabulary and own != subject.vocabulary.probe:
        yield Problem(
            TOKENIZER,
            f"{PROBE[:22]!r}… becomes other ids than with the published tokenizer",
            "Take the base's tokenizer.json as it is on the Hub: its merges, splitting or normalisation were changed.",
        )
    elif tuple(subject.plain(PROBE)) != own:
        kind = (subject.settings(SETTINGS) or {}).get("tokenizer_class")
        yield Problem(
            SETTINGS,
            f"transformers builds a {kind} that cuts {PROBE[:22]!r}… otherwise than tokenizer.json says",
            'Set "tokenizer_class": "PreTrainedTokenizerFast", which takes the file as it is.',
        )


@check_named("round trip")
def _round_trip(subject: Subject) -> Iterator[Problem]:
    """the training text comes back unchanged from its ids, thinking included"""
    text = subject.template.prefix([QUESTION]) + subject.template.target(ANSWER)
    found = str(subject.tokenizer.decode(subject.example[0], skip_special_tokens=False))
    if found != text:
        at = parting(found, text)
        yield Problem(
            TOKENIZER,
            f"{text[at : at + 20]!r} comes back as {found[at : at + 20]!r}",
            "Take the base's normalizer and decoder; set the added tokens' lstrip and rstrip to false, and so "
            "clean_up_tokenization_spaces in tokenizer_config.json.",
        )


@check_named("one BOS")
def _one_bos(subject: Subject) -> Iterator[Problem]:
    """begin of sentence stands once, in training, in the rendered prompt, and in a prompt that is tokenised as text"""
    token, template = subject.tokenizer.bos_token_id, subject.template
    text, rendered = subject.rendered([QUESTION], prompt=True)
    wanted = 1 if template.bos else 0
    if template.bos and subject.tokenizer.bos_token != template.bos:
        yield Problem(SETTINGS, f"bos_token is {subject.tokenizer.bos_token}", f"Set it to {template.bos}.")
    elif subject.example[0].count(token) != wanted:
        yield Problem(
            TOKENIZER, f"a training example has {subject.example[0].count(token)} BOS, not {wanted}", "Take the base's."
        )
    if rendered.count(token) != wanted:
        yield Problem(
            subject.chat, f"it writes {rendered.count(token)} BOS, not {wanted}", "Write it once, at the start."
        )
    if list(subject.tokenizer.encode(text)) != subject.plain(text):
        yield Problem(
            TOKENIZER,
            "tokenising a rendered prompt adds tokens: it begins with two BOS",
            "Take TemplateProcessing out of post_processor: the chat template writes the BOS.",
        )
    for name in (CONFIG, GENERATION):
        settings = subject.settings(name)
        if settings is not None and settings.get("bos_token_id") != token:
            found = f"bos_token_id is {settings.get('bos_token_id')}, the tokenizer's is {token}"
            yield Problem(name, found, "Set it to the tokenizer's.")


@check_named("loss mask")
def _loss_mask(subject: Subject) -> Iterator[Problem]:
    """the loss is taken on all that the assistant writes, end token included, and on nothing else"""
    ids, labels = subject.example
    learned = [place for place, label in enumerate(labels) if label != IGNORE]
    text = str(subject.tokenizer.decode([labels[place] for place in learned], skip_special_tokens=False))
    before = str(subject.tokenizer.decode(ids[: learned[0]], skip_special_tokens=False))
    wanted = subject.template.target(ANSWER)
    if text != wanted or learned != list(range(learned[0], len(ids))):
        yield Problem(TOKENIZER, f"what is learned reads {text[:40]!r}…{text[-20:]!r}", f"It should read {wanted!r}.")
    if not before.endswith(OPEN + "\n"):
        yield Problem(TOKENIZER, f"what is read before it ends in {before[-20:]!r}", f"It should end in {OPEN}\\n.")
    if subject.plain(subject.template.end) != [labels[-1]]:
        yield Problem(
            TOKENIZER, f"the last token learned is {labels[-1]}, not {subject.template.end}", "Make it one id."
        )


@check_named("thinking kept")
def _thinking_kept(subject: Subject) -> Iterator[Problem]:
    """the chat template shows a last answer with its thinking, in the training example's ids"""
    text, ids = subject.rendered([QUESTION, ANSWER], prompt=False)
    whole = subject.example[0]
    if THINKING not in text:
        yield Problem(subject.chat, "it deletes the thinking of the last answer", SHIP)
    elif ids[: len(whole)] != whole:
        place = parting(ids, whole)
        cut = subject.tokenizer.decode(ids[max(0, place - 3) : place + 5])
        yield Problem(subject.chat, f"it lays an answer out otherwise than training does, at {cut!r}", SHIP)


@check_named("generation prompt")
def _generation_prompt(subject: Subject) -> Iterator[Problem]:
    """the prompt at inference is the training prefix, token for token, with and without system text and turns before"""
    earlier: Message = {"role": "assistant", "content": "Two.", "thinking": None}
    for messages in ([QUESTION], [SYSTEM, QUESTION], [QUESTION, earlier, QUESTION]):
        prefix = subject.template.prefix(messages)
        text, ids = subject.rendered(messages, prompt=True)
        if text != prefix:
            at = parting(text, prefix)
            found = f"the prompt has {text[at : at + 30]!r} where training has {prefix[at : at + 30]!r}"
            yield Problem(subject.chat, found, SHIP)
            return
        if ids != subject.plain(prefix):
            yield Problem(subject.chat, "the prompt has other ids than the training prefix", SHIP)
            return


@check_named("end token")
def _end_token(subject: Subject) -> Iterator[Problem]:
    """answers end with the token that training teaches, and every settings file says so"""
    end = subject.plain(subject.template.end)
    if subject.tokenizer.eos_token != subject.template.end:
        yield Problem(SETTINGS, f"eos_token is {subject.tokenizer.eos_token}", f"Set it to {subject.template.end}.")
    for name in (CONFIG, GENERATION):
        settings = subject.settings(name)
        if settings is not None and end[0] not in _several(settings.get("eos_token_id")):
            found = f"eos_token_id is {settings.get('eos_token_id')}, the end that is learned has id {end[0]}"
            yield Problem(name, found, f"Set it to {end[0]}, or answers don't end.")


@check_named("padding")
def _padding(subject: Subject) -> Iterator[Problem]:
    """padding is a token of its own, never the end, and occurs in no training text"""
    remedy = f"Set it to {' or '.join(subject.template.pads)}: with the end as padding, masking pads masks the end."
    pad, end = subject.tokenizer.pad_token_id, subject.plain(subject.template.end)[0]
    if pad is None:
        yield Problem(SETTINGS, "there is no pad_token", remedy)
    elif pad == end or pad == subject.tokenizer.eos_token_id:
        yield Problem(SETTINGS, f"pad_token is the end token, {subject.tokenizer.pad_token}", remedy)
    elif pad in subject.example[0]:
        yield Problem(SETTINGS, f"pad_token {subject.tokenizer.pad_token} occurs in training text", remedy)
    for name in (CONFIG, GENERATION):
        settings = subject.settings(name)
        if settings is not None and settings.get("pad_token_id") in (None, *_several(settings.get("eos_token_id"))):
            yield Problem(name, f"pad_token_id is {settings.get('pad_token_id')}", remedy)


@check_named("renamed rows")
def _renamed_rows(subject: Subject) -> Iterator[Problem]:
    """the rows of the renamed tokens are trained, in both embeddings: every row, or under LoRA these"""
    method, table = subject.student.sft.method, subject.vocabulary
    if method.kind == "full" or table is None:
        return
    if not method.train_renamed_rows:
        yield Problem(
            STUDENT,
            f"sft.method trains an adapter and leaves the rows of {OPEN} and {CLOSE} as they are: noise",
            "Leave out sft.method.train_renamed_rows, or set it to true.",
        )
        return
    rows = renamed_rows(subject.template, subject.tokenizer)
    if missing := sorted(set(table.tokens.values()) - set(rows)):
        yield Problem(TOKENIZER, f"the rows {missing} would not be trained", "Rename the base's tokens as published.")
    adapter = subject.settings(ADAPTER)
    if adapter is None:
        return
    trained = adapter.get("trainable_token_indices") or {}
    for place in ("embed_tokens",) if subject.shape.tied else ("embed_tokens", "lm_head"):
        if missing := sorted(set(rows) - set(trained.get(place, ()))):
            yield Problem(ADAPTER, f"the rows {missing} of {place} were not trained", "Train again with them.")


@check_named("context")
def _context(subject: Subject) -> Iterator[Problem]:
    """position ids reach the packs' context, and no setting stops an answer before"""
    context, config = subject.student.packs.context_tokens, subject.settings(CONFIG) or {}
    limit = config.get("max_position_embeddings", subject.shape.max_position)
    if limit < context:
        yield Problem(
            CONFIG,
            f"max_position_embeddings is {limit}, packs have {context}",
            f"Set it to {subject.shape.max_position}.",
        )
    if config.get("use_sliding_window") and (config.get("sliding_window") or context) < context:
        found = f"attention sees the last {config['sliding_window']} tokens alone, packs have {context}"
        yield Problem(CONFIG, found, "Set use_sliding_window to false.")
    generation = subject.settings(GENERATION)
    if generation is None:
        if config:
            yield Problem(GENERATION, "it is missing", "Save it beside config.json.")
        return
    for key in ("max_new_tokens", "max_length"):
        if 0 < (generation.get(key) or 0) < context:
            yield Problem(
                GENERATION, f"{key} is {generation[key]}, answers have up to {context} tokens", "Take it out."
            )
    for key, value in SAMPLING.items():
        if generation.get(key) != value:
            remedy = f"Set it to {json.dumps(value)}: greedy or hot, long reasoning falls into loops."
            yield Problem(GENERATION, f"{key} is {json.dumps(generation.get(key))}", remedy)


@check_named("rope")
def _rope(subject: Subject) -> Iterator[Problem]:
    """the rotary frequencies are the published ones, or slower, and reach the packs' context"""
    shape, context, known = subject.shape, subject.student.packs.context_tokens, subject.published
    if known and (shape.rope_scaling != known.rope_scaling or shape.rope_theta < known.rope_theta):
        told, wanted = (
            f"{one.rope_theta:g}, " + (f"scaled by {one.rope_scaling.factor:g}" if one.rope_scaling else "unscaled")
            for one in (shape, known)
        )
        yield Problem(STUDENT, f"architecture.rope_theta is {told}", f"Published is {wanted}.")
    if (scaling := shape.rope_scaling) and scaling.factor * scaling.original_max_position_embeddings < context:
        reach = scaling.factor * scaling.original_max_position_embeddings
        yield Problem(STUDENT, f"rope_scaling reaches {reach:g} tokens, packs have {context}", "Raise its factor.")
    if config := subject.settings(CONFIG):
        its, ours = _frequencies(config), _frequencies(shape.to_config().to_dict())
        for key in sorted(ours.keys() | its.keys()):
            if its.get(key) != ours.get(key):
                yield Problem(CONFIG, f"{key} is {its.get(key)}", f"The student's file says {ours.get(key)}.")


@check_named("tied")
def _tied(subject: Subject) -> Iterator[Problem]:
    """input and output embedding are one matrix, or two, as published, and have the published rows"""
    tied, known = subject.shape.tied, subject.published
    if known and tied != known.tied:
        yield Problem(STUDENT, f"architecture.tied is {str(tied).lower()}", f"Published is {str(known.tied).lower()}.")
    config = subject.settings(CONFIG)
    if config and config.get("tie_word_embeddings", False) != tied:
        yield Problem(CONFIG, f"tie_word_embeddings is {json.dumps(not tied)}", f"Set it to {json.dumps(tied)}.")
    tensors = shapes(subject.folder)
    if not tensors:
        return
    if any(name.startswith("lm_head.") for name in tensors) == tied:
        found = f"its tensors are those of a model whose embeddings are {'not ' if tied else ''}tied"
        yield Problem(WEIGHTS, found, "Save the model again.")
    rows = tensors.get("model.embed_tokens.weight", [subject.shape.vocab])[0]
    if rows != subject.shape.vocab:
        found = f"the embedding has {rows} rows, published is {subject.shape.vocab}"
        yield Problem(WEIGHTS, found, "Don't resize it.")


@check_named("truncation")
def _truncation(subject: Subject) -> Iterator[Problem]:
    """a text of the packs' whole context keeps all of its tokens"""
    context = subject.student.packs.context_tokens
    cut = [key for key in ("truncation", "padding") if subject.spec.get(key) is not None]
    for key in cut:
        yield Problem(TOKENIZER, f"{key} is {json.dumps(subject.spec[key])[:60]}", f'Set "{key}" to null.')
    if subject.tokenizer.model_max_length < context:
        found = f"model_max_length is {subject.tokenizer.model_max_length}: longer traces and prompts are cut"
        yield Problem(SETTINGS, found, f"Set it to {subject.shape.max_position}.")
    elif not cut and len(subject.plain(" 7" * (context + 1))) <= context:
        yield Problem(TOKENIZER, f"a text of over {context} tokens is cut", "Take the base's tokenizer.json.")


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list) else (value,)


def parting(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """Where two sequences part."""
    shorter = min(len(found), len(wanted))
    return next((place for place in range(shorter) if found[place] != wanted[place]), shorter)


def _frequencies(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the rotary frequencies, from a config.json of today (rope_parameters) or of before."""
    before = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta")}
    rope = dict(config.get("rope_parameters") or before)
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    return {key: float(value) if isinstance(value, int) else value for key, value in rope.items()}
