"""The notebook over a traces artifact: it holds no output, and it runs."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from r1distill.data import schema, verdicts
from r1distill.data.config import ROOT
from r1distill.data.errors import RequestError
from r1distill.data.inspection import Traces

NOTEBOOK = ROOT / "data" / "notebooks" / "traces.ipynb"


def an_artifact(home: Path) -> Path:
    """Two questions, three answers to each, judged: folders as the runner leaves them."""
    names = {stage: f"test-{stage[0] * 8}" for stage in ("prompts", "traces", "verdicts")}
    prompts, traces, out = (home / stage / name for stage, name in names.items())
    about = {"domain": "math", "verifier": "math", "verifier_args": "{}", "source": "test", "license": "mit"}
    questions = [
        {**about, "prompt_id": key, "question": f"What is {n} + {n}?", "reference_answer": str(2 * n), "source_id": key}
        for key, n in (("a", 2), ("b", 8))
    ]
    schema.write(prompts, schema.PROMPT, questions)
    rows = []
    for key, said in (("a", ("4", "4", "5")), ("b", ("15", "17", "18"))):
        for sample, answer in enumerate(said):
            response = f"It is \\boxed{{{answer}}}."
            text = {
                "reasoning": "Let me add them up.",
                "response": response,
                "completion": f"Let me…</think>{response}",
            }
            state = {
                "state": "done",
                "finish_reason": "stop",
                "completion_tokens": 100 * (sample + 1),
                "teacher": "test",
            }
            rows.append({**dict.fromkeys(schema.TRACE.names), **text, **state, "prompt_id": key, "sample": sample})
    schema.write(traces, schema.TRACE, rows)
    settings = verdicts.VerdictSettings(workers=1)
    verdicts.build(settings, prompts, traces, out, home)
    inputs = {
        "prompts": {},
        "traces": {"prompts": "pppppppp"},
        "verdicts": {"prompts": "pppppppp", "traces": "tttttttt"},
    }
    for stage, name in names.items():
        identity = {"decides": {"verdicts": settings.identity()}}
        manifest = {"stage": stage, "fingerprint": stage[0] * 8, "inputs": inputs[stage], "identity": identity}
        (home / stage / name / "manifest.json").write_text(json.dumps(manifest))
    return traces


def test_a_folder_that_is_no_traces_artifact_is_told(tmp_path):
    traces = an_artifact(tmp_path)
    assert len(Traces(traces)) == 6
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "verdicts" / "test-vvvvvvvv"):
        with pytest.raises(RequestError, match=f"{folder} is no sealed artifact of the stage traces"):
            Traces(folder)
    (traces / "manifest.json").unlink()  # half-built
    with pytest.raises(RequestError, match="is no sealed artifact"):
        Traces(traces)


def test_it_holds_no_output():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("R1DISTILL_TRACES", str(an_artifact(tmp_path)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = ["".join(part.get("text", "") for part in cell.outputs) for cell in cells]
    assert "6 traces" in text[0]
    assert "correctness: wrong answer" in text[1]
    assert "  0.0%  b" in text[3]
    assert "── verdicts ──" in text[-1]
    assert "answer 5, reference 4" in text[-1]
    assert any("image/png" in part.get("data", {}) for part in cells[2].outputs)
