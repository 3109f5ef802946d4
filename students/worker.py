"""Runs one of this room's modules in a process of its own, which dies with the process that started it.

A worker keeps torch out of the caller, gives its memory back when it ends, and can be run by `accelerate launch`.
It tells its progress as JSON lines on standard output; everything else that it prints goes into its log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError, RequestError

# Waiting threads sleep: spinning, they bring each other to a halt where cores are shared.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
LOG_TAIL = 15  # lines of the log that go into the error


def run(module: str, job: dict[str, Any], work: Path, *, launcher: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Run ``python -m module JOB.json``, or the launcher's module around it, and yield the messages that it tells.

    ``work`` gets the job and the log. Raises what the worker raised, as R1DistillError or RequestError; the worker is
    stopped when the caller stops reading.
    """
    work.mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    file, log = work / f"{name}.json", work / f"{name}.log"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), module, str(file)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env={**ENVIRONMENT, **os.environ}, **pipes)
    assert process.stdin and process.stdout
    failure: dict[str, Any] = {}
    try:
        for line in process.stdout:
            message = _message(line) or {}
            if "error" in message:
                failure = message
            elif message:
                yield message
        code = process.wait()
    finally:
        process.stdin.close()  # a worker that is still there ends with this
        process.terminate()
        process.wait()
        process.stdout.close()
    if failure:
        kind = RequestError if failure["request"] else R1DistillError
        raise kind(f"{failure['error']}\n({log} says more.)")
    if code:  # killed, or dead before it could say why
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
        raise R1DistillError(
            f"{module} ended with code {code}. {log} ends in:\n{tail}\n"
            "Mend the cause (memory, disk) and run the same command again: it resumes."
        )


def _message(line: str) -> dict[str, Any] | None:
    """A line as the message it is, or None for what a library printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def perform(work: Callable[[dict[str, Any]], None]) -> None:
    """What a worker's module does when it is run: tie its life to its caller's, read the job, do it, tell what failed.

    The caller holds the other end of standard input, also through a launcher, and the system closes it however the
    caller dies.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except Exception as error:
        traceback.print_exc()
        ours = isinstance(error, R1DistillError)
        tell(error=str(error) if ours else f"{type(error).__name__}: {error}", request=isinstance(error, RequestError))
        sys.exit(1)


def tell(**message: Any) -> None:
    """Send a message to the caller."""
    print(json.dumps(message), flush=True)
