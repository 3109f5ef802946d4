"""Selection: policies, the band of difficulty, proportions of domains; read = chosen + rejected, always."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from r1distill.data import schema
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.selection import Removed, choose, removed
from r1distill.data.settings import CHECKS, Selection, VerdictSettings

EMPTY = dict.fromkeys(schema.TRACE.names)


def made(folder: Path, samples: dict[str, str], lengths: dict[str, list[int]] | None = None) -> tuple[pa.Table, Path]:
    """A TRACE table and its verdicts: {prompt: a letter a sample}; c correct, w wrong, u unverifiable, l looping,
    b both wrong and looping."""
    traces = [
        {**EMPTY, "prompt_id": prompt, "sample": number, "completion_tokens": (lengths or {}).get(prompt, [10] * 9)[number]}
        for prompt, letters in samples.items()
        for number in range(len(letters))
    ]  # fmt: skip
    found = {"w": {"correctness": "fail"}, "u": {"correctness": "unverifiable"}, "l": {"repetition": "fail"}}
    found["b"] = found["w"] | found["l"]
    verdicts = [
        {"prompt_id": prompt, "sample": number, "check": check, "outcome": found.get(letter, {}).get(check, "pass"),
         "reason": "so" if check in found.get(letter, {}) else None, "detail": None, "version": "1"}
        for prompt, letters in samples.items() for number, letter in enumerate(letters) for check in CHECKS
    ]  # fmt: skip
    schema.write(folder / "traces", schema.TRACE, traces)
    schema.write(folder / "verdicts", schema.VERDICT, verdicts)
    return schema.read(folder / "traces", schema.TRACE), folder / "verdicts"


def select(folder: Path, samples: dict[str, str], domains: dict[str, str] | None = None, **settings):
    lengths = settings.pop("lengths", None)
    rules = VerdictSettings(**settings.pop("rules", {}))
    traces, verdicts = made(folder, samples, lengths)
    choice = choose(Selection(**settings), rules, traces, verdicts, domains or dict.fromkeys(samples, "math"))
    assert len(choice.chosen) + choice.rejected.total() == traces.num_rows
    return choice


def test_first_shortest_and_all(tmp_path):
    samples, lengths = {"a": "wccc", "b": "ww"}, {"a": [1, 30, 20, 25], "b": [1, 1]}
    pick = lambda name, **settings: select(tmp_path / name, samples, lengths=lengths, **settings)  # noqa: E731
    assert pick("first").chosen == {("a", 1)}
    assert pick("shortest", policy="shortest").chosen == {("a", 2)}
    assert pick("two", policy="shortest", per_prompt=2).chosen == {("a", 2), ("a", 3)}
    every = pick("all", policy="all")
    assert every.chosen == {("a", 1), ("a", 2), ("a", 3)}
    assert every.rejected == {"correctness: so": 3}
    assert every.pass_rates == {"a": 0.75, "b": 0.0}


def test_the_band_of_difficulty_is_of_prompts_and_its_ends_belong_to_it(tmp_path):
    samples = {"never": "wwww", "hard": "cwww", "even": "ccww", "easy": "cccc", "open": "uuuu"}
    choice = select(
        tmp_path, samples, policy="all", pass_rate={"min": 0.25, "max": 0.5}, rules={"keep_unverified": ["math"]}
    )
    assert {prompt for prompt, _ in choice.chosen} == {"hard", "even", "open"}
    assert choice.rejected["its prompt is too easy"] == 4
    assert "open" not in choice.pass_rates  # nobody knows how hard it is


def test_a_request_that_failed_makes_no_prompt_harder(tmp_path):
    """The verdicts fail it, in its form; the teacher was right as often as it answered."""
    traces, verdicts = made(tmp_path, {"a": "cccw", "b": "w"})
    states = pa.array(["done", "done", "done", "failed", "failed"], pa.string())
    traces = traces.set_column(traces.schema.get_field_index("state"), "state", states)
    settings = Selection.model_validate({"policy": "all", "pass_rate": {"min": 0.9, "max": 1}})
    choice = choose(settings, VerdictSettings(), traces, verdicts, dict.fromkeys("ab", "math"))
    assert choice.pass_rates == {"a": 1.0}
    assert choice.chosen == {("a", 0), ("a", 1), ("a", 2)}


def test_unverifiable_traces_are_kept_only_where_the_configuration_says_so(tmp_path):
    domains = {"poem": "general", "sum": "math"}
    choice = select(tmp_path, {"poem": "u", "sum": "u"}, domains, rules={"keep_unverified": ["general"]})
    assert choice.chosen == {("poem", 0)}
    assert choice.rejected == {"correctness: so": 1}


def test_proportions_give_the_largest_selection_that_keeps_them(tmp_path):
    samples = {
        f"{domain}{number}": "c" for domain, count in (("m", 50), ("k", 20), ("x", 5)) for number in range(count)
    }
    domains = {prompt: {"m": "math", "k": "code", "x": "logic"}[prompt[0]] for prompt in samples}
    choice = select(tmp_path / "1", samples, domains, proportions={"math": 4, "code": 2})
    assert Counter(domains[prompt] for prompt, _ in choice.chosen) == {"math": 40, "code": 20}
    assert choice.rejected == {"over its domain's quota": 15}
    fewer = select(tmp_path / "2", samples, domains, proportions={"math": 2, "code": 2})
    assert {key for key in fewer.chosen if key[0][0] == "m"} < {key for key in choice.chosen if key[0][0] == "m"}
    with pytest.raises(RequestError, match="wants traces of the domain stem"):
        select(tmp_path / "3", samples, domains, proportions={"math": 1, "stem": 1})


def test_what_each_check_removed_alone_and_together(tmp_path):
    _, verdicts = made(tmp_path, {"a": "cwlb", "b": "wu"})
    found = {one.check: one for one in removed(verdicts)}
    assert found["correctness"] == Removed("correctness", traces=3, alone=2)
    assert found["repetition"] == Removed("repetition", traces=2, alone=1)
    assert found["language"] == Removed("language", traces=0, alone=0)


def test_verdicts_of_other_traces_are_refused(tmp_path):
    traces, _ = made(tmp_path / "1", {"a": "cc"})
    _, verdicts = made(tmp_path / "2", {"b": "cc"})
    with pytest.raises(R1DistillError, match="judges other traces"):
        choose(Selection(), VerdictSettings(), traces, verdicts, {"a": "math"})


def test_of_nearly_equal_thinkings_the_first_stays(tmp_path):
    text = (
        "Let me think about the apples that Ann has and the pears that Bob gave her on a sunny day in the garden. " * 3
    )
    other = "We write the equation down and solve it for the unknown, then we put it back to see that it holds true."
    traces, verdicts = made(tmp_path, {"a": "cc", "b": "cc"})
    thinkings = [text, text + "So 5.", other, text.replace("sunny", "rainy")]
    traces = traces.set_column(
        traces.schema.get_field_index("reasoning"), "reasoning", pa.array(thinkings, pa.string())
    )
    settings = Selection(policy="all", near_duplicates=0.7)
    choice = choose(settings, VerdictSettings(), traces, verdicts, dict.fromkeys("ab", "math"))
    assert choice.chosen == {("a", 0), ("b", 0)}
    assert choice.rejected == {"near duplicate of another trace": 2}
