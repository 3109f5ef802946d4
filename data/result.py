"""What a stage did with its input rows: kept + rejected = read, always."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from r1distill.data.errors import R1DistillError


@dataclass
class Result:
    """A stage's account of itself, written into its artifact's manifest.

    ``read`` input rows went in; ``kept`` of them came through; ``rejected`` counts the others by reason. ``metrics``
    holds whatever else a reader of the report wants (JSON values). ``failed_gates`` names gates that did not hold.
    """

    read: int
    kept: int
    rejected: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    failed_gates: list[str] = field(default_factory=list)
    unit: str = "rows"

    def check(self, stage: str) -> None:
        """Raise R1DistillError unless every input row is accounted for."""
        lost = self.read - self.kept - sum(self.rejected.values())
        if lost:
            raise R1DistillError(
                f"{stage}: {self.read} {self.unit} read, but kept ({self.kept}) and rejected "
                f"({sum(self.rejected.values())}) leave {lost} unaccounted for. This is a bug: please report it."
            )
