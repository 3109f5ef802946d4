"""Runs a server so that nothing of it outlives us: ``python -m r1distill.teacher.watch PARENT_PID COMMAND...``.

The watcher leads a session of its own, in which the server and all that the server starts live. When the server ends,
when we die (be it by SIGKILL) or when SIGTERM tells it to, it ends the server, politely for a while, and then kills
whatever is left of the session's process group, itself included.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 10.0


def main(parent: int, command: list[str]) -> None:
    """Start ``command`` and watch it and the process ``parent``; does not return, unless that is gone already."""
    if (parents_end := end_of(parent)) is not None:
        watch(parents_end, lambda: subprocess.Popen(command, stdin=subprocess.DEVNULL).pid)


def end_of(parent: int) -> int | None:
    """A descriptor that can be read when our ``parent`` dies; None where it is dead."""
    try:
        end = os.pidfd_open(parent)
    except ProcessLookupError:
        return None
    return end if os.getppid() == parent else None  # its number may be another's by now


def watch(parents_end: int, start: Callable[[], int]) -> None:
    """Watch the process that ``start`` gives the number of, a child of ours; does not return."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    told_read, told_write = os.pipe()
    os.set_blocking(told_write, False)
    signal.set_wakeup_fd(told_write)  # SIGTERM wakes poll() up
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = start()
    its_end = os.pidfd_open(server)
    waiting = select.poll()
    for end in (told_read, parents_end, its_end):
        waiting.register(end, select.POLLIN)
    waiting.poll()
    if select.select([its_end], [], [], 0)[0]:
        code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
        print(f"the server ended by itself with exit code {code}", file=sys.stderr, flush=True)
        time.sleep(0.2)  # its children may be about to say why
    else:
        os.kill(server, signal.SIGTERM)
        if not select.select([its_end], [], [], GRACE_SECONDS)[0]:
            print(f"the server did not end within {GRACE_SECONDS:g} s and is killed", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)


def forget() -> None:
    """In a fork of a watcher that is to be a server: take signals as usual again."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
