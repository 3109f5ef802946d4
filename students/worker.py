"""Runs one of this room's modules in a process of its own, which dies with the process that started it.

A worker keeps torch out of the caller, gives its memory back when it ends, and can be run by `accelerate launch`, on
several machines that share the folder it works in.
It tells its progress as JSON lines on standard output; everything else that it prints goes into its log.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from r1distill.data.errors import R1DistillError, RequestError

# Waiting threads sleep: spinning, they bring each other to a halt where cores are shared.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
LOG_TAIL = 15  # lines of the log that go into the error
LAST_SECONDS = 60  # that other machines have to end after the first
CARRIED = ("NCCL_", "GLOO_", "OMP_", "TORCH_", "CUDA_VISIBLE_DEVICES")  # settings that another machine is given too


def run(
    module: str,
    job: dict[str, Any],
    work: Path,
    *,
    launchers: Sequence[Sequence[str]] = ((),),
    hosts: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Run ``python -m module JOB.json``, or a launcher's module around it, and yield the messages that it tells.

    ``launchers`` are one a machine; the first runs here, the others on the ``hosts`` of their number. ``work`` gets the
    job and the logs. Raises what a worker raised, as R1DistillError or RequestError; all are stopped when the caller
    stops reading, or when one of them fails.
    """
    work.mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    file = work / f"{name}.json"
    logs = [work / f"{name}{f'-{rank}' if rank else ''}.log" for rank in range(len(launchers))]
    file.write_text(json.dumps(job))
    processes: list[subprocess.Popen[str]] = []
    failure: dict[str, Any] = {}
    try:
        for rank, launcher in enumerate(launchers):
            command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), module, str(file)]
            processes.append(_start(on(hosts[rank], command) if rank else command, logs[rank]))
        for process, log in list(zip(processes, logs, strict=True))[1:]:
            threading.Thread(target=_follow, args=(process, log, processes[0], failure), daemon=True).start()
        for message in _messages(processes[0]):
            if "error" in message:
                failure.setdefault("message", message)
            else:
                yield message
        code = processes[0].wait()
        for process in processes[1:]:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0 if code else LAST_SECONDS)
    finally:
        for process in processes:
            _stop(process)
    if told := failure.get("message"):
        kind = RequestError if told["request"] else R1DistillError
        raise kind(f"{told['error']}\n({logs[0]} says more.)")
    if code:  # killed, or dead before it could say why
        log = failure.get("log", logs[0])
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
        raise R1DistillError(
            f"{module} ended with code {code}. {log} ends in:\n{tail}\n"
            "Mend the cause (memory, disk) and run the same command again: it resumes."
        )


def on(host: str, command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` in this folder on ``host``: directly on this one, by srun inside a Slurm job,
    else by ssh without a password. Settings of NCCL, gloo and threads go along; secrets don't."""
    if host in ("localhost", socket.gethostname(), socket.getfqdn()) or host.startswith("127."):
        return list(command)
    if "SLURM_JOB_ID" in os.environ:
        return ["srun", "--nodes=1", "--ntasks=1", "--overlap", f"--nodelist={host}", *command]
    settings = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(CARRIED)]
    there = f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*settings, *command])}"
    return ["ssh", "-T", "-o", "BatchMode=yes", host, there]


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
    with log.open("wb") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**ENVIRONMENT, **os.environ},
        )


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin and process.stdout
    process.stdin.close()  # a worker that is still there ends with this
    process.terminate()
    process.wait()
    process.stdout.close()


def _follow(process: subprocess.Popen[str], log: Path, first: subprocess.Popen[str], failure: dict[str, Any]) -> None:
    """Read what another machine tells; where it fails, the first, which would wait for it, is ended."""
    with suppress(ValueError):  # its output was closed under us: everything is over
        for message in _messages(process):
            if "error" in message:
                failure.setdefault("message", message)
        if process.wait():
            failure.setdefault("log", log)
            first.terminate()


def _messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout
    for line in process.stdout:
        if message := _message(line):
            yield message


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
