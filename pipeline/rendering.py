"""Whether a runtime reads a conversation as the checkpoint's tokenizer does: token for token, special tokens included.

A wrong chat template, a second BOS or an end token that is read as letters costs accuracy without any error.
Asked of the server that answers: vLLM tokenises a conversation itself, llama.cpp lays it out and tokenises the text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError
from r1distill.data.verify.check import Finding
from r1distill.data.verify.findings import Findings, content_key, finding_key, rule_key
from r1distill.teacher.serve import Endpoint


def differences(base_url: str, runtime: str, model: str, probes: dict[str, Any]) -> list[str]:
    """What the server at ``base_url`` (ending in /v1) reads otherwise than ``probes`` say; a sentence each.

    ``probes`` are what ``students.quantise.probes`` wrote: conversations and texts, each with its ids.
    """
    import httpx

    found: list[str] = []
    root = base_url.removesuffix("/v1")
    with httpx.Client(base_url=root, trust_env=False, timeout=60) as http:

        def ask(path: str, body: dict[str, Any]) -> dict[str, Any]:
            try:
                answer = http.post(path, json=body).raise_for_status().json()
            except (httpx.HTTPError, ValueError) as error:
                raise R1DistillError(
                    f"the server of {model} did not answer {path} ({error}). Its log says more."
                ) from None
            assert isinstance(answer, dict)
            return answer

        for number, talk in enumerate(probes["conversations"]):
            if runtime == "vllm":
                ids = ask("/tokenize", {"model": model, "messages": talk["messages"]})["tokens"]
            else:
                text = ask("/apply-template", {"messages": talk["messages"]})["prompt"]
                ids = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
            found += _difference(f"conversation {number + 1}", ids, talk["ids"])
        for number, probe in enumerate(probes["texts"]):
            body = {"model": model, "prompt": probe["text"], "add_special_tokens": False}
            if runtime != "vllm":
                body = {"content": probe["text"], "add_special": False, "parse_special": True}
            found += _difference(f"text {number + 1}", ask("/tokenize", body)["tokens"], probe["ids"])
    return found


def _difference(what: str, ids: list[int], expected: list[int]) -> list[str]:
    if ids == expected:
        return []
    place = next((n for n, (one, two) in enumerate(zip(ids, expected, strict=False)) if one != two), None)
    if place is None:
        return [f"{what} has {len(ids)} tokens, expected {len(expected)}"]
    return [f"{what} differs at token {place}: {ids[place]}, expected {expected[place]}"]


class Renderings:
    """What each model that was served reads otherwise, kept under its revision, so that it need not be served again."""

    def __init__(self, home: Path, probes: dict[str, Any]):
        self._home, self._probes = home / "findings", probes
        self._found: dict[str, list[str]] = {}

    def of(self, revision: str) -> list[str] | None:
        """The differences of a model; None where it was not looked at yet."""
        if revision not in self._found:
            with Findings(self._home) as findings:
                key = self._key(revision)
                if finding := findings.known([key]).get(key):
                    self._found[revision] = json.loads(finding.detail)
        return self._found.get(revision)

    def look(self, endpoint: Endpoint, runtime: str, revision: str) -> None:
        """Ask the server, unless this revision was looked at before."""
        if self.of(revision) is not None:
            return
        found = differences(endpoint.base_url, runtime, endpoint.model, self._probes)
        finding = Finding("fail" if found else "pass", "" if not found else "read otherwise", json.dumps(found))
        with Findings(self._home) as findings:
            findings.add({self._key(revision): finding})
        self._found[revision] = found

    def _key(self, revision: str) -> bytes:
        return finding_key(content_key(json.dumps(self._probes, sort_keys=True), revision), rule_key("rendering", 1))
