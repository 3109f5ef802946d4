"""What a person reads at the terminal: the chain, its progress, the report at its end, a plan, what is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from r1distill.pipeline import doctor
from r1distill.pipeline.artifact import Artifact
from r1distill.pipeline.plan import Plan
from r1distill.pipeline.run import Run
from r1distill.pipeline.runner import Done, Step

if TYPE_CHECKING:
    from r1distill.pipeline.pilot import Pilot
    from r1distill.pipeline.rehearsal import Rehearsal, Rehearsed
    from r1distill.students.catalogue import Publication
    from r1distill.students.inventory import Entry
    from r1distill.students.preflight import Finding
    from r1distill.students.upload import Published


def _table(*columns: str, right: tuple[str, ...] = (), title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        wraps = column == columns[-1]
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=not wraps)
    return table


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def show_chain(steps: list[Step], out: Console, as_json: bool) -> None:
    """What a run would do: each stage, whether it is there, and where it is or will be."""
    rows = [
        {
            "stage": step.stage.name,
            "label": step.label,
            "state": step.state,
            "path": str(step.path),
            "summary": step.stage.summary,
        }
        for step in steps
    ]
    if as_json:
        print(json.dumps(rows))
        return
    words = {"sealed": "reuse", "partial": "resume", "missing": "build"}
    table = _table("stage", "would", "artifact")
    for row in rows:
        table.add_row(row["stage"], words[row["state"]], row["path"])
    out.print(table)


def show_stage(done: Done, out: Console) -> None:
    """One line for a stage that is sealed."""
    manifest = done.artifact.manifest
    took = f"{manifest['seconds']:.1f} s" if done.built else "there already"
    gone = "" if not manifest["rejected"] else f", {sum(manifest['rejected'].values())} not"
    out.print(
        f"[green]✓[/green] {done.step.stage.name:<12} {manifest['read']} {manifest['unit']} read, "
        f"{manifest['kept']} kept{gone}  [dim]{took}[/dim]"
    )


def show_arm(name: str, done: Done, out: Console) -> None:
    """``show_stage`` in one arm of a study."""
    out.print(f"[bold]{name:<12}[/bold]", end="")
    show_stage(done, out)


def show_end(run: Run, done: list[Done], out: Console, as_json: bool) -> None:
    """The report: rows and reasons, scores, seconds, where everything lies, what to type next."""
    own, before = ([item for item in done if (item.step.run.via is run.via) is mine] for mine in (True, False))
    if as_json:
        found = {"student": run.student.name, "teacher": run.teacher.name, **_as_dict(own)}
        if run.via:
            found["via"] = {"student": run.via.student.name, **_as_dict(before)}
        print(json.dumps(found))
        return
    out.print()
    table = _table("stage", "read", "kept", "unit", "seconds", "rejected, by reason", right=("read", "kept", "seconds"))
    for item in done:
        manifest = item.artifact.manifest
        reasons = ", ".join(
            f"{count} {why}" for why, count in sorted(manifest["rejected"].items(), key=lambda x: -x[1])
        )
        table.add_row(
            item.step.stage.name + (f" of {item.step.label}" if item in before else ""),
            f"{manifest['read']:,}",
            f"{manifest['kept']:,}",
            manifest["unit"],
            f"{manifest['seconds']:.1f}" if item.built else f"({manifest['seconds']:.1f})",
            reasons,
        )
    out.print(table)
    if not all(item.built for item in done):
        out.print("[dim]Seconds in brackets were spent in an earlier run.[/dim]")
    for some in (before, own):
        if scores := _scores_of(some):
            _show_scores(scores, out)
    out.print()
    for item in done:
        out.print(f"{item.step.stage.name:<12} {item.artifact.path}", markup=False)
    out.print()
    for line in _next(run, done):
        out.print(line, markup=False)


def _scores_of(done: list[Done]) -> dict[str, Any] | None:
    manifests = {item.step.stage.name: item.artifact.manifest for item in done}
    return manifests.get("scores", {}).get("metrics", {}).get("scores")


def _as_dict(done: list[Done]) -> dict[str, Any]:
    stages = {
        item.step.stage.name: {
            **{key: item.artifact.manifest[key] for key in ("read", "kept", "rejected", "unit", "seconds")},
            "built": item.built,
            "path": str(item.artifact.path),
        }
        for item in done
    }
    return {"stages": stages, "scores": _scores_of(done)}


def show_evaluation(artifact: Artifact, out: Console, as_json: bool) -> None:
    """What `evaluate` found."""
    found = artifact.manifest["metrics"]["scores"]
    if as_json:
        print(json.dumps({**found, "path": str(artifact.path)}))
        return
    out.print(f"{found['model']} ({found['revision']}, {found['runtime']})", markup=False)
    _show_tables(found["benchmarks"], out)
    out.print()
    out.print(f"answers and scores  {artifact.path}", markup=False)


def _show_scores(scores: dict[str, Any], out: Console) -> None:
    _show_tables(scores["benchmarks"], out)
    _show_variants(scores.get("variants", {}), out)
    out.print()
    found = scores["reproduction"]
    if not found["applies"]:
        out.print(f"published figures: not applicable, {found['reason']}", markup=False)
    for gate in scores["gates"]:
        mark = "[green]passed[/green]" if gate["passed"] else "[red]FAILED[/red]"
        out.print(f"gate {mark}  {gate['model']:<12} {escape(gate['message'])}")


def _show_tables(benchmarks: dict[str, Any], out: Console) -> None:
    for name, bench in benchmarks.items():
        out.print()
        table = _table(
            "model", "pass@1", "95% interval", "cons", "asked", "cut off", "loops", "tokens", "size",
            right=("pass@1", "95% interval", "cons", "asked", "cut off", "loops", "tokens", "size"),
            title=f"{bench['title']} ({name}): mean of k samples",
        )  # fmt: skip
        for model in sorted(bench["models"], key=rank):
            row = bench["models"][model]
            table.add_row(
                model,
                _percent(row["accuracy"]),
                f"{100 * row['low']:.1f}–{_percent(row['high'])}",
                "–" if row["cons"] is None else _percent(row["cons"]),
                f"{row['questions']} × {row['k']}",
                _percent(row["truncated"]),
                _percent(row["looped"]),
                "–" if row["mean_tokens"] is None else f"{row['mean_tokens']:.0f}",
                _bytes(row["size_bytes"]),
            )
        out.print(table)
        for line in differences(bench):
            out.print(line, markup=False)
        if figure := bench["published"]:
            out.print(
                f"published for {figure['model']}: {_percent(figure['accuracy'])}, k = {figure['k']}", markup=False
            )


def _show_variants(variants: dict[str, Any], out: Console) -> None:
    if not variants:
        return
    tokens = next(iter(variants.values()))["memory_tokens"]
    columns = ("variant", "size", f"memory at {tokens:,}", "tokens/s", "recovered", "divergence", "served by")
    table = _table(*columns, right=columns[1:-1], title="Variants beside the checkpoint")
    for name, one in sorted(variants.items()):
        table.add_row(
            name,
            _bytes(one["bytes"]),
            _bytes(one["memory_bytes"]),
            "–" if one["tokens_per_second"] is None else f"{one['tokens_per_second']:,.0f}",
            "–" if one["recovered"] is None else _percent(one["recovered"]),
            "–" if one["kl"] is None else f"{one['kl']:.4f}",
            one["runtime"] or f"– ({one['note']})",
        )
    out.print()
    out.print(table)


def differences(bench: dict[str, Any]) -> list[str]:
    """What may be said of the models' differences on a benchmark, a sentence each."""
    lines = []
    for one in bench["comparisons"]:
        if one["verdict"] == "open" or one["difference"] is None:
            said = "no difference is shown"
        else:
            said = f"{one['verdict']} by {abs(one['difference']):.1%}"
        interval = "" if one["difference"] is None else f" (95%: {100 * one['low']:+.1f} to {one['high']:+.1%})"
        lines.append(f"{one['model']} against {one['against']}: {said}{interval}, {one['questions']} questions, paired")
    return lines


def show_study(artifact: Artifact, files: list[Path], out: Console, as_json: bool) -> None:
    """What a study found, and the pages that were written of it."""
    from r1distill.pipeline import study

    found = artifact.manifest["metrics"]["study"]
    if as_json:
        print(json.dumps({**found, "path": str(artifact.path), "files": [str(file) for file in files]}))
        return
    for bench in found["benchmarks"].values():
        columns, rows = study.cells(bench)
        table = _table(*columns, right=tuple(columns[1:]), title=f"{found['student']}: {bench['title']}")
        for row in rows:
            table.add_row(*row)
        out.print(table)
        for line in study.gains_in_words(found, bench):
            out.print(line, markup=False)
    for file in [artifact.path, *files]:
        out.print(str(file), markup=False)


def rank(model: str) -> tuple[int, str]:
    """Base, teacher, twin, student, then the variants by name: a manifest's keys are sorted."""
    first = ("base", "teacher", "twin", "student")
    return (first.index(model), "") if model in first else (len(first), model)


def _next(run: Run, done: list[Done]) -> list[str]:
    """What to type next, from where this run ended."""
    last = done[-1]
    typed = sys.argv[0] if Path(sys.argv[0]).name == "r1distill" else "r1distill"  # it may lie outside PATH
    lines = ["Next:"]
    if last.step.stage.name == "publication":
        lines += [
            f"  read the model card          {last.artifact.path}/model/README.md",
            f"  list what would be uploaded  {typed} publish {last.artifact.path}",
            f"  upload it (private)          HF_TOKEN=… {typed} publish {last.artifact.path} --to hub",
        ]
    else:
        names = [f"STUDENT={run.student.name}", *([f"VIA={run.via.student.name}"] if run.via else [])]
        names += [f"TEACHER={run.teacher.name}"] if run.teacher.name != run.student.teacher else []
        names += [f"PROMPTS={run.prompts.name}"] if run.prompts.name != run.teacher.prompts else []
        lines.append(f"  go on                        make distill {' '.join(names)}")
    traces = next((item.artifact.path for item in done if item.step.stage.name == "traces"), None)
    if traces:
        lines.append(f"  look at the traces           {typed} inspect {traces}   (or data/notebooks/traces.ipynb)")
    lines.append("  size up a real student       make plan STUDENT=qwen-14b HARDWARE=8xh200")
    return lines


def show_status(home: Path, found: list[tuple[str, str, dict[str, Any] | None]], out: Console, as_json: bool) -> None:
    """Every artifact under the home folder."""
    if as_json:
        rows = [
            {"stage": stage, "name": name, "state": _state(manifest), "read": (manifest or {}).get("read"),
             "kept": (manifest or {}).get("kept")}
            for stage, name, manifest in found
        ]  # fmt: skip
        print(json.dumps({"home": str(home), "artifacts": rows}))
        return
    if not found:
        out.print(f"nothing under {home} yet. Start with: make distill", markup=False)
        return
    table = _table("stage", "artifact", "state", "read", "kept", "made", right=("read", "kept"))
    for stage, name, manifest in found:
        whole = manifest or {}
        table.add_row(
            stage, name, _state(manifest), str(whole.get("read", "–")), str(whole.get("kept", "–")),
            str(whole.get("created_at", "–")),
        )  # fmt: skip
    out.print(f"under {home}", markup=False)
    out.print(table)


def _state(manifest: dict[str, Any] | None) -> str:
    return "half-built" if manifest is None else manifest.get("state", "sealed")


def show_totals(totals: dict[str, Any], file: Path, out: Console, as_json: bool) -> None:
    """Totals of a ``verify`` run."""
    if as_json:
        print(json.dumps({**totals, "file": str(file)}))
        return
    table = _table("check", "pass", "fail", "unverifiable", right=("pass", "fail", "unverifiable"))
    for check, counts in totals["checks"].items():
        table.add_row(check, *(f"{counts.get(key, 0):,}" for key in ("pass", "fail", "unverifiable")))
    out.print(table)
    for reason, count in sorted(totals["reasons"].items(), key=lambda item: -item[1]):
        out.print(f"{count:>8,}  {reason}", markup=False)
    out.print(f"{totals['rows']:,} rows → {file}", markup=False)


def show_pilot(pilot: Pilot, out: Console, as_json: bool) -> None:
    """What a pilot found and what it says of the whole run."""
    if as_json:
        print(json.dumps(pilot.as_dict()))
        return
    out.print(f"{pilot.prompts:,} of {pilot.all_prompts:,} prompts, {pilot.samples} samples each", markup=False)
    for word, counts in (("answers", pilot.states), ("not passed", pilot.reasons)):
        found = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
        out.print(f"{word}: {found or 'none'}", markup=False)
    table = _table("", "pilot", "whole run", "95% interval", right=("pilot", "whole run", "95% interval"))
    for one in pilot.forecasts:
        table.add_row(one.name, _amount(one.pilot), _amount(one.whole), f"{_amount(one.low)} – {_amount(one.high)}")
    out.print(table)
    out.print(f"{pilot.note} What the pilot asked for is in the ledger: the run will not ask it again.", markup=False)


def show_files(folder: Path, publication: Publication, entries: list[Entry], out: Console, as_json: bool) -> None:
    """Every file that would be uploaded, by repository, with its size and sha256."""
    names = {"dataset": publication.dataset_repository, "model": publication.repository}
    if as_json:
        rows = [{"repository": names[one.kind], "file": one.name, **asdict(one)} for one in entries]
        print(json.dumps({"folder": str(folder), "repositories": names, "files": rows}))
        return
    for kind, repository in names.items():
        files = [one for one in entries if one.kind == kind]
        out.print(f"{kind} {repository}: {len(files)} files, {_bytes(sum(one.size for one in files))}", markup=False)
        for one in files:
            open_card = "  (gets the dataset's commit when it is uploaded)" if one.path == "model/README.md" else ""
            out.print(f"  {one.sha256}  {one.size:>16,}  {one.name}{open_card}", markup=False)


def show_published(published: Iterable[Published], out: Console, as_json: bool) -> None:
    """Each repository as soon as it is uploaded and loaded back, then the collection."""
    done = []
    for one in published:
        done.append(one)
        if as_json:
            continue
        what = f" at {one.commit}, {'new' if one.new else 'unchanged'}, loaded back" if one.commit else ""
        out.print(f"published: {one.kind} {one.url}{what}", markup=False)
    if as_json:
        print(json.dumps([one.as_dict() for one in done]))


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_preflight(student: str, what: str, findings: list[Finding], out: Console, as_json: bool) -> None:
    """What a preflight found: a line for each check, and under a failed one what to do."""
    failed = sum(not finding.passed for finding in findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        print(json.dumps({"student": student, "looked_at": what, "passed": not failed, "findings": rows}))
        return
    out.print(f"{student}: {what}", markup=False)
    for finding in findings:
        mark = "[green]✓[/green]" if finding.passed else "[red]✗[/red]"
        out.print(f"{mark} {finding.check:<18}", end="")
        out.print(finding.found if finding.passed else f"{finding.file}: {finding.found}", markup=False)
        if not finding.passed:
            out.print(f"{'':20}→ {finding.remedy}", markup=False)
    out.print(f"{failed} of {len(findings)} findings need mending." if failed else "Nothing to mend.", markup=False)


def show_rehearsal(rehearsal: Rehearsal, out: Console, as_json: bool) -> Iterator[Rehearsed]:
    """Each step of a rehearsal, told as it ends."""
    if not as_json:
        out.print(f"rehearsing {rehearsal.name}: {rehearsal.shrunk}.", markup=False)
    for step in rehearsal.steps():
        if not as_json:
            mark = "[green]✓[/green]" if step.passed else "[red]✗[/red]"
            out.print(f"{mark} {step.name:<18}{step.seconds:>6.1f} s  ", end="")
            out.print(step.note, markup=False)
        yield step


def show_rehearsals(results: dict[str, list[Rehearsed]], out: Console, as_json: bool) -> None:
    """What became of each rehearsal."""
    if as_json:
        print(json.dumps({name: [asdict(step) for step in steps] for name, steps in results.items()}))
        return
    table = _table("rehearsal", "seconds", "outcome", right=("seconds",))
    for name, steps in results.items():
        broke = next((step.name for step in steps if not step.passed), None)
        seconds = f"{sum(step.seconds for step in steps):.0f}"
        table.add_row(name, seconds, f"[red]broke in {broke}[/red]" if broke else "[green]passed[/green]")
    out.print(table)


def show_plan(plan: Plan, files: list[Path], out: Console, as_json: bool) -> None:
    """A plan as text or JSON, and the files that were written of it."""
    if as_json:
        print(json.dumps({**plan.as_dict(), "files": [str(file) for file in files]}))
        return
    out.print(plan.text(), markup=False)
    for file in files:
        out.print(f"written: {file}", markup=False)


def show_checks(checks: list[doctor.Check], out: Console, as_json: bool) -> None:
    """What the doctor found, a line each, and the remedy under what is not well."""
    if as_json:
        print(json.dumps(doctor.as_dict(checks)))
        return
    marks = {"ok": "[green]ok     [/green]", "warning": "[yellow]warning[/yellow]", "failed": "[red]FAILED [/red]"}
    for check in checks:
        out.print(f"{marks[check.state]}  {check.name:<15} {escape(check.found)}")
        if check.remedy:
            out.print(f"{'':<25}→ {check.remedy}", markup=False)
    out.print("This machine can run the chain." if doctor.healthy(checks) else "Mend what FAILED first.")
