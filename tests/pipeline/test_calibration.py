"""What was measured is on disk, damaged lines spoil nothing, and the planner takes it on the same hardware alone."""

import json
import logging
import subprocess
import sys
import time

import pytest

from r1distill.data.config import load
from r1distill.pipeline import calibration
from r1distill.pipeline.calibration import Measurement, append, children_gib, read, watching
from r1distill.pipeline.hardware import named
from r1distill.pipeline.plan import of_run, plan, record
from r1distill.pipeline.run import Run
from r1distill.students.catalogue import Student
from r1distill.teacher.settings import load_teacher


def measurement(**changes):
    values = {"stage": "checkpoint", "subject": "smollm2-135m", "work": "full training at 512 tokens"}
    return Measurement(**{**values, "hardware": "2 cores, 24 GiB", "layout": "CPU", "seconds": 10, **changes})


def smollm2(measured=(), hardware="laptop"):
    student = load("students", "smollm2-135m", Student)
    return plan(student, load_teacher("embedded"), named(hardware), *_questions(), measured)


def _questions():
    run = Run.load("smollm2-135m", hardware="laptop")
    return run.prompts, run.benchmarks


def stage(answer, name):
    return next(each for each in answer.stages if each.stage == name)


def test_lines_are_appended_and_read_in_order(tmp_path):
    for seconds in (1, 2):
        append(tmp_path / "home", measurement(seconds=seconds))
    assert [one.seconds for one in read(tmp_path / "home")] == [1, 2]
    assert read(tmp_path / "nowhere") == []


def test_damaged_and_cut_off_lines_are_skipped_with_a_warning(tmp_path, caplog):
    file = tmp_path / calibration.FILE
    append(tmp_path, measurement(seconds=1))
    with file.open("ab") as out:
        out.write(b'{"stage": "checkpoint"}\n\xff\xfe not JSON\n' + file.read_bytes()[:40])  # the last: a crash
    append(tmp_path, measurement(seconds=2))
    with caplog.at_level(logging.WARNING):
        assert [one.seconds for one in read(tmp_path)] == [1, 2]
    assert [record.getMessage().split(":")[1].split()[0] for record in caplog.records] == ["2", "3", "4"]


def test_the_newest_measurement_of_this_work_on_this_hardware_counts():
    rows = [measurement(seconds=1), measurement(seconds=2), measurement(seconds=3, hardware="8 cores, 24 GiB")]
    found = calibration.last(rows, "checkpoint", "smollm2-135m", "full training at 512 tokens", "2 cores, 24 GiB")
    assert found.seconds == 2
    assert calibration.last(rows, "scores", "smollm2-135m", "full training at 512 tokens", "2 cores, 24 GiB") is None


def test_the_plan_takes_the_measured_speed_and_says_so():
    before = stage(smollm2(), "checkpoint")
    rows = [measurement(hardware=named("laptop").kind, tokens_per_second=2 * before.tokens_per_second)]
    answer = smollm2(rows)
    after = stage(answer, "checkpoint")
    assert after.hours == pytest.approx(before.hours / 2)
    assert "measured here" in answer.text() and "the hours are taken from it" in answer.text()
    assert json.loads(json.dumps(answer.as_dict()))["stages"][1]["measured"]["seconds"] == 10
    assert stage(smollm2(rows, "1xrtx4090"), "checkpoint").measured is None


def test_seconds_stand_in_where_a_stage_has_no_speed():
    before = stage(smollm2(), "scores")
    values = {"stage": "scores", "work": before.work, "hardware": named("laptop").kind, "seconds": 300}
    assert stage(smollm2([measurement(**values)]), "scores").hours == pytest.approx(300 / 3600)
    half = measurement(**values, tokens=before.tokens // 2)  # it was asked half as much
    assert stage(smollm2([half]), "scores").hours == pytest.approx(600 / 3600)


def test_a_run_puts_down_what_its_stages_took(tmp_path, monkeypatch):
    monkeypatch.setenv("R1DISTILL_HOME", str(tmp_path))
    run = Run.load("smollm2-135m", hardware="laptop")
    record(run, "packs", {}, 5.0, 1.0)  # not predicted
    record(run, "traces", {"completion_tokens": 0}, 0.1, 0.0)  # all of it was in the ledger
    record(run, "scores", {"found": 100}, 4.0, 1.0)  # so was some of that
    record(run, "variants", {}, 9.0, 1.0, resumed=True)  # the rest of them was made before
    record(run, "checkpoint", {"tokens": 4580, "tokens_per_second": 458.0}, 12.0, 3.5)
    (row,) = read(tmp_path)
    assert (row.tokens, row.tokens_per_second, row.seconds, row.gib) == (4580, 458.0, 12.0, 3.5)
    assert row.predicted_seconds == pytest.approx(4580 / row.predicted_tokens_per_second, abs=0.1)
    assert stage(of_run(run), "checkpoint").tokens_per_second == 458.0


def test_the_fullest_gpu_is_watched(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1024\necho 40960\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(calibration, "POLL_SECONDS", 0.05)
    with watching(on_gpu=True) as peak:
        time.sleep(1)
    assert peak.gib == 40


def test_memory_of_children_and_their_children_is_seen(monkeypatch):
    monkeypatch.setattr(calibration, "POLL_SECONDS", 0.05)
    grandchild = "import time; block = bytearray(200 << 20); block[::4096] = b'1' * len(block[::4096]); time.sleep(1)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with watching(on_gpu=False) as peak:
        subprocess.run([sys.executable, "-c", child], check=True)
    assert 0.2 < peak.gib < 0.4
    time.sleep(0.1)
    assert children_gib(1 << 30) == 0  # nobody's
