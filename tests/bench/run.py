"""Runs the benchmarks: `python tests/bench/run.py [NAME...]`, each file in a process of its own, one after the other.

A benchmark's ``measure()`` yields {what, ours, peer, unit, peer_name, goal, note}; both were measured in the same run.
What comes out is the ratio; the two figures beside it mean nothing on another machine. Exits 1 where a goal is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ONE = (
    "import json, runpy, sys; [print(json.dumps(one), flush=True) for one in runpy.run_path(sys.argv[1])['measure']()]"
)


def main(names: list[str]) -> int:
    """Run the named benchmarks (default: all), print a table and write it to $R1DISTILL_HOME/bench/results.md."""
    files = {file.stem: file for file in sorted(HERE.glob("*.py")) if file.name != Path(__file__).name}
    if unknown := set(names) - set(files):
        print(f"there is no benchmark {sorted(unknown)[0]}; there are: {', '.join(files)}", file=sys.stderr)
        return 2
    lines = ["| what | ours | peer | ratio | goal | |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    missed = False
    results = Path(os.environ.get("R1DISTILL_HOME") or "runs") / "bench" / "results.md"
    results.parent.mkdir(parents=True, exist_ok=True)
    for name in names or files:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", ONE, str(files[name])], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        for text in process.stdout:
            if not text.startswith('{"what"'):  # a training tells its progress too
                print(text, end="", file=sys.stderr)
                continue
            lines.append(_row(json.loads(text)))
            missed |= lines[-1].endswith("missed |")
            print(lines[-1], flush=True)
        if process.wait():
            lines.append(f"| {name} | | | | | failed |")
            print(lines[-1], flush=True)
            missed = True
        results.write_text("\n".join(lines) + "\n", encoding="utf-8")  # a run that is cut off keeps what it had
    return int(missed)


def _row(one: dict[str, object]) -> str:
    ours, peer, goal = (float(str(one[key])) for key in ("ours", "peer", "goal"))
    ratio = ours / peer if peer else float("inf")
    note = f" {one['note']}" if one.get("note") else ""
    verdict = "met" if ratio >= goal else "missed"
    unit = one["unit"]
    return (
        f"| {one['what']}{note} | {ours:,.3g} {unit} | {peer:,.3g} {unit} ({one['peer_name']}) | {ratio:.2f}× | {goal:g}× | "
        f"{verdict} |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
