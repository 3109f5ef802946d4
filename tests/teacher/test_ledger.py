"""What was paid for is on the disk, whatever happens next."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.teacher.ledger import Exchange, Ledger, digest

EXCHANGE = Exchange(
    "k", "s", "done", None, '{"model": "m"}', b"body \x00 \xff", 1, 0.5, "0.001", "2026-01-01T00:00:00+00:00"
)


def test_what_is_put_is_found_again_by_another_process_of_the_same_home(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(EXCHANGE)
        assert ledger.get("k") == EXCHANGE
        assert ledger.get("other") is None
    with Ledger(tmp_path) as ledger:
        assert ledger.get("k") == EXCHANGE
        assert ledger.settled("k")
        assert not ledger.settled("other")


def test_only_what_failed_is_replaced(ledger):
    failed = replace(EXCHANGE, state="failed", error="HTTP 500", body=None, cost_usd=None)
    ledger.put(failed)
    assert not ledger.settled("k")
    ledger.put(EXCHANGE)
    assert ledger.get("k") == EXCHANGE
    ledger.put(failed)
    ledger.put(replace(EXCHANGE, body=b"another answer"))
    assert ledger.get("k") == EXCHANGE


def test_costs_add_up_exactly_and_by_scope(ledger):
    for number in range(10):
        ledger.put(replace(EXCHANGE, key=str(number), cost_usd="0.1"))
    ledger.put(replace(EXCHANGE, key="other", scope="t", cost_usd="5"))
    ledger.put(replace(EXCHANGE, key="free", cost_usd=None))
    assert ledger.spent_usd("s") == Decimal("1.0")
    assert ledger.spent_usd("unknown") == 0


WRITER = """
import sys
from pathlib import Path
from r1distill.teacher.ledger import Exchange, Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    for number in range(100_000):
        ledger.put(Exchange(f"{sys.argv[2]}-{number}", "s", "done", None, "{}", b"x" * 3000, 1, 0.1, None, "now"))
        print(f"{sys.argv[2]}-{number}", flush=True)
"""


def test_what_was_reported_as_kept_survives_sigkill_at_any_moment(tmp_path):
    draw = random.Random(1)
    told = []
    for round_ in range(4):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(round_)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            told.append(writer.stdout.readline().strip())
            time.sleep(draw.uniform(0, 0.3))
            writer.send_signal(signal.SIGKILL)
            told += [line.strip() for line in writer.stdout if line.endswith("\n")]
    assert len(told) > 4
    with Ledger(tmp_path) as ledger:
        assert all(ledger.get(key).body == b"x" * 3000 for key in told)


def test_two_runs_dont_ask_the_same_model_at_once(ledger):
    with ledger.asking("scope"), Ledger(ledger.file.parent) as other:
        with pytest.raises(RequestError, match="another run is asking the same model"), other.asking("scope"):
            pass
        with other.asking("another scope"):
            pass
    with ledger.asking("scope"):
        pass


def test_a_damaged_file_and_another_format_are_told(tmp_path):
    file = tmp_path / "ledger.sqlite"
    file.write_bytes(b"not a database, but long enough to have a header of its own" * 20)
    with pytest.raises(R1DistillError, match=r"can't be used: file is not a database.*move it away"):
        Ledger(tmp_path)
    file.unlink()
    with Ledger(tmp_path) as ledger:
        ledger._db.execute("PRAGMA user_version = 99")
    with pytest.raises(R1DistillError, match="has format 99, this version of r1distill reads 1"):
        Ledger(tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from r1distill.teacher.ledger import Exchange, Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Ledger(Path(sys.argv[1])) as ledger:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    for number in range(1000):
        ledger.put(Exchange(str(number), "s", "done", None, "{}", __import__("os").urandom(3000), 1, 0.1, None, "now"))
        print(number, flush=True)
"""


def test_a_full_disk_is_told_and_what_was_kept_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "R1DistillError: the ledger" in done.stderr
    assert "Nothing more is asked" in done.stderr
    with Ledger(tmp_path) as ledger:
        assert all(ledger.settled(number) for number in done.stdout.split())
        assert done.stdout.split()


def test_a_digest_does_not_hang_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, "ü"]}) == digest({"b": [1, "ü"], "a": 1})
    assert digest(["1"]) != digest([1])


def test_a_home_that_cant_be_written_is_told(tmp_path):
    (tmp_path / "ledger").write_text("a file where a folder belongs")
    with pytest.raises(R1DistillError, match="the ledger .* can't be used"):
        Ledger(tmp_path / "ledger")
    assert os.listdir(tmp_path) == ["ledger"]
