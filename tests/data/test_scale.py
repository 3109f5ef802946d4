"""100,000 traces of 20 kB through verdicts, selection and dataset: memory stays under 3 GB. Prints traces a second."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1distill.data import schema

TRACES = int(os.environ.get("R1DISTILL_SCALE_TRACES", "100000"))
SAMPLES = 4
LIMIT_BYTES = 3_000_000_000

RUN = """
import json, sys
from pathlib import Path
from r1distill.data import dataset, verdicts
from r1distill.data.settings import Selection, VerdictSettings
if __name__ == "__main__":
    home = Path(sys.argv[1])
    rules, where = VerdictSettings(), [home / "prompts", home / "traces"]
    judged = verdicts.build(rules, *where, home / "verdicts", home)
    kept = dataset.build(Selection(policy="shortest", per_prompt=2), rules, *where, home / "verdicts", home / "dataset",
                         title="scale", lineage={})
    for result in (judged, kept):
        result.check("scale")
    print(json.dumps([judged.read, judged.kept, kept.kept]))
"""


def thinking(draw: random.Random, sentences: list[str]) -> str:
    """About 20 kB of sentences in an order of their own."""
    return "\n\n".join(" ".join(draw.choices(sentences, k=10)) for _ in range(22))


def traces(count: int) -> Iterator[dict]:
    draw = random.Random(5)
    sentences = [
        f"Let me take {draw.randint(1, 999)} and look at how {draw.choice('abcdefgh')} behaves when it grows by "
        f"{draw.randint(2, 99)} percent in step {number}."
        for number in range(5000)
    ]
    empty = dict.fromkeys(schema.TRACE.names)
    for number in range(count):
        text = thinking(draw, sentences)
        response = f"So the answer is \\boxed{{{number // SAMPLES + (number % 3 == 0)}}}."
        yield {
            **empty, "prompt_id": f"{number // SAMPLES:016x}", "sample": number % SAMPLES, "teacher": "synthetic",
            "completion": f"{text}\n</think>\n\n{response}", "reasoning": text, "response": response,
            "request_text": '[{"role": "user", "content": "?"}]', "finish_reason": "stop", "state": "done",
            "completion_tokens": 5000 + number % 7, "sampling": "{}",
        }  # fmt: skip


def family_bytes(leader: int) -> int:
    """Proportional memory of a process and all of its descendants."""
    total, todo = 0, [leader]
    while todo:
        pid = todo.pop()
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        todo += map(int, children)
        # What is memory-mapped from files is the system's to drop: anonymous memory is what is held.
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss_Anon:")) << 10
    return total


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_traces_stay_under_three_gigabytes(tmp_path, capsys):
    prompts = (
        {
            "prompt_id": f"{number:016x}", "question": f"What is {number}?", "domain": "math", "verifier": "math",
            "reference_answer": str(number), "verifier_args": "{}", "source": "synthetic", "source_id": str(number),
            "license": "mit",
        }
        for number in range(TRACES // SAMPLES)
    )  # fmt: skip
    schema.write(tmp_path / "prompts", schema.PROMPT, prompts)
    schema.write(tmp_path / "traces", schema.TRACE, traces(TRACES))
    (tmp_path / "run.py").write_text(RUN)
    began, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, family_bytes(process.pid))
        time.sleep(0.2)
    seconds = time.monotonic() - began
    assert process.stdout
    read, right, kept = json.loads(process.stdout.read())
    assert process.returncode == 0
    with capsys.disabled():
        print(f"\n{TRACES:,} traces: {TRACES / seconds:.0f} a second, {peak / 1e9:.2f} GB at most")
    assert read == TRACES
    assert right == sum(number % 3 != 0 for number in range(TRACES))
    assert right / 3 < kept <= right
    assert peak < LIMIT_BYTES
