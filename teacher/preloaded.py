"""vLLM's modules loaded once for all servers of a stage on the CPU: each server is a fork of one process.

Loading them is most of a start, and vLLM does it twice, as its engine is a fresh process. ``python -m
r1distill.teacher.preloaded PARENT SOCKET`` is that process: it gets a request a datagram, the server's arguments,
environment and log, and answers with the number and the pidfd of a watcher (``teacher.watch``).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from r1distill.teacher import watch

MAIN = "vllm.entrypoints.openai.api_server"
# What a server imports while it starts.
MODULES = (
    MAIN,
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen2",
)
LARGEST_REQUEST = 1 << 20  # bytes
REAP_SECONDS = 0.5


class Preloaded:
    """The process with the modules: started by the first server that wants it, and again where it has died."""

    def __init__(self) -> None:
        self.loaded: Loaded | None = None

    def start(self, arguments: list[str], environment: dict[str, str], log: Path) -> Forked:
        """Have a server started in ``environment``, once the modules are there; what it says is added to ``log``."""
        if self.loaded is None or self.loaded.poll() is not None:
            self.close()
            self.loaded = Loaded(environment, log)
        return self.loaded.start({"arguments": arguments, "environment": environment, "log": str(log)})

    def close(self) -> None:
        """End the process. Servers that run go on; those it was still asked for are not started."""
        if self.loaded:
            self.loaded.close()


class Loaded:
    """The process, and what it was asked for."""

    def __init__(self, environment: dict[str, str], log: Path):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "r1distill.teacher.preloaded", str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._waiting: list[Forked] = []

    def start(self, request: dict[str, Any]) -> Forked:
        self._socket.send(json.dumps(request).encode())
        self._waiting.append(Forked(self))
        return self._waiting[-1]

    def read(self) -> None:
        """Take the answers that have come, which are in the requests' order."""
        while self._waiting and self._socket.fileno() >= 0 and select.select([self._socket], [], [], 0)[0]:
            said, ends, _, _ = socket.recv_fds(self._socket, 64, 1)
            if not said:
                return
            self._waiting.pop(0).started(int(said), ends[0])

    def poll(self) -> int | None:
        """None while the process runs."""
        return self.process.poll()

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self.process.kill()
        self.process.wait()
        self.read()
        self._socket.close()


class Forked:
    """A server's watcher, handled like a Popen; it may not be there yet."""

    def __init__(self, source: Loaded):
        self._source = source
        self._pid = 0
        self._end: int | None = None  # its pidfd

    def started(self, pid: int, end: int) -> None:
        self._pid, self._end = pid, end

    @property
    def pid(self) -> int:
        """Its number, which is its session's too; 0 as long as it is not there."""
        self._read()
        return self._pid

    def _read(self) -> int | None:
        if self._end is None:
            self._source.read()
        return self._end

    def poll(self) -> int | None:
        """None while it runs or is still to be started."""
        if (end := self._read()) is None:
            return self._source.poll()
        return 0 if select.select([end], [], [], 0)[0] else None

    def terminate(self) -> None:
        """Tell it to end; one that is still to be started never is, nor is any after it."""
        if self._read() is None:
            self._source.close()  # which may find that it has started
        if self._end is not None and self.poll() is None:
            signal.pidfd_send_signal(self._end, signal.SIGTERM)

    def wait(self, seconds: float | None = None) -> None:
        """Raises TimeoutExpired like a Popen; returns at once where it never started."""
        if (end := self._read()) is not None and not select.select([end], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired("server", seconds or 0)


def main(parent: int, descriptor: int) -> None:
    """Load the modules and fork a watcher with a server for every request, until the other end is closed."""
    parents_end = watch.end_of(parent)
    if parents_end is None:
        return
    requests = socket.socket(fileno=descriptor)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1) if os.getppid() != parent else None)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)  # nobody waits for the modules any more
    for name in MODULES:
        importlib.import_module(name)
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.collect()
    gc.freeze()  # forks don't walk, and so copy, what is here
    while said := _request(requests):
        pid = os.fork()
        if pid == 0:
            requests.close()
            _watcher(json.loads(said), parents_end)
        end = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [end])
        os.close(end)


def _request(requests: socket.socket) -> bytes:
    """The next request, empty when there will be none; until then watchers that have ended are waited for."""
    while not select.select([requests], [], [], REAP_SECONDS)[0]:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    return requests.recv(LARGEST_REQUEST)


def _watcher(request: dict[str, Any], parents_end: int) -> None:
    """In the fork: watch a server, which is a fork again; does not return."""
    with Path(os.devnull).open("rb") as nothing, Path(request["log"]).open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    wanted = request["environment"]
    for name in os.environ.keys() | wanted.keys():  # what is the same stays in its place, which process titles need
        if name not in wanted:
            del os.environ[name]
        elif os.environ.get(name) != wanted[name]:
            os.environ[name] = wanted[name]
    watch.watch(parents_end, partial(_server, request["arguments"]))


def _server(arguments: list[str]) -> int:
    """Fork a server; returns its process number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        watch.forget()
        _fork_engines()
        sys.argv = [MAIN, *arguments]
        sys.modules.pop(MAIN, None)
        runpy.run_module(MAIN, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_engines() -> None:
    """Have vLLM fork its engine, which its CPU build always spawns: nothing has used threads of OpenMP by then."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "get_mp_context" in vars(module):
            vars(module)["get_mp_context"] = lambda: context


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
