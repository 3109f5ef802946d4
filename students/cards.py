"""The model's card, computed from the artifacts: lineage, scores with intervals, variants, how to run, limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from r1distill.students.catalogue import GgufVariant, Student


@dataclass(frozen=True)
class Story:
    """What a card tells: manifests by stage, the scores, and which variants are published and which withheld."""

    student: Student
    lineage: dict[str, Any]
    manifests: dict[str, dict[str, Any]]
    scores: dict[str, Any]
    published: list[str]
    withheld: dict[str, str]  # variant: why


def model_card(story: Story) -> str:
    """The card as Markdown with the Hub's metadata in front."""
    student, lineage = story.student, story.lineage
    data = story.manifests["dataset"]
    return "\n".join(
        [
            f"---\n{_metadata(story)}\n---\n",
            f"# {student.publication.repository}",
            "",
            f"`{lineage['base']}` fine-tuned on {data['kept']:,} verified reasoning traces of `{lineage['teacher']}`.",
            "It thinks between `<think>` and `</think>` and then answers; the generation prompt opens the thinking.",
            "",
            *([student.publication.notice, ""] if student.publication.notice else []),
            *_scores(story),
            *_variants(story),
            *_running(story),
            *_training(story),
            *_lineage(story),
            "## Limits",
            "",
            "It was trained on one teacher's traces that passed the checks in the dataset's card, and scored on",
            "the benchmarks above and no others. What it says outside those domains is not measured.",
            "",
        ]
    )


def _metadata(story: Story) -> str:
    publication = story.student.publication
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": name, "name": bench["title"]},
            "metrics": [{"type": "pass@1", "value": round(100 * bench["models"]["student"]["accuracy"], 2)}],
        }
        for name, bench in story.scores["benchmarks"].items()
    ]
    head: dict[str, Any] = {
        "license": publication.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["reasoning", "distillation"],
        "model-index": [{"name": publication.repository, "results": results}],
    }
    if story.student.base.kind == "hub":
        head["base_model"] = story.lineage["base"]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())  # JSON is YAML


def _scores(story: Story) -> list[str]:
    lines = ["## Scores", "", "Mean over k samples a question, with a bootstrap 95% interval over questions.", ""]
    for name, bench in story.scores["benchmarks"].items():
        lines += [
            f"| {bench['title']} ({name}) | accuracy | 95% interval | questions × k | truncated | tokens |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {model} | {row['accuracy']:.1%} | {row['low']:.1%} – {row['high']:.1%} "
            f"| {row['questions']} × {row['k']} | {row['truncated']:.1%} | {row['mean_tokens']:.0f} |"
            for model, row in bench["models"].items()
        ]
        lines.append("")
    return lines


def _variants(story: Story) -> list[str]:
    if not story.student.variants:
        return []
    sizes = {
        model: row["size_bytes"]
        for bench in story.scores["benchmarks"].values()
        for model, row in bench["models"].items()
    }
    lines = ["## Variants", "", "| variant | kind | size | where |", "|---|---|---|---|"]
    for name in story.published:
        kind = story.student.variants[name].kind
        lines.append(f"| {name} | {kind} | {(sizes.get(name) or 0) / 1e6:,.1f} MB | `variants/{name}` |")
    lines += [
        f"| {name} | {story.student.variants[name].kind} | | withheld: {why} |" for name, why in story.withheld.items()
    ]
    return [*lines, ""]


def _running(story: Story) -> list[str]:
    repository = story.student.publication.repository
    context = story.student.packs.context_tokens
    lines = [
        "## How to run it",
        "",
        "Sample with temperature 0.6; greedy decoding makes reasoning loop. Give no system prompt. For mathematics,",
        "end the question with: Please reason step by step, and put your final answer within \\boxed{}.",
        "",
        "```",
        f"vllm serve {repository} --max-model-len {context}",
    ]
    for name in story.published:
        if isinstance(story.student.variants[name], GgufVariant):
            lines.append(f"llama-server -m variants/{name}/*.gguf --jinja -c {context}")
        else:
            lines.append(f"vllm serve ./variants/{name} --max-model-len {context}")
    return [*lines, "```", ""]


def _training(story: Story) -> list[str]:
    sft, metrics = story.student.sft, story.manifests["checkpoint"]["metrics"]
    numbers = {
        "method": sft.method.kind,
        "initial learning rate": f"{sft.learning_rate:g}, cosine to {sft.min_lr_ratio:g} of it",
        "epochs": f"{sft.epochs:g}",
        "context": f"{story.student.packs.context_tokens:,} tokens, packed",
        **{key.replace("_", " "): value for key, value in metrics.items() if isinstance(value, (int, float, str))},
    }
    return ["## Training", "", *(f"- {key}: {value}" for key, value in numbers.items()), ""]


def _lineage(story: Story) -> list[str]:
    lines = ["## Lineage", "", *(f"- {key}: `{value}`" for key, value in story.lineage.items())]
    lines += [f"- {stage}: `{manifest['fingerprint']}`" for stage, manifest in story.manifests.items()]
    versions = story.manifests["checkpoint"]["versions"]
    return [*lines, "- made with " + ", ".join(f"{name} {version}" for name, version in versions.items()), ""]
