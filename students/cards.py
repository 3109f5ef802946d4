"""The model's card, computed from the artifacts: lineage, scores with intervals, variants, how to run, limits.

Its text leaves open what only the upload knows: the repositories' full names and the dataset's commit (``fill``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1distill.students.catalogue import GgufVariant, Student
from r1distill.students.usage import commands

MODEL, DATASET, AT_COMMIT = "__MODEL__", "__DATASET__", "__AT_COMMIT__"  # what is open in the text


@dataclass(frozen=True)
class Story:
    """What a card tells: manifests by stage, the scores, and which variants are published and which withheld."""

    student: Student
    lineage: dict[str, Any]
    manifests: dict[str, dict[str, Any]]
    scores: dict[str, Any]
    published: list[str]
    withheld: dict[str, str]  # variant: why
    licences: list[str]  # the licence files beside the weights


def fill(text: str, model: str, dataset: str, commit: str | None = None) -> str:
    """The card with its repositories' names and, once the dataset is uploaded, its commit."""
    at = f" at commit `{commit}`" if commit else ""
    return text.replace(MODEL, model).replace(DATASET, dataset).replace(AT_COMMIT, at)


def model_card(story: Story) -> str:
    """The card as Markdown with the Hub's metadata in front."""
    student, lineage = story.student, story.lineage
    trained, publication = story.manifests["checkpoint"]["kept"], student.publication
    return "\n".join(
        [
            f"---\n{_metadata(story)}\n---\n",
            f"# {publication.repository.split('/')[-1]}",
            "",
            *([f"**{publication.notice}**", ""] if publication.notice else []),
            f"`{lineage['base']}` fine-tuned on {trained:,} reasoning traces of `{lineage['teacher']}`,",
            f"chosen by rules: the dataset `{DATASET}`{AT_COMMIT}.",
            *_probabilities(lineage),
            *_beyond(story),
            "It thinks between `<think>` and `</think>` and then answers; the generation prompt opens the thinking.",
            "",
            *_scores(story),
            *_variants(story),
            *_running(story),
            *_training(story),
            *_lineage(story),
            *_limits(story),
            "## Licence",
            "",
            f"The weights are under `{publication.license}`, their base under `{publication.base_license}`, and the",
            f"traces' author under `{publication.teacher_license}`. The texts: {', '.join(story.licences)}.",
            "",
        ]
    )


def _probabilities(lineage: dict[str, Any]) -> list[str]:
    """What it learned from beside the text."""
    of = lineage.get("probabilities_of")
    return [f"For each of their tokens it also learned the probabilities that `{of}` gives."] if of else []


def _beyond(story: Story) -> list[str]:
    """What became of it after that, in a sentence."""
    if "beyond" not in story.manifests:
        return []
    teacher, steps = story.lineage.get("beyond_teacher"), story.manifests["beyond"]["metrics"]["steps"]
    how = f"towards the probabilities of `{teacher}`" if teacher else "with GRPO, rewarded by the traces' own checks"
    return [f"After that it learned from answers of its own, {steps:,} steps {how}."]


def _metadata(story: Story) -> str:
    """The front matter as huggingface_hub writes and reads it."""
    from huggingface_hub import ModelCardData

    publication = story.student.publication
    base: dict[str, Any] = {}
    if story.student.base.kind == "hub":
        base = {"base_model": story.lineage["base"], "base_model_relation": "finetune"}
    head = ModelCardData(
        license=publication.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["reasoning", "distillation"],
        datasets=[DATASET],
        model_name=publication.repository.split("/")[-1],
        eval_results=list(_results(story)) or None,
        **base,
    )
    return str(head.to_yaml()).strip()


def _results(story: Story) -> Iterator[Any]:
    """The student's accuracy on each benchmark in per cent, with its interval as the metric's arguments."""
    from huggingface_hub import EvalResult

    for name, bench in story.scores["benchmarks"].items():
        row = bench["models"]["student"]
        asked = bench.get("settings", {})
        yield EvalResult(
            task_type="text-generation",
            dataset_type=asked.get("repo") or name,
            dataset_name=bench["title"],
            dataset_revision=asked.get("revision"),
            metric_type="pass@1",
            metric_name=f"pass@1, mean over {row['k']} samples a question",
            metric_value=_percent(row["accuracy"]),
            metric_args={
                "interval_95": [_percent(row["low"]), _percent(row["high"])],
                "questions": row["questions"],
                "k": row["k"],
            },
        )


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _scores(story: Story) -> list[str]:
    lines = [
        "## Scores",
        "",
        "Accuracy is the mean over k samples a question, with a bootstrap 95% interval over questions. A truncated",
        "answer is wrong.",
        "",
    ]
    for name, bench in story.scores["benchmarks"].items():
        lines += [
            f"| {bench['title']} ({name}) | accuracy | 95% interval | questions × k "
            "| cons@k | truncated | looped | tokens |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {model} | {row['accuracy']:.1%} | {row['low']:.1%} – {row['high']:.1%} "
            f"| {row['questions']} × {row['k']} | {_shown(row.get('cons'), '.1%')} | {row['truncated']:.1%} "
            f"| {_shown(row.get('looped'), '.1%')} | {_shown(row['mean_tokens'], ',.0f')} |"
            for model, row in bench["models"].items()
        ]
        if figure := bench.get("published"):
            lines.append(
                f"| {figure['model']}, as published | {figure['accuracy']:.1%} | | k = {figure['k']} | | | | |"
            )
        lines.append("")
    lines += ["| gate | of | |", "|---|---|---|"]
    lines += [
        f"| {'passed' if gate['passed'] else 'failed'} | {gate['model']} | {gate['message']} |"
        for gate in story.scores["gates"]
    ]
    return [*lines, ""]


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _variants(story: Story) -> list[str]:
    if not story.student.variants:
        return []
    found: dict[str, dict[str, Any]] = story.scores.get("variants", {})
    tokens = next((one["memory_tokens"] for one in found.values()), 0)
    lines = [
        "## Variants",
        "",
        f"Memory is the files and the 16-bit cache of one sequence of {tokens:,} tokens, computed. Speed is of",
        "all answers to the benchmarks together, on the machine that was used. Recovered is the accuracy over the",
        "checkpoint's on the same questions; divergence is the mean KL divergence of the next token from the",
        "checkpoint's on held-out traces.",
        "",
        "| variant | kind | size | memory | tokens/s | accuracy | recovered | divergence, nats | where |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in story.published:
        one = found.get(name, {})
        size, memory = (f"{one[key] / 1e9:,.3f} GB" if key in one else "" for key in ("bytes", "memory_bytes"))
        lines.append(
            f"| {name} | {story.student.variants[name].kind} | {size} | {memory} "
            f"| {_shown(one.get('tokens_per_second'), ',.0f')} | {_accuracy(story, name)} "
            f"| {_shown(one.get('recovered'), '.1%')} | {_shown(one.get('kl'), '.4f')} | `variants/{name}` |"
        )
    lines += [
        f"| {name} | {story.student.variants[name].kind} | | | | | | | withheld: {why} |"
        for name, why in story.withheld.items()
    ]
    notes = [f"{name}: {found[name]['note']}." for name in story.published if found.get(name, {}).get("note")]
    return [*lines, "", *(line for note in notes for line in (note, ""))]


def _accuracy(story: Story, name: str) -> str:
    """A variant's accuracy on each benchmark."""
    rows = [bench["models"].get(name) for bench in story.scores["benchmarks"].values()]
    return ", ".join(f"{row['accuracy']:.1%}" for row in rows if row)


def _running(story: Story) -> list[str]:
    context = story.student.packs.context_tokens
    lines = [
        "## How to run it",
        "",
        "Sample with temperature 0.6 and top-p 0.95; greedy decoding makes reasoning loop. Give no system prompt. For",
        "mathematics, end the question with: Please reason step by step, and put your final answer within \\boxed{}.",
        "",
        "With vLLM:",
        "",
        *_block("sh", *commands(story.student, MODEL)),
        "With transformers:",
        "",
        *_block(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{MODEL}")',
            f'model = AutoModelForCausalLM.from_pretrained("{MODEL}", dtype="auto", device_map="auto")',
            'question = [{"role": "user", "content": "What is 17 + 25?"}]',
            "inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors='pt',",
            "                                       return_dict=True).to(model.device)",
            f"output = model.generate(**inputs, max_new_tokens={context // 2})",
            "print(tokenizer.decode(output[0, inputs['input_ids'].shape[1]:]))",
        ),
    ]
    for name in story.published:
        runtime = "llama.cpp or Ollama" if isinstance(story.student.variants[name], GgufVariant) else "vLLM"
        lines += [f"{name}, with {runtime}:", "", *_block("sh", *commands(story.student, MODEL, name))]
    return lines


def _block(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _training(story: Story) -> list[str]:
    sft, metrics = story.student.sft, story.manifests["checkpoint"]["metrics"]
    numbers = {
        "method": sft.method.kind,
        "initial learning rate": f"{sft.learning_rate:g}, cosine to {sft.min_lr_ratio:g} of it",
        "epochs": f"{sft.epochs:g}",
        "context": f"{story.student.packs.context_tokens:,} tokens, packed",
        **{key.replace("_", " "): value for key, value in metrics.items() if isinstance(value, (int, float, str))},
    }
    lines = ["## Training", "", *(f"- {key}: {value}" for key, value in numbers.items()), ""]
    if "beyond" in story.manifests and (beyond := story.student.beyond):
        asked = {key: value for key, value in beyond.identity().items() if key not in ("kind", "teacher")}
        told = {**asked, **story.manifests["beyond"]["metrics"]}
        lines += ["On its own answers:", "", *(f"- {key.replace('_', ' ')}: {told[key]}" for key in told), ""]
    return lines


def _lineage(story: Story) -> list[str]:
    """Names and commits, then each artifact by its fingerprint, in the order in which they were made."""
    lines = ["## Lineage", "", *(f"- {key.replace('_', ' ')}: `{value}`" for key, value in story.lineage.items())]
    lines += [
        f"- {stage}: `{made['fingerprint']}`, {made['read']:,} {made['unit']} read, {made['kept']:,} kept"
        for stage, made in story.manifests.items()
    ]
    lines.append(f"- dataset repository: `{DATASET}`{AT_COMMIT}")
    versions = story.manifests["checkpoint"]["versions"]
    return [*lines, "- made with " + ", ".join(f"{name} {version}" for name, version in versions.items()), ""]


def _limits(story: Story) -> list[str]:
    data = story.manifests["dataset"]
    gone = ", ".join(f"{json.dumps(reason)} {count:,}" for reason, count in sorted(data["rejected"].items()))
    return [
        "## Limits",
        "",
        "It was trained on one teacher's traces that passed the checks in the dataset's card, and scored on the",
        "benchmarks above and no others: what it says outside those domains, and in languages other than its traces',",
        f"is not measured. Nothing was done about safety beyond what base and teacher bring. Context: "
        f"{story.student.packs.context_tokens:,} tokens",
        "in training; longer conversations were not tried. Earlier turns are shown to it without their thinking.",
        *([f"Of the traces read, these did not become training rows: {gone}."] if gone else []),
        "",
    ]
