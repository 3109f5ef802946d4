"""The students' tokenizers through tiktoken, which gives the same ids many times as fast.

Both are byte-level BPE. tiktoken merges by the rank of what comes out, the Rust tokenizer by the order of its list of
merges: where the list is in the order of the ids, as in all vocabularies that tiktoken itself has made (Qwen's, Llama
3's), these are one. Whatever else a tokenizer.json may ask for, it is left to the Rust tokenizer.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encode = Callable[[str], np.ndarray]


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encode | None:
    """A function from a text to its (T,) int32 ids, control tokens included; None where only the tokenizer will do."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    pattern, ranks = _pattern(spec), _ranks(spec["model"])
    if pattern is None or ranks is None or not _plain(spec["added_tokens"]):
        return None
    import tiktoken

    controls = {added["content"]: added["id"] for added in spec["added_tokens"]}
    ranks = {word: rank for word, rank in ranks.items() if rank not in set(controls.values())}
    made = tiktoken.Encoding("student", pat_str=pattern, mergeable_ranks=ranks, special_tokens=controls)
    composed = spec["normalizer"] is not None  # NFC, or _pattern would have none of it

    def encode(text: str) -> np.ndarray:
        if composed and not unicodedata.is_normalized("NFC", text):
            text = unicodedata.normalize("NFC", text)
        ids: np.ndarray = made.encode_to_numpy(text, allowed_special="all").astype(np.int32)
        return ids

    return encode


def _pattern(spec: dict[str, Any]) -> str | None:
    """The regular expression that cuts a text into words, where that is all that comes before the merges."""
    if spec["normalizer"] not in (None, {"type": "NFC"}):
        return None
    match spec["pre_tokenizer"]:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return str(pattern)
    return None


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """Every word's bytes and its id, which must be the order of its merge."""
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(name) for name in unusual):
        return None
    vocabulary = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocabulary.get(first + second, -1) for first, second in pairs]
    if not made or min(made) < 0 or any(after < before for before, after in itertools.pairwise(made)):
        return None
    letters = _letters()
    ranks = {
        bytes(letters[letter] for letter in word): rank
        for word, rank in vocabulary.items()
        if all(letter in letters for letter in word)
    }
    return ranks if all(bytes([byte]) in ranks for byte in range(256)) else None


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return letters | {chr(256 + number): byte for number, byte in enumerate(others)}


def _plain(added: list[dict[str, Any]]) -> bool:
    """Control tokens are taken wherever they stand, and none begins another."""
    names = sorted(one["content"] for one in added)
    flags = ("lstrip", "rstrip", "single_word")
    return not any(one[flag] for one in added for flag in flags) and not any(
        after.startswith(before) for before, after in itertools.pairwise(names)
    )
