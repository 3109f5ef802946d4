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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError

LOG_TAIL = 15  # lines of the log that go into the error


def run(module: str, job: dict[str, Any], work: Path, *, launcher: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Run ``python -m module JOB.json``, or the launcher's module around it, and yield the messages that it tells.

    ``work`` gets the job and the log. Raises R1DistillError with the log's end where the worker fails; the worker is
    stopped when the caller stops reading.
    """
    work.mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    file, log = work / f"{name}.json", work / f"{name}.log"
    file.write_text(json.dumps(job))
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), module, str(file)]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdin and process.stdout
    try:
        for line in process.stdout:
            if message := _message(line):
                yield message
        code = process.wait()
    finally:
        process.stdin.close()  # a worker that is still there ends with this
        process.terminate()
        process.wait()
        process.stdout.close()
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
        raise R1DistillError(
            f"{module} ended with code {code}. {log} ends in:\n{tail}\n"
            "Mend the cause and run the same command again: it resumes."
        )


def _message(line: str) -> dict[str, Any] | None:
    """A line as the message it is, or None for what a library printed."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def begin() -> dict[str, Any]:
    """Called first inside a worker: tie its life to its caller's and read the job.

    The caller holds the other end of standard input, also through a launcher, and the system closes it however the
    caller dies.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return dict(json.loads(Path(sys.argv[1]).read_text()))


def tell(**message: Any) -> None:
    """Send a message to the caller."""
    print(json.dumps(message), flush=True)
