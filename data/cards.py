"""The dataset's card, computed from the rows that went into it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from r1distill.data.selection import Removed

BUCKETS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens


@dataclass
class Facts:
    """What the card says, gathered row by row."""

    title: str
    lineage: dict[str, Any]
    rejected: Counter[str] = field(default_factory=Counter)
    prompts: dict[str, int] = field(default_factory=dict)  # what became of the prompts that were read
    splits: list[str] = field(default_factory=list)  # those that have rows
    removed: list[Removed] = field(default_factory=list)
    keep_unverified: tuple[str, ...] = ()  # domains whose traces need only fail no check
    rows: int = 0
    tokens: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    sources: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, licence)
    teachers: Counter[tuple[str, str]] = field(default_factory=Counter)  # (as reported, revision)
    samplings: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    pass_rates: Counter[float] = field(default_factory=Counter)  # by tenths

    def add(self, row: dict[str, Any], trace: dict[str, Any]) -> None:
        """Count one training row and the trace that it came from."""
        tokens = row["completion_tokens"] or 0
        self.rows += 1
        self.tokens += tokens
        self.domains[row["domain"]] += 1
        self.sources[row["source"], row["license"]] += 1
        self.teachers[trace["teacher"], trace["teacher_revision"]] += 1
        self.samplings[trace["sampling"]] += 1
        if row["pass_rate"] is not None:
            self.pass_rates[round(row["pass_rate"], 1)] += 1
        self.lengths[next((edge for edge in BUCKETS if tokens <= edge), BUCKETS[-1] + 1)] += 1

    def card(self) -> str:
        """The card as Markdown with the Hub's metadata in front."""
        licenses = sorted({license for _, license in self.sources})
        mixed = {"license": "other", "license_name": "per-row", "license_link": "README.md"}
        head = {
            **({"license": licenses[0]} if len(licenses) == 1 else mixed),
            "pretty_name": self.title,
            "task_categories": ["text-generation"],
            "size_categories": [_size_category(self.rows)],
            "tags": ["reasoning", "distillation"],
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": name, "path": f"parquet/{name}-*.parquet"} for name in self.splits],
                }
            ],
        }
        return "\n".join(
            [
                _front_matter(head),
                f"# {self.title}",
                "",
                f"{self.rows:,} reasoning traces, {self.tokens:,} completion tokens. Every trace passed every required",
                f"check{self._lenient()}; the rejected ones and their reasons are counted below.",
                "",
                *_table("Domain", self.domains.items()),
                *_table("Source, licence", ((f"{s}, {lic}", n) for (s, lic), n in self.sources.items())),
                *_table("Teacher, revision", ((f"{t}, {r}", n) for (t, r), n in self.teachers.items())),
                *_table("Sampling", ((f"`{s}`", n) for s, n in self.samplings.items())),
                *_table("Completion tokens, up to", ((edge_name(e), self.lengths[e]) for e in sorted(self.lengths))),
                *_table("Pass rate of the prompt, about", sorted(self.pass_rates.items())),
                *_table("Not kept, because", self.rejected.most_common()),
                *_table("Prompt", self.prompts.items(), unit="prompts"),
                *self._removed(),
                "## Columns",
                "",
                "`messages` holds the user's message and the assistant's, with its `thinking` (without tags) and its "
                "`content`. `prompt_id` is the hash of the normalised question, and no question is in two splits.",
                "",
                "## Lineage",
                "",
                *(f"- {key}: `{value}`" for key, value in self.lineage.items()),
                "",
            ]
        )

    def _lenient(self) -> str:
        names = [name for name in self.keep_unverified if name in self.domains]
        return f", or, in the domain {' or '.join(names)}, failed none and could not be decided by all" if names else ""

    def _removed(self) -> list[str]:
        rows = [f"| {one.check} | {one.traces:,} | {one.alone:,} |" for one in self.removed]
        return ["| Check | traces that fail it | and no other |", "|---|---|---|", *rows, ""] if rows else []


def with_fingerprints(card: str, fingerprints: Mapping[str, str]) -> str:
    """The card with the artifacts that led to its dataset."""
    lines = [f"- {stage}: `{fingerprint}`" for stage, fingerprint in fingerprints.items()]
    return "\n".join([card.rstrip("\n"), *lines, ""])


def with_rejected(card: str, counts: Mapping[str, int]) -> str:
    """The card with a second configuration, ``rejected``: the traces that became no training rows, and why."""
    _, head, body = card.split("---\n", 2)
    metadata = {key: json.loads(value) for key, _, value in (line.partition(": ") for line in head.splitlines())}
    files = [{"split": "rejected", "path": "rejected/rejected-*.parquet"}]
    metadata["configs"] = [*metadata["configs"], {"config_name": "rejected", "data_files": files}]
    lines = [
        "",
        "## The rejected traces",
        "",
        "The configuration `rejected` holds the traces that became no training rows, with `reason`, which names the",
        "first check that stands against each, its `outcome`, and `state`: whether the trace ended by itself. They are",
        "wrong, cut off, circular or superfluous; nothing was trained on them.",
        "",
        *_table("Reason", sorted(counts.items(), key=lambda pair: -pair[1])),
    ]
    return _front_matter(metadata) + body.rstrip("\n") + "\n" + "\n".join(lines)


def _front_matter(metadata: Mapping[str, Any]) -> str:
    """The Hub's metadata, a key a line: JSON is YAML, and quotes what needs quoting."""
    return "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()) + "\n---\n"


def _size_category(rows: int) -> str:
    """The Hub's word for a number of rows."""
    edges = ((1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M"), (10_000_000, "10M"))
    below = "n<1K"
    for (edge, name), (_, above) in zip(edges, [*edges[1:], (0, "100M")], strict=True):
        if rows >= edge:
            below = f"{name}<n<{above}"
    return below


def edge_name(edge: int) -> str:
    """A bucket's upper edge in words."""
    return f"{edge:,}" if edge <= BUCKETS[-1] else f"over {BUCKETS[-1]:,}"


def _table(heading: str, counts: Any, unit: str = "traces") -> list[str]:
    rows = [f"| {name} | {count:,} |" for name, count in counts]
    return [f"| {heading} | {unit} |", "|---|---|", *rows, ""] if rows else []
