"""Several servers of one model: the least busy one is asked, those that fail are left out and come back."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.teacher.endpoints import Endpoints
from r1distill.teacher.sample import ask, rows
from r1distill.teacher.settings import Client

MANY = [str(number) for number in range(80)]


def client_of(*urls, **changes):
    values = {"in_flight": 8, "attempts": 3, "backoff_seconds": 0.05, "timeout_seconds": 20, "down_seconds": 20}
    return Client.model_validate({**values, "base_urls": urls, **changes})


@contextmanager
def later(start):
    """Call ``start`` half a second into the block; what it returned is in the list."""
    found = []
    timer = threading.Timer(0.5, lambda: found.append(start()))
    timer.start()
    yield found
    timer.join()


def all_done(order, ledger):
    return {row["state"] for row in rows(order, ledger)} == {"done"}


def test_the_least_busy_one_is_asked(fake, another, ledger, order):
    slow = another()
    slow.delay, fake.delay = 0.5, 0.01
    ask(order(MANY), fake.endpoint(), ledger, client_of(fake.url, slow.url))
    assert all_done(order(MANY), ledger)
    assert 4 <= slow.asked.total() < fake.asked.total()
    assert fake.asked.total() + slow.asked.total() == 80


def test_one_that_is_not_there_costs_no_attempt_and_comes_back(fake, another, ledger, order, capfd):
    gone = another()
    port = int(gone.url.rpartition(":")[2].partition("/")[0])
    gone.close()
    ask(order(MANY), fake.endpoint(), ledger, client_of(fake.url, gone.url, attempts=1))
    assert all_done(order(MANY), ledger)
    assert f"{gone.url} is left out until it answers again: no answer: Cannot connect" in capfd.readouterr().err

    fake.delay = 0.05
    more = order([f"w{number}" for number in range(150)])
    with later(lambda: another(port)) as back:
        ask(more, fake.endpoint(), ledger, client_of(fake.url, gone.url, attempts=1))
    assert all_done(more, ledger)
    assert back[0].asked.total() > 0
    assert fake.asked.total() + back[0].asked.total() == 230


def test_one_that_answers_with_errors_is_left_out_while_there_is_another(
    fake, another, ledger, order, capfd, monkeypatch
):
    monkeypatch.setenv("FAKE_KEY", "sk-very-secret")
    ill = another()
    ill.always, fake.delay = (500, {}, {"error": {"message": "sk-very-secret, as scripted"}}), 0.02
    ask(
        order(MANY),
        fake.endpoint(key_variable="FAKE_KEY"),
        ledger,
        client_of(fake.url, ill.url, attempts=6, backoff_seconds=0.3),
    )
    assert all_done(order(MANY), ledger)
    assert ill.asked.total() < 20
    assert "is left out until it answers again: HTTP 500: ***, as scripted" in capfd.readouterr().err


def test_a_request_is_not_failed_by_the_probes_that_it_makes(fake, another, ledger, order):
    ill = another()
    ill.always, fake.always = 500, "sleep 0.2"
    few = [str(number) for number in range(24)]
    ask(
        order(few), fake.endpoint(), ledger, client_of(fake.url, ill.url, attempts=3, in_flight=2, backoff_seconds=0.01)
    )
    assert all_done(order(few), ledger)
    assert ill.asked.total() > 8


def test_a_limit_of_one_leaves_the_other_to_be_asked(fake, another, ledger, order):
    limited = another()
    limited.always = (429, {"retry-after": "60"})
    ask(order(MANY), fake.endpoint(), ledger, client_of(fake.url, limited.url))
    assert all_done(order(MANY), ledger)
    assert fake.asked.total() == 80
    assert limited.asked.total() <= 8


def test_where_nobody_is_there_the_run_stops_with_the_reason(fake, another, ledger, order):
    fake.close()
    gone = another()
    gone.close()
    with pytest.raises(
        R1DistillError, match=r"nobody to ask for 0\.3 s \(down_seconds\) at .*: no answer: Cannot connect"
    ):
        ask(order(MANY), fake.endpoint(), ledger, client_of(fake.url, gone.url, down_seconds=0.3))
    assert not any(ledger.states([order(MANY).key(request) for request in order(MANY).requests]))


def test_a_single_server_that_goes_and_comes_back_loses_nothing(fake, another, ledger, order):
    port = int(fake.url.rpartition(":")[2].partition("/")[0])
    fake.close()
    with later(lambda: another(port)) as back:
        ask(order(MANY), fake.endpoint(), ledger, client_of(attempts=1))
    assert all_done(order(MANY), ledger)
    assert back[0].asked.total() == 80


def test_probes_come_one_at_a_time_and_ever_more_seldom():
    places = Endpoints(["http://a", "http://b"], None, Client(backoff_seconds=100.0))
    one, _ = places.choose()
    two, _ = places.choose()
    assert {one.url, two.url} == {"http://a", "http://b"}
    places.failed(one, "refused", reachable=False)
    places.failed(one, "refused", reachable=False)  # another request that was in flight there: nothing new
    assert one.outages == 1
    assert all(places.choose()[0] is two for _ in range(5))
    one.ready_at = 0
    probe, _ = places.choose()
    assert probe is one
    assert places.choose()[0] is two
    places.leave(one)
    places.failed(one, "refused", reachable=False)
    assert one.outages == 2
    assert places.down_seconds() == 0
    one.ready_at = 0
    places.choose()
    places.leave(one)
    places.answered(one)
    assert (one.outages, one.failures) == (0, 0)


CROWD = """
import resource, sys
from pathlib import Path
from r1distill.teacher.ledger import Ledger
from r1distill.teacher.sample import Order, Request, ask
from r1distill.teacher.serve import Endpoint
from r1distill.teacher.settings import Client, Sampling
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
requests = [Request(str(n), 0, [{"role": "user", "content": str(n)}]) for n in range(100)]
with Ledger(Path(sys.argv[1])) as ledger:
    ask(Order(requests, Sampling(max_tokens=9), {}), Endpoint(sys.argv[2], "m"), ledger, Client(in_flight=100))
"""


def test_more_in_flight_than_files_are_usually_allowed(fake, tmp_path):
    fake.always = "until 100"
    done = subprocess.run([sys.executable, "-c", CROWD, str(tmp_path), fake.url], timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert fake.most_in_flight == 100
