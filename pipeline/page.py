"""The report as a page, Markdown and HTML, from the artifacts alone: nothing is computed that they do not hold, nothing
is asked of a network, and the same artifacts make the same bytes."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1distill.data import schema
from r1distill.data.config import names
from r1distill.data.errors import RequestError
from r1distill.pipeline import plots, published, study
from r1distill.pipeline.report import differences, rank
from r1distill.pipeline.runner import stage_names

Manifest = dict[str, Any]

CSS = (
    "body{font:15px/1.5 sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;"
    "margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}th{background:#f4f4f4}"
    "img{max-width:100%}"
)


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    name: str
    title: str
    png: bytes


Block = Heading | Text | Table | Plot


def write(home: Path, student: str, out: Path) -> list[Path]:
    """Write ``out/<student>.md``, ``.html`` and the plots that the first shows; the files, in that order.

    Raises RequestError where the student has no artifact of its own yet.
    """
    stages = chain(home, student)
    blocks = list(_blocks(home, student, stages))
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{student}.md", out / f"{student}.html"]
    files[0].write_text(markdown(blocks, student), encoding="utf-8")
    files[1].write_text(as_html(blocks, f"r1distill: {student}"), encoding="utf-8")
    for block in blocks:
        if isinstance(block, Plot):
            files.append(out / f"{student}-{block.name}.png")
            files[-1].write_bytes(block.png)
    return files


def chain(home: Path, student: str) -> dict[str, tuple[Path, Manifest]]:
    """The newest artifacts of a student and all that they were made from: {stage: (folder, manifest)}, in order."""
    for stage in ("publication", "scores", "variants", "beyond", "checkpoint", "packs"):
        if newest := newest_of(home, stage, student):
            return _made_from(home, stage, newest)
    raise RequestError(f"there is nothing of '{student}' under {home} yet. Make it: make distill STUDENT={student}")


def _made_from(home: Path, stage: str, last: tuple[Path, Manifest]) -> dict[str, tuple[Path, Manifest]]:
    found = {stage: last}
    todo = [last[1]]
    while todo:
        for name, digest in todo.pop().get("inputs", {}).items():
            if name not in found and (one := _by_fingerprint(home, name, digest)):
                found[name] = one
                todo.append(one[1])
    return {name: found[name] for name in stage_names() if name in found}


def newest_of(home: Path, stage: str, label: str) -> tuple[Path, Manifest] | None:
    """The newest sealed artifact of a stage with this label."""
    found = [(path.parent, manifest) for path in (home / stage).glob("*/manifest.json") if (manifest := _read(path))]
    mine = [one for one in found if one[1].get("label") == label]
    return max(mine, key=lambda one: (one[1]["created_at"], one[0].name), default=None)


def _by_fingerprint(home: Path, stage: str, digest: str) -> tuple[Path, Manifest] | None:
    for path in sorted((home / stage).glob(f"*-{digest[:8]}/manifest.json")):
        if (manifest := _read(path)) and manifest["fingerprint"] == digest:
            return path.parent, manifest
    return None


def _read(file: Path) -> Manifest | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    # Scores of an earlier version say too little to be shown; the scores stage makes them again from the ledger.
    old = found.get("stage") == "scores" and "reproduction" not in found["metrics"].get("scores", {})
    return None if old else found


def _blocks(home: Path, student: str, stages: dict[str, tuple[Path, Manifest]]) -> Iterator[Block]:
    yield Heading(f"r1distill: {student}", 1)
    yield Heading("Rows in and out")
    yield _rows(stages)
    if "logits" in stages:
        yield from _probabilities(home, stages["logits"][1])
    if "beyond" in stages:
        yield from _own_answers(*stages["beyond"])
    if "scores" in stages:
        yield from _scores(*stages["scores"])
    else:
        yield Heading("Scores")
        yield Text("Not scored yet.")
    yield from _study(home, student)
    yield from _students(home)
    yield from _plots(stages)


def _rows(stages: dict[str, tuple[Path, Manifest]]) -> Table:
    rows = []
    for stage, (folder, manifest) in stages.items():
        reasons = sorted(manifest["rejected"].items(), key=lambda item: (-item[1], item[0]))
        gone = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        counts = [f"{manifest[key]:,}" for key in ("read", "kept")]
        rows.append([stage, *counts, manifest["unit"], f"{manifest['seconds']:.1f}", gone, folder.name])
    return Table(["stage", "read", "kept", "unit", "seconds", "rejected, by reason", "artifact"], rows)


def _probabilities(home: Path, logits: Manifest) -> Iterator[Block]:
    """Whose probabilities were learned; where that was trained here too, from what, and how it scored."""
    title, (settings, revision) = logits["metrics"]["teacher"], logits["identity"]["decides"]["teacher"]
    yield Heading("Whose probabilities it learned")
    yield Text(f"{title} ({revision}), its {logits['metrics']['k']} most probable tokens in {logits['kept']:,} places.")
    if settings["kind"] == "checkpoint" and (first := _by_fingerprint(home, "checkpoint", revision)):
        yield _rows(_made_from(home, "checkpoint", first))
        if scored := _scores_of(home, first[1]["fingerprint"]):
            for block in _scores(*scored):
                yield Heading(f"{title}: {block.text}", 3) if isinstance(block, Heading) else block


def _own_answers(folder: Path, beyond: Manifest) -> Iterator[Block]:
    """How it learned from its own answers, and how the first of them and the last were."""
    found, teacher = beyond["metrics"], beyond["identity"]["decides"]["teacher"]
    yield Heading("What it learned from its own answers")
    how = f"towards the probabilities of {found['teacher']} ({teacher[1]})" if teacher else "with GRPO"
    yield Text(f"{found['steps']:,} steps {how}, on {found['answers']:,} answers of {found['tokens']:,} tokens.")
    shares = {"right": "right", "cut_off": "cut off"}
    rows = [
        [
            f"{place} step",
            *(f"{found[f'{place}_{key}']:.1%}" if f"{place}_{key}" in found else "" for key in shares),
            f"{found[f'{place}_mean_tokens']:,.0f}",
            f"{found[f'{place}_loss']:.4f}",
        ]
        for place in ("first", "last")
    ]
    yield Table(["", *shares.values(), "tokens", "loss"], rows)
    yield Plot("own-answers", "Loss and shares of right and cut off answers", (folder / "loss.png").read_bytes())


def _scores_of(home: Path, checkpoint: str) -> tuple[Path, Manifest] | None:
    """The newest scores of the checkpoint with that fingerprint."""
    found = [(path.parent, manifest) for path in (home / "scores").glob("*/manifest.json") if (manifest := _read(path))]
    its = [one for one in found if one[1]["inputs"].get("checkpoint") == checkpoint]
    return max(its, key=lambda one: (one[1]["created_at"], one[0].name), default=None)


def _scores(folder: Path, manifest: Manifest) -> Iterator[Block]:
    scores = manifest["metrics"]["scores"]
    for name, bench in scores["benchmarks"].items():
        yield Heading(f"{bench['title']} ({name})")
        settings = bench["settings"]
        asked = f"temperature {settings['temperature']}, top-p {settings['top_p']}, {settings['max_tokens']:,} tokens"
        yield Text(f"Mean over k = {settings['k']} samples a question; {asked}; questions at {settings['revision']}.")
        yield Table(*_models(bench))
        for line in differences(bench):
            yield Text(line)
        if figure := bench["published"]:
            yield Text(f"Published for {figure['model']}: {_figure(figure)}.")
    yield Heading("Published figures, reproduced")
    found = scores["reproduction"]
    if not found["applies"]:
        yield Text(f"Not applicable: {found['reason']}.")
    for check in found["checks"]:
        yield Text(f"{'Reproduced' if check['passed'] else 'NOT reproduced'}: {check['message']}.")
    yield Heading("Gates")
    rows = [["passed" if gate["passed"] else "FAILED", gate["model"], gate["message"]] for gate in scores["gates"]]
    yield Table(["gate", "of", "what was found"], rows) if rows else Text("None is set.")


def _models(bench: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "pass@1", "95% interval", "pass@k", "cons@k", "asked", "truncated", "loops", "tokens"]
    header += ["tokens a correct answer", "runtime"]
    rows = []
    for model in sorted(bench["models"], key=rank):
        row = bench["models"][model]
        ties = f" ({row['cons_ties']} ties)" if row["cons_ties"] else ""
        rows.append(
            [
                model,
                f"{row['accuracy']:.1%}",
                f"{row['low']:.1%} – {row['high']:.1%}",
                f"{row['pass_at'][str(row['k'])]:.1%}",
                "–" if row["cons"] is None else f"{row['cons']:.1%}{ties}",
                f"{row['questions']} × {row['k']}",
                f"{row['truncated']:.1%}",
                f"{row['looped']:.1%}",
                _number(row["mean_tokens"]),
                _number(row["tokens_per_correct"]),
                row["runtime"],
            ]
        )
    return header, rows


def _figure(figure: dict[str, Any]) -> str:
    cons = f", cons@64 {figure['cons']:.1%}" if figure["cons"] is not None else ""
    settings = f"k = {figure['k']}, temperature {figure['temperature']}, top-p {figure['top_p']}"
    return f"pass@1 {figure['accuracy']:.1%}{cons} ({settings}, {figure['max_tokens']:,} tokens; {figure['source']})"


def _study(home: Path, student: str) -> Iterator[Block]:
    """The student's newest study, where there is one."""
    if not (newest := newest_of(home, study.STAGE, student)):
        return
    found = newest[1]["metrics"]["study"]
    yield Heading("Study: ways to learn from one teacher")
    yield Text(study.in_words(found))
    for name, bench in found["benchmarks"].items():
        yield Heading(f"{bench['title']} ({name})", 3)
        yield Text(study.asked_in_words(bench))
        yield Table(*study.cells(bench))
        for line in study.gains_in_words(found, bench):
            yield Text(line)
        yield Plot(f"study-{name}", f"Study: {bench['title']}", plots.arms(bench))


def _students(home: Path) -> Iterator[Block]:
    """The published students' figures, and beside each what was measured here."""
    yield Heading("The published students, and ours")
    yield Text(
        "pass@1 as published, and ours with its 95% interval. A student of ours is another model than the published "
        "one, and no answers are published that ours could be paired with: no difference between the two columns is "
        f"called an improvement. Source of what is published: {published.SOURCE}."
    )
    known = names("students")
    rows = []
    for model in published.MODELS:
        ours = model.removeprefix("DeepSeek-R1-Distill-").lower()
        newest = newest_of(home, "scores", ours) if ours in known else None
        cells = [model if ours not in known else f"{model} / {ours}"]
        for bench in published.TABLE:
            figure = published.figure(model, bench)
            assert figure is not None
            theirs = f"{figure.accuracy:.1%}" + (f" (cons@64 {figure.cons:.1%})" if figure.cons is not None else "")
            its = _student(newest[1], bench) if newest else None
            cells += [theirs, its or ("–" if ours not in known else "not measured")]
        rows.append(cells)
    header = [cell for bench in published.TABLE for cell in (f"{bench}, published", f"{bench}, ours")]
    yield Table(["model", *header], rows)


def _student(manifest: Manifest, bench: str) -> str | None:
    scores = manifest["metrics"]["scores"]
    row = scores["benchmarks"].get(bench, {}).get("models", {}).get("student")
    if row is None:
        return None
    counts = {
        True: "",
        False: ", does not count: the harness does not reproduce its twin",
        None: ", its published twin was not scored",
    }
    return f"{row['accuracy']:.1%} ({row['low']:.1%} – {row['high']:.1%}{counts[scores['reproduction']['passed']]})"


def _plots(stages: dict[str, tuple[Path, Manifest]]) -> Iterator[Block]:
    found: list[tuple[str, str, bytes | None]] = []
    if "scores" in stages:
        folder, manifest = stages["scores"]
        benchmarks = manifest["metrics"]["scores"]["benchmarks"]
        columns = ["model", "benchmark", "difficulty", "correct", "completion_tokens"]
        answers = pq.read_table(folder / "answers.parquet", columns=columns).to_pylist()
        found += [
            ("accuracy", "Accuracy against tokens", plots.accuracy_against_tokens(benchmarks)),
            ("lengths", "Lengths of the answers", plots.lengths(benchmarks, answers)),
            ("difficulty", "Accuracy by difficulty", plots.accuracy_by_difficulty(benchmarks, answers)),
        ]
    if "verdicts" in stages:
        found.append(
            ("pass-rates", "How often the teacher was right", plots.pass_rates(_shares(stages["verdicts"][0])))
        )
    yield Heading("Plots")
    for name, title, png in found:
        yield Plot(name, title, png) if png else Text(f"{title}: nothing to show.")


def _shares(verdicts: Path) -> list[float]:
    """The share of a prompt's traces that were right, for each prompt with one that could be judged."""
    table = schema.read(verdicts, schema.VERDICT).select(["prompt_id", "check", "outcome"])
    table = table.filter(pc.equal(table["check"], "correctness"))
    table = table.filter(pc.is_in(table["outcome"], pa.array(["pass", "fail"])))
    right = pc.cast(pc.equal(table["outcome"], "pass"), "float64")
    grouped = table.append_column("right", right).group_by("prompt_id").aggregate([("right", "mean")])
    return sorted(grouped["right_mean"].to_pylist())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def markdown(blocks: Sequence[Block], student: str) -> str:
    """The blocks as Markdown; plots are files beside it."""
    lines: list[str] = []
    for block in blocks:
        match block:
            case Heading(text, level):
                lines += [f"{'#' * level} {text}", ""]
            case Text(text):
                lines += [text, ""]
            case Table(header, rows):
                lines += [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]
            case Plot(name, title, _):
                lines += [f"![{title}]({student}-{name}.png)", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def as_html(blocks: Sequence[Block], title: str) -> str:
    """The blocks as one HTML page that loads nothing: plots are inside it."""
    parts = ["<!doctype html>", '<html lang="en"><meta charset="utf-8">', f"<title>{html.escape(title)}</title>"]
    parts.append(f"<style>{CSS}</style>")
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Text(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Table(header, rows):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
                body = "".join(f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>\n" for row in rows)
                parts.append(f"<table><tr>{head}</tr>\n{body}</table>")
            case Plot(_, title, png):
                data = base64.b64encode(png).decode()
                parts.append(f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{data}"></figure>')
    return "\n".join([*parts, "</html>", ""])
