"""Looking at a traces artifact: counts, reasons, lengths, pass rates, one trace laid out for reading."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from r1distill.data import schema
from r1distill.data.cards import BUCKETS, edge_name
from r1distill.data.errors import RequestError
from r1distill.data.selection import Removed, outcomes, removed


def newest(home: Path, stage: str = "traces") -> Path:
    """The artifact of a stage that was sealed last under ``home``; raises RequestError where there is none."""
    found = sorted(home.glob(f"{stage}/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RequestError(f"there is no {stage} artifact under {home}. Make one: make distill UNTIL={stage}")
    return found[-1].parent


class Traces:
    """A traces artifact with the prompts it was asked for and, where they exist, its verdicts."""

    def __init__(self, folder: Path):
        folder = Path(folder)
        manifest = _manifest(folder)
        self.table = schema.read(folder, schema.TRACE)
        home = folder.parent.parent
        self.prompts = {
            row["prompt_id"]: row
            for found in _sealed(home / "prompts", manifest["inputs"]["prompts"])
            for row in schema.rows(schema.read(found, schema.PROMPT))
        }
        self.verdicts_folder = next(_reading(home / "verdicts", "traces", manifest["fingerprint"]), None)
        self.outcomes = self._outcomes()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _outcomes(self) -> dict[tuple[str, int], tuple[str, str]]:
        if self.verdicts_folder is None:
            return {}
        manifest = json.loads((self.verdicts_folder / "manifest.json").read_text(encoding="utf-8"))
        required = manifest["identity"]["decides"]["verdicts"]["required"]
        return {key: (outcome, reason) for key, outcome, reason in outcomes(self.verdicts_folder, required)}

    def states(self) -> dict[str, int]:
        """Traces by state: done, truncated, refused, failed."""
        return dict(Counter(self.table["state"].to_pylist()).most_common())

    def reasons(self) -> dict[str, int]:
        """Traces by what their verdicts say: passed, or the first reason against them."""
        return dict(Counter(reason or "passed" for _, reason in self.outcomes.values()).most_common())

    def removed(self) -> list[Removed]:
        """What each check removed, alone and together with others."""
        return removed(self.verdicts_folder) if self.verdicts_folder else []

    def lengths(self) -> dict[int, int]:
        """Traces by completion tokens: {upper edge of the bucket: traces}."""
        found: Counter[int] = Counter()
        for tokens in self.table["completion_tokens"].to_pylist():
            found[next((edge for edge in BUCKETS if (tokens or 0) <= edge), BUCKETS[-1] + 1)] += 1
        return dict(sorted(found.items()))

    def pass_rates(self) -> dict[str, float]:
        """The share of passing traces of each question, lowest first: {prompt_id: rate}."""
        by_question: dict[str, list[bool]] = {}
        for (prompt_id, _), (outcome, _) in self.outcomes.items():
            by_question.setdefault(prompt_id, []).append(outcome == "pass")
        rates = {key: sum(passed) / len(passed) for key, passed in by_question.items()}
        return dict(sorted(rates.items(), key=lambda pair: pair[1]))

    def verdicts(self, prompt_id: str, sample: int) -> list[dict[str, Any]]:
        """All verdicts on one trace."""
        if self.verdicts_folder is None:
            return []
        table = schema.read(self.verdicts_folder, schema.VERDICT)
        return [r for r in schema.rows(table) if (r["prompt_id"], r["sample"]) == (prompt_id, sample)]

    def show(self, row: int) -> str:
        """One trace laid out for reading, with its verdicts."""
        if not 0 <= row < len(self):
            raise RequestError(f"there is no row {row}: the artifact has rows 0 to {len(self) - 1}.")
        trace = self.table.slice(row, 1).to_pylist()[0]
        prompt = self.prompts.get(trace["prompt_id"], {})
        parts = [
            f"prompt {trace['prompt_id']}, sample {trace['sample']}, {trace['teacher']}: {trace['state']}"
            f" ({trace['finish_reason']}), {trace['completion_tokens']} tokens",
            f"── question ──\n{prompt.get('question', trace['request_text'])}",
            f"── thinking ──\n{trace['reasoning']}",
            f"── response ──\n{trace['response']}",
            f"── reference ──\n{prompt.get('reference_answer')}",
            "── verdicts ──",
            *(
                f"{v['check']:<12} {v['outcome']:<13} {v['reason'] or ''} {v['detail'] or ''}".rstrip()
                for v in self.verdicts(trace["prompt_id"], trace["sample"])
            ),
        ]
        return "\n".join(parts)

    def describe(self) -> str:
        """Counts, reasons and lengths as text."""
        bars = _bars({edge_name(edge): count for edge, count in self.lengths().items()})
        rates = list(self.pass_rates().values())
        never, always = sum(rate == 0 for rate in rates), sum(rate == 1 for rate in rates)
        solved = [f"{never:,} questions never right, {always:,} always"] if rates else []
        heads = [f"{len(self):,} traces", *_lines(self.states()), "", "verdicts", *_lines(self.reasons()), *solved]
        heads += ["", "   fails     alone  check"] if self.verdicts_folder else []
        heads += [f"{one.traces:>8,}  {one.alone:>8,}  {one.check}" for one in self.removed()]
        return "\n".join([*heads, "", "completion tokens", *bars])


def _lines(counts: dict[str, int]) -> list[str]:
    return [f"{count:>8,}  {name}" for name, count in counts.items()] or ["       –  none yet"]


def _bars(counts: dict[str, int], width: int = 40) -> list[str]:
    most = max(counts.values(), default=1)
    return [f"{name:>12} {count:>8,} {'█' * round(width * count / most)}" for name, count in counts.items()]


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a traces artifact; raises RequestError where the folder is none."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["stage"] == "traces" and manifest["inputs"]["prompts"]:
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(
        f"{folder} is no sealed artifact of the stage traces. 'r1distill status' shows where there are any."
    )


def _sealed(folder: Path, fingerprint: str) -> list[Path]:
    return [path.parent for path in folder.glob(f"*-{fingerprint[:8]}/manifest.json")]


def _reading(folder: Path, stage: str, fingerprint: str) -> Any:
    """Artifacts of ``folder`` that were made from one artifact of ``stage``, the newest first."""
    for file in sorted(folder.glob("*/manifest.json"), key=lambda path: -path.stat().st_mtime):
        if json.loads(file.read_text(encoding="utf-8"))["inputs"].get(stage) == fingerprint:
            yield file.parent
