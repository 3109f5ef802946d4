"""A function over many inputs in processes that can be killed, in order, with a bounded number in flight."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

A = TypeVar("A", bound=tuple[Any, ...])
R = TypeVar("R")

IN_FLIGHT_PER_WORKER = 16
MEMORY_BYTES = 4 << 30  # of one worker; sympy can ask for all there is


def ordered(
    function: Callable[..., R], inputs: Iterable[A], workers: int, timeout_seconds: float
) -> Iterator[tuple[A, R | str]]:
    """Yield (input, function(*input)) in the order of the inputs; where a call hangs, dies or raises, why as a string.

    A call that exceeds ``timeout_seconds`` is killed with its process; the others go on.
    """
    from pebble import ProcessPool

    # Workers are forked from a small server that has math-verify loaded: a killed one is replaced at once, and none
    # inherits the threads or the memory of this process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["r1distill.data.verify.pool", "math_verify"])
    executor = ProcessPool(max_workers=workers, initializer=_start, context=context)
    waiting: deque[tuple[A, Any]] = deque()
    try:
        for one in inputs:
            waiting.append((one, executor.schedule(function, args=one, timeout=timeout_seconds)))
            if len(waiting) >= workers * IN_FLIGHT_PER_WORKER:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        executor.stop()
        executor.join()


def _result(one: A, future: Any) -> tuple[A, Any]:
    from pebble import ProcessExpired

    try:
        return one, future.result()
    except TimeoutError:
        return one, "the verifier ran out of time"
    except ProcessExpired:
        return one, "the verifier died"
    except Exception as error:  # sympy raises almost anything on odd input
        return one, f"the verifier raised {type(error).__name__}"


def _start() -> None:
    """Limit a worker's memory, have it die with its parent, and keep math-verify's warnings to itself."""
    import ctypes
    import logging
    import resource
    import signal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
