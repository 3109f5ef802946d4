"""What was paid for is on the disk, whatever happens next."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from decimal import Decimal

import pytest

from r1distill.data.errors import R1DistillError, RequestError
from r1distill.teacher.ledger import Exchange, Ledger, digest, merge

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


def paid(key, when, cost, state="failed", scope="s"):
    body = None if state == "failed" else when.encode()
    return replace(EXCHANGE, key=key, scope=scope, state=state, body=body, cost_usd=cost, created_at=when)


def test_what_was_paid_stays_on_the_account_when_another_answer_takes_its_place(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(paid("a", "1", "0.1"))
        ledger.put(paid("a", "2", "0.2"))
        ledger.put(paid("a", "3", "0.4", "done"))
        assert ledger.spent_usd("s") == Decimal("0.7")
        ledger.put(paid("a", "4", "0.8", "done"))  # comes too late: the answer stays, and this was paid too
        ledger.put(paid("a", "4", "0.8", "done"))
        ledger.put(paid("b", "1", "5", scope="t"))
        assert ledger.get("a").created_at == "3"
    with Ledger(tmp_path) as ledger, Ledger(tmp_path, "1") as part:
        assert ledger.spent_usd("s") == part.spent_usd("s") == Decimal("1.5")
        assert ledger.spent_usd("t") == 5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2, 1, 0)])
def test_the_losers_of_a_merge_stay_on_the_account_in_any_order(tmp_path, order):
    for name, rows in (
        ("1", [paid("a", "1", "0.1"), paid("a", "2", "0.2", "done"), paid("b", "1", "1", "done")]),
        ("2", [paid("a", "3", "0.4", "done"), paid("b", "2", "2")]),
        ("3", [paid("a", "4", "0.8"), paid("c", "1", None, "done")]),
    ):
        with Ledger(tmp_path, name) as part:
            for row in rows:
                part.put(row)
    parts = [tmp_path / f"ledger-{name}.sqlite" for name in "123"]
    with Ledger(tmp_path / "into") as into:
        merge(into, [parts[place] for place in order])
        assert into.spent_usd("s") == Decimal("4.5")
        merge(into, parts)
        assert into.spent_usd("s") == Decimal("4.5")
        assert into.get("a").created_at == "3"
    with Ledger(tmp_path / "beyond") as beyond:
        merge(beyond, [into.file, *parts])
        assert beyond.spent_usd("s") == Decimal("4.5")


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


def test_what_is_kept_is_on_the_disk_when_it_is_told_and_shares_commits(ledger, tmp_path):
    commits = []
    put = ledger.put
    ledger.put = lambda *some: (commits.append(len(some)), put(*some))
    told = [ledger.keep(replace(EXCHANGE, key=str(number))) for number in range(500)]
    for number, one in enumerate(told):
        one.result(timeout=30)
        with Ledger(tmp_path / "ledger") as other:
            assert other.settled(str(number))
        if number > 20:
            break
    assert [one.result(timeout=30) for one in told] == [None] * 500
    assert sum(commits) == 500
    assert len(commits) < 100


def test_what_is_still_waiting_is_committed_at_the_end(tmp_path):
    with Ledger(tmp_path) as ledger:
        told = [ledger.keep(replace(EXCHANGE, key=str(number))) for number in range(300)]
    assert all(one.done() for one in told)
    with Ledger(tmp_path) as ledger:
        assert len(ledger.states([str(number) for number in range(301)])) == 300


def test_who_waits_is_told_what_went_wrong_and_the_next_one_is_kept(ledger):
    wrong = replace(EXCHANGE, key="wrong", state=None)
    with pytest.raises(R1DistillError, match="NOT NULL constraint failed"):
        ledger.keep(wrong).result(timeout=30)
    ledger.keep(EXCHANGE).result(timeout=30)
    assert ledger.settled("k")
    assert not ledger.settled("wrong")


def test_many_are_looked_up_at_once_and_a_put_is_all_or_nothing(ledger):
    ledger.put(*[replace(EXCHANGE, key=str(number), state="done" if number % 2 else "failed") for number in range(200)])
    assert ledger.states(["1", "2", "nothing"]) == {"1": "done", "2": "failed"}
    assert set(ledger.fetch([str(number) for number in range(250)])) == {str(number) for number in range(200)}
    with pytest.raises(R1DistillError):
        ledger.put(replace(EXCHANGE, key="a"), replace(EXCHANGE, key="b", request=None))
    assert ledger.states(["a", "b"]) == {}


def test_the_first_format_is_read_and_written_on(tmp_path):
    with Ledger(tmp_path) as ledger:
        ledger.put(EXCHANGE)
        ledger._db.execute("UPDATE exchanges SET body = ?", (zlib.compress(EXCHANGE.body),))
        ledger._db.execute("PRAGMA user_version = 1")
        ledger._db.execute("DROP TRIGGER costs_stay")
        ledger._db.execute("DROP TABLE replaced")
    with Ledger(tmp_path / "into") as into:
        assert merge(into, [ledger.file]) == 1
    with Ledger(tmp_path, "1") as part:
        assert part.spent_usd("s") == Decimal("0.001")
    with Ledger(tmp_path) as ledger:
        ledger.put(replace(EXCHANGE, key="new"))
        assert ledger.get("k") == EXCHANGE
        assert ledger.get("new").body == EXCHANGE.body


PROCESS = """
import sys
from dataclasses import replace
from pathlib import Path
from r1distill.teacher.ledger import Exchange, Ledger
one = Exchange("", "s", "done", None, "{}", b"x" * 3000, 1, 0.1, None, "now")
with Ledger(Path(sys.argv[1])) as ledger:
    told = [ledger.keep(replace(one, key=f"{sys.argv[2]}-{number}")) for number in range(500)]
    ledger.put(*[replace(one, key=f"both-{number}") for number in range(500)])
"""


def test_several_processes_write_one_file_at_once(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path), str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with Ledger(tmp_path) as ledger:
        wanted = [f"{name}-{number}" for name in ("0", "1", "2", "both") for number in range(500)]
        assert set(ledger.states(wanted)) == set(wanted)


def filled(folder, part, **rows):
    """A part's file with exchanges: key=(state, when)."""
    with Ledger(folder, part) as ledger:
        bodies = {"done": f"{part}".encode(), "failed": None}
        ledger.put(*[replace(EXCHANGE, key=k, state=s, body=bodies[s], created_at=at) for k, (s, at) in rows.items()])
    return ledger.file


def merged(folder, parts):
    with Ledger(folder) as into:
        counts = [merge(into, parts), merge(into, parts)]
        return counts, {key: (one.state, one.body) for key, one in into.fetch([*"abcdef"]).items()}


def test_parts_become_one_whatever_their_order(tmp_path):
    first = filled(
        tmp_path, "1", a=("done", "1"), b=("failed", "9"), c=("done", "5"), d=("failed", "1"), e=("done", "3")
    )
    second = filled(
        tmp_path, "2", b=("done", "2"), c=("done", "6"), d=("failed", "2"), e=("done", "3"), f=("done", "1")
    )
    assert [first.name, second.name] == ["ledger-1.sqlite", "ledger-2.sqlite"]
    counts, found = merged(tmp_path / "one", [first, second])
    assert counts == [10, 0]
    assert found == {
        "a": ("done", b"1"),
        "b": ("done", b"2"),
        "c": ("done", b"2"),
        "d": ("failed", None),
        "e": ("done", b"2"),
        "f": ("done", b"2"),
    }
    assert merged(tmp_path / "other", [second, first])[1] == found
    with pytest.raises(R1DistillError, match="there is no ledger"):
        merged(tmp_path / "one", [tmp_path / "ledger-3.sqlite"])


MERGER = """
import sys
from pathlib import Path
from r1distill.teacher.ledger import Ledger, merge
with Ledger(Path(sys.argv[1]) / "into") as into:
    print("ready", flush=True)
    merge(into, [Path(sys.argv[1]) / "ledger-1.sqlite"])
"""


def test_a_merge_that_is_killed_is_done_again_without_loss(tmp_path):
    with Ledger(tmp_path, "1") as part:
        part.put(*[replace(EXCHANGE, key=str(n), body=os.urandom(8000)) for n in range(5000)])
    draw = random.Random(2)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", MERGER, str(tmp_path)], stdout=subprocess.PIPE) as merger:
            merger.stdout.readline()
            time.sleep(draw.uniform(0, 0.1))
            merger.kill()
    with Ledger(tmp_path / "into") as into, Ledger(tmp_path, "1") as part:
        merge(into, [part.file])
        keys = [str(n) for n in range(5000)]
        assert into.fetch(keys) == part.fetch(keys)


def test_a_part_finds_what_the_whole_has_and_writes_to_itself(tmp_path):
    failed = replace(EXCHANGE, key="f", state="failed", body=None, cost_usd=None)
    with Ledger(tmp_path) as whole:
        whole.put(EXCHANGE, failed)
    with Ledger(tmp_path, "1") as part, Ledger(tmp_path) as whole:
        part.put(replace(EXCHANGE, key="p"), replace(EXCHANGE, key="f", body=b"at last"))
        assert part.states(["k", "p", "f", "x"]) == {"k": "done", "p": "done", "f": "done"}
        assert part.get("k") == EXCHANGE
        assert part.get("f").body == b"at last"
        assert whole.states(["k", "p", "f"]) == {"k": "done", "f": "failed"}
        assert part.spent_usd("s") == Decimal("0.003")
        assert merge(whole, [part.file]) == 2
        assert whole.states(["k", "p", "f"]) == dict.fromkeys("kpf", "done")
        assert part.spent_usd("s") == whole.spent_usd("s") == Decimal("0.003")


def test_parts_of_one_folder_ask_the_same_model_at_once(tmp_path):
    with Ledger(tmp_path, "1") as one, Ledger(tmp_path, "2") as two, one.asking("scope"), two.asking("scope"):
        pass


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
    with pytest.raises(R1DistillError, match="has format 99, this version of r1distill reads 3"):
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
