"""A function over many inputs in processes that can be killed, in order, with a bounded number in flight."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from r1distill.data.errors import R1DistillError

A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R")

IN_FLIGHT_PER_WORKER = 256
BATCH = 64  # inputs in one message
SEND_SECONDS = 0.05  # results go back together, but none of them waits longer
MEMORY_BYTES = 4 << 30  # of one worker; sympy can ask for all there is
START_SECONDS = 120


def ordered(
    function: Callable[..., R], inputs: Iterable[A], workers: int, timeout_seconds: float | Callable[..., float]
) -> Iterator[tuple[A, R | str]]:
    """Yield (input, function(*input)) in the order of the inputs; where a call hangs, dies or raises, why as a string.

    A call that exceeds ``timeout_seconds`` (a number, or what gives it for an input) is killed with its process; the
    others go on. One that hung or died is tried once more: a machine that was busy, or out of memory, is no reason to
    give it up. ``function`` is importable.
    """
    source = enumerate(inputs)
    drawn: deque[tuple[int, A]] = deque()  # and not yet yielded
    todo: deque[tuple[int, A]] = deque()
    done: dict[int, R | str] = {}
    stopped: set[int] = set()  # those that a worker was stopped by
    pool = [_Worker(function) for _ in range(workers)]
    try:
        more = True
        while True:
            while more and len(drawn) < workers * IN_FLIGHT_PER_WORKER:
                more = (one := next(source, None)) is not None
                if one is not None:
                    drawn.append(one)
                    todo.append(one)
            if not drawn:
                return
            share = BATCH if more else min(BATCH, -(-len(todo) // (2 * workers)))  # the last ones evenly
            for worker in pool:
                if worker.ready and not worker.asked and todo:
                    worker.ask(todo, share)
            _collect(pool, done, timeout_seconds, waiting=drawn[0][0] not in done)
            for place, worker in enumerate(pool):
                if worker.stopped is not None:
                    pool[place] = worker.replaced(function, done, todo, stopped)
            for _ in range(BATCH):
                if drawn and drawn[0][0] in done:
                    number, one_input = drawn.popleft()
                    yield one_input, done.pop(number)
    finally:
        for worker in pool:
            worker.kill()


@dataclass
class _Worker:
    """A process and what it was asked; ``at`` is shared with it: which of these inputs it is at."""

    function: Callable[..., Any]
    asked: deque[tuple[int, Any]] = field(default_factory=deque)
    answered: int = 0  # of what it was asked last
    ready: bool = False
    stopped: str | None = None  # why it is of no more use

    def __post_init__(self) -> None:
        # Forked from a small server that has math-verify loaded: a killed one is replaced at once, and none inherits
        # the threads or the memory of this process.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["r1distill.data.verify.pool", "r1distill.data.verify.math", "r1distill.data.words", "math_verify"]
        )
        self.connection, theirs = context.Pipe()
        self.at = context.RawValue("q", 0)
        self.process = context.Process(target=_work, args=(self.function, theirs, self.at), daemon=True)
        self.process.start()
        theirs.close()
        self.since = time.monotonic()

    def ask(self, todo: deque[tuple[int, Any]], share: int) -> None:
        """Send the first of ``todo``; only to an idle worker, which is reading, so that no side waits for ever."""
        self.asked.extend(todo.popleft() for _ in range(min(share, len(todo))))
        self.answered = self.at.value = 0
        self.since = time.monotonic()
        try:
            self.connection.send([one for _, one in self.asked])
        except OSError:  # killed while it was idle: none of them is to blame
            self.stopped = "the verifier died"
            todo.extendleft(reversed(self.asked))
            self.asked.clear()

    def limit(self, timeout_seconds: float | Callable[..., float]) -> float:
        """How many seconds it has for what it does."""
        if not self.ready:
            return START_SECONDS
        return timeout_seconds(*self.asked[self.unsent][1]) if callable(timeout_seconds) else timeout_seconds

    @property
    def unsent(self) -> int:
        """How many inputs it has done whose results have not come."""
        return max(0, min(self.at.value - self.answered, len(self.asked) - 1))

    def receive(self, done: dict[int, Any]) -> None:
        """Take what has come back so far."""
        try:
            while self.connection.poll():
                results = self.connection.recv()
                self.since = time.monotonic()
                for result in results:
                    done[self.asked.popleft()[0]] = result
                self.answered += len(results)
                self.ready = True
        except (EOFError, OSError):
            self.stopped = "the verifier died"

    def replaced(
        self, function: Callable[..., Any], done: dict[int, Any], todo: deque[tuple[int, Any]], stopped: set[int]
    ) -> _Worker:
        """A fresh worker. All that this one had are asked again, but for an input that has stopped two."""
        self.kill()
        if not self.ready:
            raise R1DistillError(
                f"A verifier process could not start: {self.process.exitcode=}. Its own message stands above; "
                "expected a function that can be imported and enough memory for math-verify."
            )
        if self.asked:
            number, _ = self.asked[place := self.unsent]
            if number in stopped:
                done[number] = self.stopped
                del self.asked[place]
            stopped.add(number)
        todo.extendleft(reversed(self.asked))
        return _Worker(function)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _collect(
    pool: list[_Worker], done: dict[int, Any], timeout_seconds: float | Callable[..., float], waiting: bool
) -> None:
    """Take results; where one is ``waiting`` for them, until some are there or a worker has exceeded its time."""
    busy = {worker.connection: worker for worker in pool if worker.asked or not worker.ready}
    limits = {key: worker.limit(timeout_seconds) for key, worker in busy.items()}
    now = time.monotonic()
    patience = min((worker.since + limits[key] - now for key, worker in busy.items()), default=0) if waiting else 0
    for connection in wait(list(busy), max(0, patience)):
        busy[connection].receive(done)  # type: ignore[index]
    now = time.monotonic()
    for key, worker in busy.items():
        if worker.asked and worker.stopped is None and now - worker.since > limits[key] and not key.poll():
            worker.stopped = "the verifier ran out of time"
        elif not worker.ready and now - worker.since > START_SECONDS:
            worker.stopped = "the verifier did not start"


def _work(function: Callable[..., Any], connection: Connection, at: Any) -> None:
    """A worker's life: batches of inputs in, results out, until the other end is closed."""
    _start()
    connection.send([])
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        results, sent = [], time.monotonic()
        for number, one in enumerate(batch):
            at.value = number
            try:
                results.append(function(*one))
            except Exception as error:  # sympy raises almost anything on odd input
                results.append(f"the verifier raised {type(error).__name__}")
            if number + 1 == len(batch) or time.monotonic() - sent > SEND_SECONDS:
                connection.send(results)
                results, sent = [], time.monotonic()


def _start() -> None:
    """Limit a worker's memory, have it die with its parent, and keep math-verify's warnings to itself."""
    import ctypes
    import logging
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
