"""Generated programs run in here and nowhere else: bubblewrap around them, and limits on each of them.

A program sees the system's ``/usr`` and this Python's standard library read-only, an empty work folder in memory, no
network, no process but its own, no home, no environment. It has limits on time, memory, processes, open files and
output, and it dies with the process that asked for it.

What this does not cover: the kernel itself (a hole in it is a hole in the sandbox; there is no seccomp filter), timing
and other side channels, what anybody may read under ``/usr``, and the memory of a program that goes after the kernel's
own (shared memory segments) or multiplies its limit by its number of processes. A container or a virtual machine with
its own limits around the run covers these.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from pydantic import Field

from r1distill.data.config import Settings
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.data.verify import driver


class SandboxSettings(Settings):
    """Limits of one program's run, and of all the runs that one trace asks for."""

    seconds: int = Field(6, gt=0)  # of CPU, for one run: what LiveCodeBench grants one test
    total_seconds: float = Field(60, gt=0)  # of the clock, for all runs together
    memory_bytes: int = Field(1 << 30, gt=0)  # of one process
    processes: int = Field(16, gt=0)  # threads among them
    output_bytes: int = Field(16 << 20, gt=0)  # also the size of a file that it writes
    files: int = Field(32, gt=0)


WALL_TO_CPU = 2  # a program may sleep, and a busy machine be slow, for so long again
WORK_BYTES = 64 << 20  # of the work folder


Status = Literal["ok", "error", "time", "memory", "output", "gone"]


class Run(NamedTuple):
    """How a program ended: by itself without ("ok") or with an error, by a limit, or with its sandbox ("gone")."""

    status: Status
    stdout: str = ""
    stderr: str = ""  # its end


class SandboxError(R1DistillError):
    """The sandbox itself could not start."""


class Sandbox:
    """A running sandbox; ``run`` takes one program after the other."""

    def __init__(self, process: subprocess.Popen[bytes], settings: SandboxSettings):
        self._process, self._settings = process, settings
        self.expired = False  # whether the total time has passed, and the sandbox has been killed for it

    def expire(self) -> None:
        self.expired = True
        self._process.kill()

    def run(self, script: str, stdin: str = "") -> Run:
        """Run a Python program with this input; "gone" where it took the sandbox down or used up the total time."""
        texts = [text.encode("utf-8", "surrogatepass") for text in (script, stdin)]
        request = f"{len(texts[0])} {len(texts[1])}\n".encode()
        to, back = _open(self._process.stdin), _open(self._process.stdout)
        try:
            to.write(request + texts[0] + texts[1])
            to.flush()
        except OSError:
            return Run("gone")
        line = back.readline(1000)
        if not line.endswith(b"\n"):
            return Run("gone")
        status, *sizes = line.decode().split()
        stdout = back.read(max(0, min(int(sizes[0]), self._settings.output_bytes)))
        stderr = back.read(max(0, min(int(sizes[1]), driver.ERROR_BYTES)))
        return Run(cast(Status, status), stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace"))


@contextmanager
def opened(settings: SandboxSettings) -> Iterator[Sandbox]:
    """Start a sandbox for several runs; it is killed at the end, or once ``total_seconds`` have passed.

    Raises SandboxError where bubblewrap can't make one.
    """
    # The environment is empty, also that of bubblewrap itself, and nothing but the three pipes is inherited.
    process = subprocess.Popen(
        _command(settings), env={}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    sandbox = Sandbox(process, settings)
    watch = threading.Timer(settings.total_seconds, sandbox.expire)
    watch.daemon = True
    watch.start()
    try:
        if _open(process.stdout).readline(100) != driver.READY:
            process.kill()
            complaint = _open(process.stderr).read(2000).decode("utf-8", "replace").strip()
            raise SandboxError(complaint.rpartition("\n")[2] or "it gave no reason")
        yield sandbox
    finally:
        watch.cancel()
        process.kill()  # and with it, --die-with-parent, all that runs inside
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(BrokenPipeError):  # of a request that was not read to its end
                _open(pipe).close()


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why there is no sandbox on this machine, or None where there is one. Tries it once in a process."""
    if not sys.platform.startswith("linux"):
        return f"no sandbox: bubblewrap needs Linux, found {sys.platform}"
    if shutil.which("bwrap") is None:
        return "no sandbox: bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)"
    try:
        with opened(SandboxSettings(total_seconds=30)) as sandbox:
            run = sandbox.run("print(6 * 7)")
        if run.stdout == "42\n":
            return None
        complaint = run.stderr.strip().rpartition("\n")[2] or run.status
    except SandboxError as error:
        complaint = str(error)
    return (
        f"no sandbox: bubblewrap can't make one here ({complaint}). It needs version 0.8 and the right to make "
        "namespaces: in a container, run it with --security-opt seccomp=unconfined or --privileged"
    )


def require() -> None:
    """Raise RequestError where there is no sandbox: what a run whose prompts have code to check needs first."""
    if problem := unavailable():
        raise RequestError(
            f"Some prompts are checked by running generated code, which happens in a sandbox only. There is {problem}. "
            "Or take prompts without the verifier 'code'."
        )


def _command(settings: SandboxSettings) -> list[str]:
    # Root becomes another user, one for each caller: the kernel counts processes by user.
    uid = 40_000 + os.getpid() % 20_000 if os.geteuid() == 0 else 0
    limits = settings.model_dump(exclude={"total_seconds"})
    limits |= {"wall_seconds": settings.seconds * WALL_TO_CPU, "uid": uid}
    source = Path(driver.__file__).read_text(encoding="utf-8")
    words = [f"{name}={value}" for name, value in limits.items()]
    python = [_python(), "-I", "-S", "-X", "utf8", "-c", source, *words]
    return [shutil.which("bwrap") or "bwrap", *_arguments(), "--", *python]


def _arguments() -> list[str]:
    """bubblewrap's own arguments.

    A user gets a user namespace of their own in which no further one can be made. For root that would lift the limit on
    processes (the kernel exempts root's): root instead stays outside of it, with the three rights that it takes to
    change the root and the user inside; so the tree is laid out twice, once to start in and once to change to.
    """
    mine = ["--unshare-user", "--disable-userns"]
    as_root = [word for right in ("SETUID", "SETGID", "SYS_CHROOT") for word in ("--cap-add", f"CAP_{right}")]
    root = os.geteuid() == 0
    return [
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        *(as_root if root else mine),
        *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
        *_tree(""),
        *(_tree(driver.ROOT) if root else []),
        *("--chdir", "/tmp", "--remount-ro", "/"),
    ]


def _python() -> str:
    """This Python's own executable, whatever virtual environment it runs in."""
    major, minor = sys.version_info[:2]
    return f"{os.path.realpath(sys.base_prefix)}/bin/python{major}.{minor}"


def _tree(root: str) -> list[str]:
    """The system and this Python, read-only, and an empty work folder. The rest of /etc stays out: the loader's cache
    alone is needed. Where the distribution still has a real /lib, it is bound; where it is a link into /usr, linked."""
    prefix = Path(os.path.realpath(sys.base_prefix))
    parents = [root, f"{root}/etc", *(f"{root}{folder}" for folder in reversed(prefix.parents) if folder != Path("/"))]
    words = [word for folder in parents if folder for word in ("--perms", "0755", "--dir", folder)]
    words += ["--ro-bind", "/usr", f"{root}/usr"]
    for folder in ("/lib", "/lib64", "/bin"):
        if Path(folder).is_symlink():
            words += ["--symlink", str(Path(folder).readlink()), f"{root}{folder}"]
        elif Path(folder).is_dir():
            words += ["--ro-bind", folder, f"{root}{folder}"]
    words += ["--ro-bind-try", "/etc/ld.so.cache", f"{root}/etc/ld.so.cache"]
    if not prefix.is_relative_to("/usr"):
        words += ["--ro-bind", str(prefix), f"{root}{prefix}"]
    words += ["--dev", f"{root}/dev", "--remount-ro", f"{root}/dev"]
    return [*words, "--perms", "1777", "--size", str(WORK_BYTES), "--tmpfs", f"{root}/tmp"]


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # all three were asked for
    return pipe
