"""What runs inside the sandbox: Python programs one after the other, each with its own limits and input.

The text of this file is what ``sandbox`` starts in there (``python -I -S -c``), with the limits as its arguments. Each
trace waits for it to start, so it imports little: the standard library alone, and of that no json (which takes longer
than all the rest). It says that it is ready. Then a request is a line "script stdin", the bytes that each of them has,
and these; its answer is a line "status stdout stderr" and the bytes of the two.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
from io import BufferedRandom

ROOT = "/box"  # where the tree stands once more, for a caller who is root
READY = b"ready\n"
SCRIPT = "program.py"
# Without the site module Python starts several times as fast; programs miss its exit() alone.
START = "import site; site.setquit(); del site; exec(compile(open('program.py', 'rb').read(), 'program.py', 'exec'))"
ERROR_BYTES = 4096  # the end of what a program wrote to stderr


def main() -> None:
    limits = {name: int(value) for name, _, value in (word.partition("=") for word in sys.argv[1:])}
    if limits["uid"]:
        _give_up_root(limits["uid"])
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    replies.write(READY)
    replies.flush()
    while line := requests.readline():
        script, stdin = [requests.read(int(size)) for size in line.split()]
        status, stdout, stderr = run(script, stdin, limits)
        replies.write(f"{status} {len(stdout)} {len(stderr)}\n".encode() + stdout + stderr)
        replies.flush()


def _give_up_root(uid: int) -> None:
    """Become nobody, for good. In a changed root the kernel refuses new user namespaces, where one could be root."""
    os.chroot(ROOT)
    os.chdir("/tmp")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def run(script: bytes, stdin: bytes, limits: dict[str, int]) -> tuple[str, bytes, bytes]:
    """Run one program to its end or to its limits: (status, stdout, the end of stderr).

    Whatever it left running or lying about is gone afterwards.
    """
    with open(SCRIPT, "wb") as file:  # noqa: PTH123 (pathlib takes as long to import as a program to run)
        file.write(script)
    with _memory("stdin") as given, _memory("stdout") as out, _memory("stderr") as err:
        given.write(stdin)
        given.seek(0)
        before = _cpu_seconds()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", START],
            stdin=given,
            stdout=out,
            stderr=err,
            preexec_fn=lambda: _limit(limits),
        )
        try:
            code: int | None = process.wait(limits["wall_seconds"])
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything in here but this process
        process.wait()
        seconds = _cpu_seconds() - before
        stdout, stderr = _read(out, limits["output_bytes"]), _read(err, limits["output_bytes"])
    _sweep()
    status = _status(code, seconds, max(len(stdout), len(stderr)), stderr, limits)
    return status, stdout, stderr[-ERROR_BYTES:]


def _status(code: int | None, seconds: float, written: int, stderr: bytes, limits: dict[str, int]) -> str:
    if written >= limits["output_bytes"]:
        return "output"
    killed = code == -signal.SIGKILL and seconds >= limits["seconds"]  # it had ignored the first signal
    if code is None or code == -signal.SIGXCPU or killed:
        return "time"
    if code and stderr.rstrip().rpartition(b"\n")[2].startswith(b"MemoryError"):
        return "memory"
    return "ok" if code == 0 else "error"


def _limit(limits: dict[str, int]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"] + 1))
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _memory(name: str) -> BufferedRandom:
    return os.fdopen(os.memfd_create(name), "w+b")


def _read(file: BufferedRandom, most: int) -> bytes:
    file.seek(0)
    return file.read(most)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _sweep() -> None:
    for folder, folders, files in os.walk(".", topdown=False):
        for remove, names in ((os.unlink, files), (os.rmdir, folders)):
            for name in names:
                with contextlib.suppress(OSError):
                    remove(os.path.join(folder, name))  # noqa: PTH118


if __name__ == "__main__":
    main()
