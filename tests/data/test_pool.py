"""The pool of processes: what a hang, a death and a slow consumer cost."""

import os
import signal
import time

import pytest

from r1distill.data.errors import R1DistillError
from r1distill.data.verify import pool
from r1distill.data.verify.math import examine

RIGHT = ("\\boxed{4}", "4", "")
HANGS = ("\\boxed{9^{9^{9^{9}}}}", "\\sqrt{2}", "")  # sympy would expand it


def test_a_hang_costs_its_own_row_and_not_those_sent_with_it():
    inputs = [RIGHT] * 5 + [HANGS] + [RIGHT] * (pool.BATCH + 5)
    results = [result for _, result in pool.ordered(examine, inputs, 1, 2)]
    assert results[5] == "the verifier ran out of time"
    assert [result.outcome for place, result in enumerate(results) if place != 5] == ["pass"] * (len(inputs) - 1)


def test_a_worker_that_is_killed_is_replaced():
    results = pool.ordered(os.kill, [(os.getpid(), 0), (0, "no signal"), (os.getpid(), 0)], 1, 30)
    assert [result for _, result in results] == [None, "the verifier raised TypeError", None]
    inputs = [("true",), (f"kill -{int(signal.SIGKILL)} $PPID",), ("false",)]
    assert [result for _, result in pool.ordered(os.system, inputs, 1, 30)] == [0, "the verifier died", 256]


def test_a_consumer_that_is_slow_does_not_cost_rows():
    results = pool.ordered(abs, ((-number,) for number in range(100)), 2, 0.5)
    assert next(results) == ((0,), 0)
    time.sleep(1)  # longer than a call may take
    assert [result for _, result in results] == list(range(1, 100))


def test_results_come_in_order_from_several_workers_and_none_of_them_is_left():
    inputs = [(0.02 * (number % 3 == 0),) for number in range(60)]
    assert [one for one, _ in pool.ordered(time.sleep, inputs, 3, 30)] == inputs
    pids = {result for _, result in pool.ordered(os.getpid, [()] * 200, 2, 30)}
    assert 1 <= len(pids) <= 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_function_that_no_process_can_import_is_an_error():
    with pytest.raises(R1DistillError, match="could not start"):
        list(pool.ordered(_here_alone, [(1,)], 1, 30))


def _here_alone(number):
    return number


def test_one_that_died_is_tried_once_more(tmp_path):
    """What killed it may have been the machine; what dies again did it itself."""
    once = f"mkdir {tmp_path}/once 2> /dev/null && kill -{int(signal.SIGKILL)} $PPID"
    twice = f"mkdir {tmp_path}/twice 2> /dev/null && sleep 60 || exit 3"
    inputs = [("true",), (once,), ("false",), (twice,)]
    assert [result for _, result in pool.ordered(os.system, inputs, 1, 1)] == [0, 256, 256, 3 << 8]


def test_results_that_a_dying_worker_had_not_sent_are_made_again():
    """The quick ones before a death are asked again; the one that it died of is known."""
    kill = f"kill -{int(signal.SIGKILL)} $PPID"
    inputs = [("true",)] * 3 + [(kill,)] + [("false",)] * 3 + [(kill,)]
    results = [result for _, result in pool.ordered(os.system, inputs, 1, 30)]
    assert results == [0, 0, 0, "the verifier died", 256, 256, 256, "the verifier died"]
