"""The pilot: a few prompts through traces and verdicts, and what the whole run would then cost and give.

It asks through the same ledger with the same keys, so the run that follows asks none of it again. Prompts are drawn by
their id, a hash: a random sample, and a larger pilot contains the smaller.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from r1distill.data import schema
from r1distill.data.errors import RequestError
from r1distill.data.selection import outcomes
from r1distill.pipeline.artifact import alone
from r1distill.pipeline.run import Run
from r1distill.teacher.settings import RecordedTeacher

Z = 1.96  # of a 95% interval


@dataclass(frozen=True)
class Forecast:
    """One quantity: its sum over the pilot, and over the whole run with a 95% interval."""

    name: str
    pilot: float
    whole: float
    low: float
    high: float


@dataclass(frozen=True)
class Pilot:
    """What a pilot of ``prompts`` out of ``all_prompts`` found. ``note`` says what its hours rest on."""

    prompts: int
    all_prompts: int
    samples: int
    states: dict[str, int]
    reasons: dict[str, int]
    forecasts: list[Forecast]
    note: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_pilot(run: Run, prompts: Path, count: int) -> Pilot:
    """Take ``count`` prompts of a prompts artifact through traces and verdicts, and extrapolate to all of them.

    Raises RequestError for a recorded teacher, whose answers are there and cost nothing, and while another pilot of
    these prompts runs.
    """
    from r1distill.data import verdicts
    from r1distill.teacher import traces

    if isinstance(run.teacher, RecordedTeacher):
        raise RequestError(f"the teacher '{run.teacher.name}' is recorded: a pilot has nothing to find out.")
    if count < 2:
        raise RequestError(f"--pilot takes at least 2 prompts, found {count}: one says nothing of the others.")
    work = run.home / "pilot" / prompts.name
    with alone(work):
        table = schema.read(prompts, schema.PROMPT)
        shutil.rmtree(work, ignore_errors=True)
        ids = table["prompt_id"].to_pylist()
        drawn = sorted(sorted(range(len(ids)), key=lambda place: str(ids[place]))[:count])
        schema.write(work / "prompts", schema.PROMPT, schema.rows(table.take(drawn)))
        for stage in ("traces", "verdicts"):
            (work / stage / ".work").mkdir(parents=True)
        folders = work / "prompts", work / "traces", run.home
        traces.build(run.teacher, *folders, run.prompts.instruction, run.hardware.ray_address)
        inputs = work / "prompts", work / "traces"
        judged = verdicts.build(run.prompts.verdicts, *inputs, work / "verdicts", run.home, judge=run.judge)
        return _forecast(run, work, len(drawn), len(ids), judged.rejected)


def _forecast(run: Run, work: Path, drawn: int, everything: int, reasons: dict[str, int]) -> Pilot:
    assert not isinstance(run.teacher, RecordedTeacher)
    in_flight, samples = run.teacher.client.in_flight, run.teacher.sampling.samples
    columns = ["prompt_id", "sample", "state", "completion_tokens", "prompt_tokens", "seconds", "cost_usd"]
    states: dict[str, int] = {}
    sums: dict[str, dict[str, float]] = {}  # quantity → prompt → its sum: answers to one prompt are not independent
    priced = False
    traces = schema.rows(schema.read(work / "traces", schema.TRACE), columns)
    required = run.prompts.verdicts.required
    for row, (_, outcome, _) in zip(traces, outcomes(work / "verdicts", required), strict=True):
        states[row["state"]] = states.get(row["state"], 0) + 1
        priced |= row["cost_usd"] is not None
        found = {
            "prompt tokens": row["prompt_tokens"] or 0,
            "completion tokens": row["completion_tokens"] or 0,
            "traces that pass": outcome == "pass",
            "hours": (row["seconds"] or 0) / in_flight / 3600,
            "US dollars": float(row["cost_usd"] or 0),
        }
        for name, value in found.items():
            by_prompt = sums.setdefault(name, {})
            by_prompt[row["prompt_id"]] = by_prompt.get(row["prompt_id"], 0) + value
    forecasts = [forecast(name, by.values(), everything) for name, by in sums.items() if priced or name != "US dollars"]
    note = f"Hours hold if answers take as long with {in_flight} in flight as they took in the pilot."
    if drawn * samples < 2 * in_flight:
        note += f" It had only {drawn * samples} requests: a server under full load is slower for each of them."
    return Pilot(drawn, everything, samples, states, reasons, forecasts, note)


def forecast(name: str, by_prompt: Iterable[float], everything: int) -> Forecast:
    """The sum over all prompts from the sums of those drawn, with the normal 95% interval for sampling without
    replacement; exact where everything was drawn."""
    values = list(by_prompt)
    n, mean = len(values), math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    error = Z * math.sqrt(variance / n * max(0.0, 1 - n / everything)) * everything
    return Forecast(
        name, math.fsum(values), mean * everything, max(0.0, mean * everything - error), mean * everything + error
    )
