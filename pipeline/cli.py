"""The command line. Each command loads a request, calls a room and prints; what it does lives in the rooms.

Exit codes: 0 done; 1 failed; 2 the request can't be met; 3 finished, but a gate failed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from r1distill.data.errors import R1DistillError

GATE_FAILED = 3

app = typer.Typer(
    name="r1distill",
    help="Distil DeepSeek-R1 into smaller students: from prompts to a verified, published model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# In a file, tables are as wide as they need; rich would take a terminal of 80 columns.
WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120
out = Console(soft_wrap=True, highlight=False, width=WIDTH)
err = Console(stderr=True, soft_wrap=True, highlight=False)

StudentName = Annotated[str, typer.Option("--student", help="A name from configs/students, or a YAML file.")]
ViaName = Annotated[
    str | None,
    typer.Option(
        "--via", help="A student of the same family that is trained first and then teaches its probabilities."
    ),
]
TeacherName = Annotated[
    str | None, typer.Option("--teacher", help="A name from configs/teachers; default: the student's.")
]
PromptsName = Annotated[
    str | None, typer.Option("--prompts", help="A name from configs/prompts; default: the teacher's.")
]
HardwareName = Annotated[
    str | None, typer.Option("--hardware", help="A name from configs/hardware; default: this machine.")
]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: --set student.sft.epochs=2")]
Json = Annotated[bool, typer.Option("--json", help="Answer as JSON, for scripts.")]

DEFAULT_STUDENT = "smollm2-135m"


@app.command()
def distill(
    student: StudentName = DEFAULT_STUDENT,
    teacher: TeacherName = None,
    prompts: PromptsName = None,
    hardware: HardwareName = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    changes: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be built and what is there.")] = False,
    pilot: Annotated[
        int | None, typer.Option(help="Ask for this many prompts, judge them, and forecast the whole run; then stop.")
    ] = None,
    to: Annotated[str, typer.Option(help="'folder', or 'hub' to upload the publication when it is done.")] = "folder",
    via: ViaName = None,
    as_json: Json = False,
) -> None:
    """Run the whole chain: prompts, traces, verdicts, dataset, packs, checkpoint, variants, scores, publication."""
    from r1distill.data.errors import RequestError
    from r1distill.pipeline import guards, report, runner
    from r1distill.pipeline.run import Run

    run = Run.load(student, teacher, prompts, hardware, changes or [], via)
    if dry_run:
        report.show_chain(runner.chain(run, until), out, as_json)
        return
    _check_to(to)
    if to == "hub" and (pilot is not None or until not in (None, "publication")):
        raise RequestError("--to hub uploads the publication: leave out --until and --pilot, which stop before it.")
    if pilot is not None:
        until = "prompts"
    guards.check(run, runner.stage_names(until) if pilot is None else guards.PILOT)
    steps = runner.chain(run, until)
    if pilot is None:
        guards.preflight(steps)
    done: list[runner.Done] = []
    failed: list[str] = []
    for item in runner.execute(guards.between(steps, failed, lambda said: err.print(f"[red]{said}[/red]"))):
        done.append(item)
        failed += item.artifact.manifest["failed_gates"]
        if not as_json:
            report.show_stage(item, out)
    if pilot is not None:
        from r1distill.pipeline.pilot import run_pilot

        report.show_pilot(run_pilot(run, done[0].artifact.path, pilot), out, as_json)
        return
    report.show_end(run, done, out, as_json)
    if to == "hub" and done[-1].step.stage.name == "publication":
        _upload(done[-1].artifact.path, run.home, as_json=as_json)
    raise typer.Exit(GATE_FAILED if failed else 0)


@app.command()
def plan(
    student: StudentName = DEFAULT_STUDENT,
    teacher: TeacherName = None,
    prompts: PromptsName = None,
    hardware: HardwareName = None,
    changes: Changes = None,
    via: ViaName = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the accelerate, DeepSpeed, Slurm and vLLM files of it into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory, time and cost of every stage on a hardware; exits 2 where it doesn't fit."""
    from r1distill.pipeline import plan, report
    from r1distill.pipeline.run import Run

    run = Run.load(student, teacher, prompts, hardware, changes or [], via)
    answer = plan.of_run(run)
    files: list[Path] = []
    if write is not None:
        from r1distill.pipeline import planfiles

        names = {"--student": student, "--via": via, "--teacher": teacher, "--prompts": prompts, "--hardware": hardware}
        request = [part for option, name in names.items() if name for part in (option, name)]
        request += [part for change in changes or [] for part in ("--set", change)]
        files = planfiles.write(run, answer, request, write)
    report.show_plan(answer, files, out, as_json)
    raise typer.Exit(0 if answer.fits else 2)


@app.command()
def preflight(
    student: StudentName = DEFAULT_STUDENT,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder: the base's tokenizer, or a finished student; default: the base.")
    ] = None,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Template, tokens, mask, BOS, end, RoPE and context of a student, checked in seconds; exits 2 where one fails."""
    from r1distill.pipeline import report
    from r1distill.pipeline.run import Run
    from r1distill.students import preflight

    run = Run.load(student, overrides=changes or [])
    what, findings = preflight.look(run.student, tokenizer, run.home)
    report.show_preflight(run.student.name, what, findings, out, as_json)
    raise typer.Exit(0 if all(finding.passed for finding in findings) else 2)


@app.command()
def rehearse(
    student: StudentName = DEFAULT_STUDENT,
    lora: Annotated[bool, typer.Option("--lora", help="Train an adapter, whatever the student's file says.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every R1 student, full and LoRA.")] = False,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with the base's tokenizer, instead of the Hub's; of several, the one that fits."),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    hardware: Annotated[str, typer.Option(help="Whose training layout is rehearsed, on two processes.")] = "16xh100",
    keep: Annotated[bool, typer.Option("--keep", help="Leave what was made on the disk.")] = False,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """A student's own configuration, shrunk and with random weights, through every stage on this machine's CPU."""
    from r1distill.pipeline import rehearsal, report
    from r1distill.pipeline.run import home_folder

    cases = [(student, lora)]
    if everything:
        cases = [(name, lora) for name in rehearsal.r1_students() for lora in (False, True)]
    results = {}
    for name, lora in cases:
        folder, folders = home_folder() / "rehearsal", tokenizer or []
        one = rehearsal.Rehearsal(name, folder, lora, folders, changes or [], until, hardware)
        results[one.name] = steps = list(report.show_rehearsal(one, out, as_json))
        if all(step.passed for step in steps) and not keep:
            one.clear()
    report.show_rehearsals(results, out, as_json)
    raise typer.Exit(0 if all(step.passed for steps in results.values() for step in steps) else 1)


@app.command()
def status(as_json: Json = False) -> None:
    """Every artifact under $R1DISTILL_HOME: what is sealed, what is half-built."""
    from r1distill.pipeline import report, runner
    from r1distill.pipeline.run import home_folder

    report.show_status(home_folder(), runner.artifacts(home_folder()), out, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine lacks to run the chain, each with its remedy; exits 1 where something is broken."""
    from r1distill.pipeline import doctor, report
    from r1distill.pipeline.run import home_folder

    checks = doctor.examine(home_folder())
    report.show_checks(checks, out, as_json)
    raise typer.Exit(0 if doctor.healthy(checks) else 1)


@app.command()
def serve(
    teacher: Annotated[str, typer.Option(help="A name from configs/teachers.")] = "embedded",
    port: Annotated[int | None, typer.Option(help="Listen here; default: a free port.")] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Listen at this address; default: the teacher's, which is this machine alone. 0.0.0.0: all."),
    ] = None,
    hardware: HardwareName = None,
    changes: Changes = None,
) -> None:
    """Serve a teacher with vLLM until Ctrl-C."""
    from r1distill.data.config import parse_overrides
    from r1distill.data.errors import RequestError
    from r1distill.pipeline import plan
    from r1distill.pipeline.hardware import named
    from r1distill.pipeline.run import SECTIONS, home_folder
    from r1distill.teacher import serve
    from r1distill.teacher.settings import VllmTeacher, load_teacher

    settings = load_teacher(teacher, parse_overrides(changes or [], SECTIONS)["teacher"])
    if not isinstance(settings, VllmTeacher):
        raise RequestError(f"the teacher '{settings.name}' is of kind {settings.kind}: there is nothing to serve.")
    if host is not None:
        settings = settings.model_copy(update={"host": host})
    machine, home = named(hardware), home_folder()
    plan.check_teacher(settings, machine)
    spec = serve.spec_of(settings, home, port, machine.ray_address)
    with serve.serving(spec, home / "logs") as endpoint:
        out.print(f"{endpoint.model} answers at {endpoint.base_url} (Ctrl-C ends it)")
        serve.wait_for_interrupt(endpoint)


@app.command()
def verify(
    input: Annotated[Path, typer.Argument(help="JSONL, JSONL.gz, Parquet or a datasets folder.")],
    into: Annotated[Path, typer.Option("--out", help="Folder for verdicts.parquet.")],
    columns: Annotated[str, typer.Option(help="Our column=yours: prompt=…,completion=…,reference_answer=…")] = "",
    verifier: Annotated[str, typer.Option(help="The verifier of rows that name none.")] = "math",
    as_json: Json = False,
) -> None:
    """Judge completions that exist already: one row of verdicts for each row of the input, in order."""
    from r1distill.data import verdict_file
    from r1distill.data.errors import RequestError
    from r1distill.data.settings import VerdictSettings
    from r1distill.pipeline import report

    pairs = dict(pair.split("=", 1) for pair in columns.split(",") if "=" in pair)
    if columns and len(pairs) != len(columns.split(",")):
        raise RequestError(f"--columns takes NAME=COLUMN,NAME=COLUMN…, found '{columns}'.")
    totals = verdict_file.verify(input, into, pairs, verifier, VerdictSettings())
    report.show_totals(totals, into / "verdicts.parquet", out, as_json)


@app.command()
def evaluate(
    student: StudentName = DEFAULT_STUDENT,
    model: Annotated[
        str | None,
        typer.Option(help="A folder, owner/name on the Hub, a .gguf file or one of answers; default: the checkpoint."),
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="Names from configs/benchmarks, or YAML files: a,b,c; default: the student's.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="The address of a server that has the model already: http://127.0.0.1:8000/v1")
    ] = None,
    key_variable: Annotated[str | None, typer.Option(help="The variable that holds the server's key.")] = None,
    thinks: Annotated[
        bool, typer.Option("--thinks/--no-thinks", help="Whether a server's or a file's answers begin in the thinking.")
    ] = True,
    changes: Changes = None,
    via: ViaName = None,
    as_json: Json = False,
) -> None:
    """Score any model on benchmarks, as the scores stage does; asks nothing that was asked before."""
    from r1distill.data.config import load
    from r1distill.data.errors import RequestError
    from r1distill.data.settings import Benchmark
    from r1distill.pipeline import checkup, report, runner
    from r1distill.pipeline.run import Run

    run = Run.load(student, overrides=changes or [], via=via)
    names = [name.strip() for name in (benchmarks or "").split(",") if name.strip()]
    wanted = [load("benchmarks", name, Benchmark) for name in names] if names else run.benchmarks
    own = model is None
    if model is None:
        if endpoint is not None:
            raise RequestError("--endpoint needs --model: what the server calls the model.")
        step = runner.chain(run, "beyond")[-1]  # of a student without that stage it is the checkpoint
        if step.sealed() is None:
            raise RequestError(
                f"there is no checkpoint of '{run.label}' yet ({step.path}). Make it: make distill STUDENT="
                f"{run.student.name}{f' VIA={via}' if via else ''} UNTIL={step.stage.name}; or name another: --model"
            )
        model = str(step.path)
    artifact = checkup.evaluate(run, checkup.Wanted(model, endpoint, key_variable, thinks), wanted, checkpoint=own)
    report.show_evaluation(artifact, out, as_json)


@app.command("report")
def write_report(
    student: StudentName = DEFAULT_STUDENT,
    into: Annotated[Path | None, typer.Option("--out", help="Folder; default: $R1DISTILL_HOME/report.")] = None,
    via: ViaName = None,
) -> None:
    """Write a student's report, Markdown and HTML, from its newest artifacts."""
    from r1distill.pipeline import page
    from r1distill.pipeline.run import home_folder

    for file in page.write(home_folder(), _label(student, via), into or home_folder() / "report"):
        out.print(str(file), markup=False)


@app.command()
def inspect(
    traces: Annotated[Path | None, typer.Argument(help="A traces artifact; default: the newest.")] = None,
    row: Annotated[int | None, typer.Option(help="Lay out this trace for reading.")] = None,
) -> None:
    """Counts, rejection reasons and lengths of a traces artifact, or one trace laid out for reading."""
    from r1distill.data import inspection
    from r1distill.pipeline.run import home_folder

    found = inspection.Traces(traces or inspection.newest(home_folder()))
    out.print(found.describe() if row is None else found.show(row), markup=False)


@app.command()
def publish(
    folder: Annotated[
        Path | None, typer.Argument(help="A publication artifact; default: the student's newest.")
    ] = None,
    student: StudentName = DEFAULT_STUDENT,
    to: Annotated[str, typer.Option(help="'hub', or 'folder' to list what would be uploaded.")] = "folder",
    public: Annotated[bool, typer.Option("--public", help="Make the repositories public; default: private.")] = False,
    changes: Changes = None,
    via: ViaName = None,
    as_json: Json = False,
) -> None:
    """Upload a publication to the Hugging Face Hub, or check it and list its files with size and sha256."""
    from r1distill.pipeline import report
    from r1distill.pipeline.run import Run
    from r1distill.students import publish

    _check_to(to)
    run = Run.load(student, overrides=changes or [], via=via)
    path = folder or publish.newest(run.home, run.label)
    if to == "hub":
        _upload(path, run.home, public, as_json)
    else:
        report.show_files(path, *publish.check(path, run.home), out, as_json)


@app.command()
def study(
    student: Annotated[
        str | None,
        typer.Option(help="A student with 'distill' in its file; default: SmolLM2 with a third of its layers."),
    ] = None,
    teacher: TeacherName = None,
    prompts: PromptsName = None,
    hardware: HardwareName = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often each arm is trained.")] = 3,
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """One student by a teacher's text alone, its top-k alone, and both; scored alike, in a table with intervals."""
    from r1distill.pipeline import page, report
    from r1distill.pipeline.run import home_folder
    from r1distill.pipeline.study import Study

    home = home_folder()
    one = Study(home, student, teacher, prompts, hardware, seeds, changes or [])
    artifact = one.execute(lambda name, done: None if as_json else report.show_arm(name, done, out))
    report.show_study(artifact, page.write(home, one.student.name, home / "report"), out, as_json)


@app.command("embedded-teacher")
def embedded_teacher(changes: Changes = None) -> None:
    """Train the embedded teacher's adapter again, from worked solutions, with the project's own stages."""
    from r1distill.pipeline import embedded

    embedded.train(changes or [], out)


def _label(student: str, via: str | None) -> str:
    """What the artifacts of a student are called, without reading its file."""
    return f"{Path(student).stem}-via-{Path(via).stem}" if via else Path(student).stem


def _check_to(to: str) -> None:
    if to not in ("folder", "hub"):
        raise typer.BadParameter(f"--to takes 'folder' or 'hub', found '{to}'.")


def _upload(path: Path, home: Path, public: bool = False, as_json: bool = False) -> None:
    from r1distill.pipeline import report
    from r1distill.students.upload import upload

    report.show_published(upload(path, home, public=public), out, as_json)


def main() -> None:
    """Entry point: one clear message for what is wrong, and the exit code that says which kind."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # our libraries' bars too; a log file has no use for them
    warnings.simplefilter("ignore", SyntaxWarning)  # of libraries that Python compiles on their first import
    logging.getLogger("DeepSpeed").disabled = True  # it writes to standard output, where --json answers
    logging.getLogger("huggingface_hub").propagate = False  # it writes to standard error itself
    logging.basicConfig(level=os.environ.get("R1DISTILL_LOG", "WARNING").upper(), format="%(name)s: %(message)s")
    try:
        app()
    except R1DistillError as error:
        if "--json" in sys.argv:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        err.print(f"[bold red]error:[/bold red] {_plain(str(error))}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        err.print("interrupted: run the same command again to go on from here.")
        sys.exit(130)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
