"""The sandbox: nothing outside is reached, nothing is left, and where there is none nothing runs."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from r1distill.data import verdict_file
from r1distill.data.config import ROOT
from r1distill.data.errors import RequestError
from r1distill.data.verdicts import VerdictSettings
from r1distill.data.verify import sandbox

from .test_code import QUICK, SUM, SUMS, build_one, examine, fenced, sandboxed


@pytest.fixture
def open_folder():
    """A folder that every user of this machine may write to."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


PRINTS = {"kind": "stdin", "inputs": [""], "outputs": ["blocked"]}
TRY = "try:\n    {}\n    print('done')\nexcept OSError:\n    print('blocked')"


@sandboxed
def test_nothing_outside_can_be_reached(monkeypatch, open_folder):
    secret = open_folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attempts = [
            f"open({str(secret)!r}).read()",
            f"open({str(secret)!r}, 'w').write('mine')",
            f"open({str(open_folder / 'new')!r}, 'w')",
            "open('/etc/passwd').read()",
            "open('/proc/1/environ').read()",
            "__import__('os').listdir('/home')",
            "open('/new', 'w')",
            "open('/usr/new', 'w')",
            "open('/dev/shm/new', 'w')",
            f"open({str(Path(sys.base_prefix) / 'new')!r}, 'w')",
            f"__import__('os').listdir({str(ROOT)!r})",
            f"__import__('socket').create_connection(('127.0.0.1', {port}), 2)",
            "__import__('socket').create_connection(('1.1.1.1', 53), 2)",
            f"__import__('os').kill({os.getpid()}, 0)",
        ]
        for attempt in attempts:
            finding = examine(TRY.format(attempt), PRINTS)
            assert finding.outcome == "pass", (attempt, finding)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    names = "PWD LC_CTYPE"  # bubblewrap and Python set these themselves
    finding = examine(f"import os; print(' '.join(set(os.environ) - set('{names}'.split())) or 'blocked')", PRINTS)
    assert finding.outcome == "pass", finding
    user = "import os, ctypes; print('blocked' if os.getuid() and ctypes.CDLL(None).unshare(0x10000000) else 'root')"
    assert examine(user, PRINTS).outcome == "pass"  # no user namespace to become root in
    assert (secret.read_text(), sorted(os.listdir(open_folder))) == ("secret", ["secret"])


@sandboxed
def test_a_program_leaves_nothing_for_the_next():
    stays = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(30)\nopen('left', 'w').write('x')\nos.mkdir('folder')"
    with sandbox.opened(QUICK) as box:
        assert box.run(stays).status == "ok"
        assert box.run("import os; print(os.listdir('.'), len(os.environ))").stdout.startswith("['program.py']")
        box.run(stays)
        # bubblewrap buries the dead in its own time
        count = "import ctypes, time\ntime.sleep(0.5)\nprint(sum(ctypes.CDLL(None).kill(pid, 0) == 0 for pid in range(2, 200)))"
        assert box.run(count).stdout == "2\n"  # the driver and itself
        for _ in range(3):
            assert box.run("print(input())", "hé\ud800\0").stdout


@sandboxed
def test_root_keeps_no_right_inside():
    """As a user there is nothing to give up; as root the driver does it before any program starts."""
    with sandbox.opened(QUICK) as box:
        run = box.run(
            "import os\ntry: os.setuid(0); os.chroot('/'); print('kept')\nexcept OSError: print('gone', os.getgroups())"
        )
    assert run.stdout in ("gone []\n", f"gone [{os.getgid()}]\n", "gone [65534]\n"), run


KILLED = """
from r1distill.data.verify import sandbox
with sandbox.opened(sandbox.SandboxSettings(seconds=60)) as box:
    print(box.run("print(1)").stdout, flush=True)
    box.run("import os, time; os.fork(); os.setsid(); time.sleep(60)")
"""


def _alive(process):
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _family(pid):
    """The descendants of a process that are alive."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found |= {stat.parent} | _family(int(stat.parent.name))
    return found


@sandboxed
def test_the_sandbox_dies_with_the_process_that_asked_for_it():
    caller = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True)
    assert caller.stdout.readline() == "1\n"
    family = _family(caller.pid)
    assert len(family) >= 3  # bubblewrap, its init, the driver, programs
    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 20
    while left := [process for process in family if _alive(process)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)


# Where there is no sandbox, nothing runs.


@pytest.fixture
def no_sandbox(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.unavailable.cache_clear()
    yield tmp_path
    sandbox.unavailable.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no bubblewrap elsewhere")
def test_without_bubblewrap_the_run_is_refused_and_nothing_runs(no_sandbox, tmp_path):
    mark = tmp_path / "ran"
    finding = examine(f"open({str(mark)!r}, 'w')", SUMS)
    assert finding[:2] == ("unverifiable", "no sandbox")
    assert "apt-get install bubblewrap" in finding.detail
    assert not mark.exists()
    with pytest.raises(RequestError, match="apt-get install bubblewrap"):
        sandbox.require()
    with pytest.raises(RequestError, match="sandbox"):
        build_one(tmp_path, "code", json.dumps(SUMS), fenced(SUM))
    with pytest.raises(RequestError, match="sandbox"):
        verdict_file.verify(tmp_path / "in.jsonl", tmp_path / "out", {}, "code", VerdictSettings())


@pytest.mark.skipif(sys.platform != "linux", reason="there is no bubblewrap elsewhere")
def test_bubblewrap_that_may_make_no_namespaces_is_a_refusal_that_says_why(no_sandbox):
    broken = no_sandbox / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "No permissions to create new namespace" in sandbox.unavailable()
    with pytest.raises(RequestError, match="No permissions"):
        sandbox.require()


@sandboxed
def test_a_sandbox_that_does_not_start_is_no_fault_of_the_program(monkeypatch, tmp_path):
    assert sandbox.unavailable() is None
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: Resource temporarily unavailable' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = ("unverifiable", "the sandbox did not start", "bwrap: Resource temporarily unavailable")
    assert examine(SUM, SUMS) == reason
