"""Servers: start one, wait until it answers, watch it, restart it when it crashes, and leave nothing of it behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from r1distill.data import cluster, models
from r1distill.data.errors import R1DistillError, RequestError
from r1distill.teacher.preloaded import MAIN, Forked, Preloaded
from r1distill.teacher.settings import EndpointTeacher, Price, RecordedTeacher, VllmTeacher
from r1distill.teacher.watch import GRACE_SECONDS

if TYPE_CHECKING:
    import httpx

HOST = "127.0.0.1"
ALL_HOSTS = {"0.0.0.0": HOST, "::": "::1"}  # to listen at; and where we find it then
RESTARTS = 3  # of one server, before its crashes are taken for its own fault
POLL_SECONDS = 0.2
TAIL_LINES = 25

# Only what a request says decides its answer, not a generation_config.json that some models carry and others don't.
VLLM_OPTIONS: dict[str, Any] = {"generation-config": "vllm", "disable-log-stats": True, "uvicorn-log-level": "warning"}
VLLM_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"}
# Works for both builds: `vllm serve` of the CPU's looks for another package's metadata. Run by way of -c, as processes
# that Python spawns would import the main module again: three seconds for nothing.
VLLM = ("-c", f"import runpy; runpy.run_module('{MAIN}', run_name='__main__')")

CPU_OPTIONS: dict[str, Any] = {"enforce-eager": True}  # compiling takes minutes
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default is half of the memory
    # The model runs in the engine's process, not in one of its own: a quarter of the start is saved. vLLM then leaves
    # the threads to us. Waiting ones sleep: spinning, they bring each other to a halt where cores are shared.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True)
class VllmSpec:
    """A model for vLLM: a folder, or a repository with the commit in ``options['revision']``.

    ``options`` are vLLM's flags without their dashes; ``environment`` is put over ours. ``port`` None takes a free one.
    ``ray_address`` names the cluster whose GPUs it spreads over.
    """

    model: str
    served_name: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    port: int | None = None
    host: str = HOST
    ray_address: str | None = None
    start_seconds: float = 7200  # R1's weights are 689 GB

    def command(self, port: int) -> list[str]:
        """What starts the server."""
        return [sys.executable, *VLLM, *self.arguments(port, on_cpu())]

    @property
    def preloads(self) -> bool:
        """Whether it can be a fork of a process that has vLLM loaded already."""
        return on_cpu() and not self.environment

    def script(self, port: int, cpu: bool) -> str:
        """The same for vLLM's CPU or GPU build, as a shell script for another machine."""
        ours = {**VLLM_ENVIRONMENT, **(CPU_ENVIRONMENT if cpu else {}), **self.environment}
        exports = [f"export {name}={shlex.quote(value)}" for name, value in ours.items()]
        return "\n".join(
            ["#!/bin/bash", *exports, f"exec python {shlex.join([*VLLM, *self.arguments(port, cpu)])}", ""]
        )

    def arguments(self, port: int, cpu: bool) -> list[str]:
        """What follows vLLM's name."""
        options = {**VLLM_OPTIONS, **(CPU_OPTIONS if cpu else {}), **self.options}
        where = {"model": self.model, "served-model-name": self.served_name, "host": self.host, "port": port}
        return flags({**where, **options})

    def variables(self) -> dict[str, str]:
        """The server's environment: what the user has set goes over our defaults, the specification over both."""
        ours = {**VLLM_ENVIRONMENT, **(CPU_ENVIRONMENT if on_cpu() else {})}
        ray = {"RAY_ADDRESS": self.ray_address} if self.ray_address else {}  # or vLLM starts a cluster of its own
        return {**ours, **os.environ, **ray, **self.environment}


@dataclass(frozen=True)
class LlamaSpec:
    """A GGUF file for llama.cpp. ``context_tokens`` is the room of each of the ``slots`` requests at a time."""

    host: ClassVar[str] = HOST
    gguf: Path
    served_name: str
    context_tokens: int = 4096
    slots: int = 4
    chat_template: str | None = None  # the template itself; None: the file's own
    revision: str | None = None
    port: int | None = None
    start_seconds: float = 600

    def command(self, port: int) -> list[str]:
        """What starts the server."""
        settings = {
            "gguf": str(self.gguf),
            "port": port,
            "served_name": self.served_name,
            "context_tokens": self.context_tokens,
            "slots": self.slots,
            "chat_template": self.chat_template,
        }
        return [sys.executable, "-m", "r1distill.teacher.llama", json.dumps(settings)]

    def variables(self) -> dict[str, str]:
        return dict(os.environ)


@dataclass(frozen=True)
class Endpoint:
    """Who answers, where and at what price. ``recover`` makes sure that a server of ours runs, or raises."""

    base_url: str
    model: str
    revision: str | None = None
    key_variable: str | None = None
    price: Price | None = None
    budget_usd: Decimal | None = None
    recover: Callable[[], None] | None = field(default=None, compare=False)

    def key(self) -> str | None:
        """The key, from the environment; raises RequestError where the variable is empty."""
        if self.key_variable is None:
            return None
        if not (key := os.environ.get(self.key_variable, "").strip()):
            raise RequestError(
                f"{self.base_url} wants a key, and the environment variable {self.key_variable} is not set. "
                f"Set it: export {self.key_variable}=..."
            )
        return key


def flags(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments: true and false are switches, lists repeat a value, mappings are JSON."""
    arguments: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def on_cpu() -> bool:
    """Whether the vLLM that is installed is the CPU's build."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version("vllm-cpu"))
    return False


def check(teacher: VllmTeacher | EndpointTeacher | RecordedTeacher) -> None:
    """Raise RequestError, at once and before anything is started, where this teacher can't be asked from here."""
    if isinstance(teacher, EndpointTeacher):
        _endpoint(teacher).key()
    elif isinstance(teacher, VllmTeacher) and not (teacher.client.base_urls or importlib.util.find_spec("vllm")):
        raise RequestError(
            f"the teacher '{teacher.name}' is served by vLLM, which is not installed. Install it: make setup"
        )


def spec_of(
    teacher: VllmTeacher | EndpointTeacher, home: Path, port: int | None = None, ray_address: str | None = None
) -> VllmSpec | EndpointTeacher:
    """How to serve a teacher: downloads or converts its weights on the first call; an endpoint is served already.

    One that is spread over nodes joins the Ray cluster at ``ray_address`` (default: RAY_ADDRESS, or this machine's).
    Raises RequestError, before any download, where none with enough free GPUs answers.
    """
    if isinstance(teacher, EndpointTeacher):
        return teacher
    cluster_address = _cluster(teacher, ray_address)
    revision, options = models.revision(teacher.model), teacher.options
    model = str(models.materialise(teacher.model, home))
    if isinstance(teacher.model, models.HubModel):
        # By name and commit, so that other nodes find it too; on this one it is in the Hub's cache by now.
        model, options = teacher.model.repo, {"revision": revision, "tokenizer-revision": revision, **options}
    return VllmSpec(
        model, teacher.served_name, options, teacher.environment, revision, port, teacher.host, cluster_address
    )


def _cluster(teacher: VllmTeacher, ray_address: str | None) -> str | None:
    """The Ray cluster that a teacher is to be spread over; None where its file doesn't say so."""
    backends = [teacher.options.get(f"{name}-backend") for name in ("distributed-executor", "data-parallel")]
    if "ray" not in backends:
        return None
    address = ray_address or os.environ.get("RAY_ADDRESS") or "auto"
    kinds = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    wanted = math.prod(int(teacher.options.get(kind, 1)) for kind in kinds)
    with cluster.connected(address):
        free, everything = cluster.gpus(free=True), cluster.gpus()
    if free < wanted:
        raise RequestError(
            f"the teacher '{teacher.name}' needs {wanted} GPUs, and the Ray cluster at '{address}' has {free} free of "
            f"{everything}. Add nodes to it, on each: ray start --address=HEAD:6379"
        )
    return address


@contextmanager
def serving(spec: VllmSpec | LlamaSpec | EndpointTeacher, logs: Path) -> Iterator[Endpoint]:
    """Serve what ``spec`` describes, for as long as the block lasts, with the server's log in ``logs``.

    Somebody else's endpoint is not started, only its key is looked for. Raises RequestError where the port that was
    asked for is taken or the key is missing, R1DistillError with the log's end where the server dies.
    """
    with contextlib.closing(in_turn([spec], logs)) as endpoints:
        yield next(endpoints)


def in_turn(specs: Sequence[VllmSpec | LlamaSpec | EndpointTeacher], logs: Path) -> Generator[Endpoint, None, None]:
    """Serve one after the other: each endpoint lasts until the next one is asked for. Raises what ``serving`` does.

    On the CPU the next server starts while this one answers, as its start keeps one core busy at most. GPUs have room
    for one model at a time. Close the generator where you stop early.
    """
    ahead = 2 if on_cpu() else 1
    servers: dict[int, Server] = {}
    preloaded = Preloaded()
    try:
        for turn, spec in enumerate(specs):
            for place, coming in enumerate(specs[turn : turn + ahead], turn):
                if place not in servers and not isinstance(coming, EndpointTeacher):
                    servers[place] = Server(coming, logs, preloaded)
                    servers[place].launch()
            if isinstance(spec, EndpointTeacher):
                endpoint = _endpoint(spec)
                endpoint.key()
                yield endpoint
                continue
            server = servers[turn]
            server.wait()
            yield Endpoint(f"{server.url}/v1", spec.served_name, spec.revision, recover=server.recover)
            servers.pop(turn).stop()
    finally:
        for server in servers.values():
            server.stop()
        preloaded.close()


def wait_for_interrupt(endpoint: Endpoint | None = None) -> None:
    """Return on Ctrl-C or SIGTERM; until then see to it that the endpoint's server runs."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            if endpoint and endpoint.recover:
                endpoint.recover()
            time.sleep(1)
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


class Server:
    """One server's life. It runs under ``teacher.watch``, which ends it and all its children when we are gone."""

    def __init__(self, spec: VllmSpec | LlamaSpec, logs: Path, preloaded: Preloaded | None = None):
        self.spec, self.preloaded, self.restarts = spec, preloaded, 0
        self.port = _port(spec.host, spec.port)
        host = ALL_HOSTS.get(spec.host, spec.host)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        logs.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        self.log = logs / f"{spec.served_name.replace('/', '-')}-{stamp}-{self.port}.log"
        self._watcher: subprocess.Popen[bytes] | Forked | None = None
        self._log: IO[bytes] | None = None

    def launch(self) -> None:
        """Start it, and don't wait."""
        if self.preloaded and isinstance(self.spec, VllmSpec) and self.spec.preloads:
            arguments = self.spec.arguments(self.port, cpu=True)
            self._watcher = self.preloaded.start(arguments, self.spec.variables(), self.log)
            return
        self._log = self.log.open("ab")
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "r1distill.teacher.watch", str(os.getpid()), *self.spec.command(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self.spec.variables(),
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until it answers; raises R1DistillError with the end of its log where it dies instead."""
        import httpx
        from tqdm import tqdm

        assert self._watcher is not None
        deadline = time.monotonic() + self.spec.start_seconds
        line = "{desc}: {elapsed}"
        with (
            httpx.Client(base_url=self.url, trust_env=False, timeout=5) as http,
            tqdm(desc=f"starting {self._named()}", bar_format=line, disable=None, delay=2, leave=False) as progress,
        ):
            while not self._answers(http):
                if self._watcher.poll() is not None:
                    raise R1DistillError(
                        f"{self._named()} died while starting. Its log, {self.log}, ends:\n{self.tail()}"
                    )
                if time.monotonic() > deadline:
                    raise R1DistillError(
                        f"{self._named()} doesn't answer after {self.spec.start_seconds:,.0f} s. Its log, {self.log}, "
                        f"ends:\n{self.tail()}"
                    )
                time.sleep(POLL_SECONDS)
                progress.update()

    def recover(self) -> None:
        """Restart it where it has died; raises R1DistillError where it keeps dying."""
        if self._watcher is not None and self._watcher.poll() is None:
            return
        if self.restarts >= RESTARTS:
            raise R1DistillError(
                f"{self._named()} died {self.restarts + 1} times. Its log, {self.log}, ends:\n{self.tail()}"
            )
        self.restarts += 1
        print(
            f"{self._named()} died and is started again ({self.restarts} of {RESTARTS}); log: {self.log}",
            file=sys.stderr,
        )
        self.stop()
        self.launch()
        self.wait()

    def stop(self) -> None:
        """End it and its children: politely at first, then with SIGKILL. Does nothing where it isn't running."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.terminate()
            try:
                watcher.wait(GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                os.killpg(watcher.pid, signal.SIGKILL)
                watcher.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def tail(self) -> str:
        """The last lines of the log, without blank ones."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 65536))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:]) or "(nothing)"

    def _named(self) -> str:
        return f"the server of {self.spec.served_name}"

    def _answers(self, http: httpx.Client) -> bool:
        """Whether it is ready, and it is ours: another server on this port would have other models."""
        import httpx

        try:
            if http.get("/health").status_code != 200:
                return False
            served = http.get("/v1/models").json()["data"]
        except (httpx.TransportError, ValueError, KeyError):
            return False
        return any(model.get("id") == self.spec.served_name for model in served)


def _endpoint(teacher: EndpointTeacher) -> Endpoint:
    return Endpoint(
        teacher.base_url,
        teacher.model,
        teacher.revision,
        teacher.key_variable,
        teacher.price_usd_per_million,
        teacher.budget_usd,
    )


def _port(host: str, wanted: int | None) -> int:
    """The port that is wanted, or a free one; raises RequestError where it is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted or 0))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else "ports go from 1 to 65535"
            if wanted is None:
                raise RequestError(
                    f"nothing can listen on '{host}': {why}. It takes an address of this machine."
                ) from None
            raise RequestError(
                f"port {wanted} can't be used on {host}: {why}. Choose another, or none to take a free one."
            ) from None
        return int(probe.getsockname()[1])
