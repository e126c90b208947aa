"""Learning rate as a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("polynomial", "cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from zero, then a decrease to zero (or a constant).

    Args:
        peak: Learning rate at the end of the warm-up.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Optimizer steps of the warm-up; 0 starts at the peak.
        kind: "polynomial" (power 2, as published), "cosine" or "constant".

    Raises:
        ValueError: `kind` or `warmup_steps` is outside its domain.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    kind: str = "polynomial"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: allowed are {', '.join(KINDS)}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}: in [0, {self.total_steps}]")

    def __call__(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        span = max(1, self.total_steps - self.warmup_steps)
        left = 1.0 - min(1.0, (step - self.warmup_steps) / span)
        if self.kind == "polynomial":
            return self.peak * left**2
        return self.peak * 0.5 * (1.0 - math.cos(math.pi * left))
