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

GRACE_SECONDS = 10.0


def main(parent: int, command: list[str]) -> None:
    """Start ``command`` and watch it and the process ``parent``; does not return."""
    if os.getpgrp() != os.getpid():
        os.setsid()
    told_read, told_write = os.pipe()
    os.set_blocking(told_write, False)
    signal.set_wakeup_fd(told_write)  # SIGTERM wakes poll() up
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        parents_end = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    if os.getppid() != parent:  # it died before we looked; its number may be another's by now
        return
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    waiting = select.poll()
    for end in (told_read, parents_end, os.pidfd_open(server.pid)):
        waiting.register(end, select.POLLIN)
    waiting.poll()
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            print(f"the server did not end within {GRACE_SECONDS:g} s and is killed", file=sys.stderr, flush=True)
    else:
        print(f"the server ended by itself with exit code {server.returncode}", file=sys.stderr, flush=True)
        time.sleep(0.2)  # its children may be about to say why
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
