"""The same work on a Ray cluster: a function over batches, their results in order, a bounded number under way."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from r1distill.data.errors import R1DistillError, RequestError

A = TypeVar("A")
R = TypeVar("R")

RETRIES = 5  # of one batch, whose worker or node died
BATCHES_PER_CPU = 2  # one at work, one waiting


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at ``address`` ("auto": the one of this machine) while the block lasts.

    Raises RequestError where ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise RequestError("the hardware names a Ray cluster, and ray is not installed: pip install ray") from None
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"no Ray cluster answers at '{address}': {error}. Start one: ray start --head, and on every other node "
            "ray start --address=HEAD:6379"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=10).close()


def cores() -> int:
    """How many cores the connected cluster has."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def gpus(free: bool = False) -> int:
    """How many GPUs the connected cluster has, or has free."""
    import ray

    return int((ray.available_resources() if free else ray.cluster_resources()).get("GPU", 0))


def ordered(function: Callable[..., R], batches: Iterable[A], *arguments: Any, gpus: int = 0) -> Iterator[R]:
    """Yield function(batch, *arguments) of every batch, in order, each run by a worker of the connected cluster.

    A worker has one core, and so many GPUs to itself.
    A batch whose worker dies is run again elsewhere; raises R1DistillError where that happens too often, and what the
    function raises. ``function`` must be importable on every node.
    """
    import ray

    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(function)
    shared = [ray.put(argument) for argument in arguments]
    room = BATCHES_PER_CPU * cores()
    waiting: deque[Any] = deque()
    try:
        for batch in batches:
            waiting.append(remote.remote(batch, *shared))
            if len(waiting) >= room:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for left in waiting:
            ray.cancel(left, force=True)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise R1DistillError(
            f"the Ray cluster lost a batch {RETRIES + 1} times: {error}. What is done is kept; see to its nodes and "
            "run the same command again."
        ) from error
