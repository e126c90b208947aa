"""What belongs to one optimizer step of a head, and to no other step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcshard.head.centers import ClassCenters
from arcshard.head.target import PositiveLogits
from arcshard.margins.base import Context


class SoftmaxInputs(NamedTuple):
    """What a forward knows of the global batch before it visits the classes.

    Attributes:
        unit: [B, D] embeddings, divided by their norms where the margin normalizes.
        norms: [B] norms of the embeddings, None where the margin does not read them.
        target: What this rank knows of the rows' own classes.
        context: What `margin.begin` returned.
        row_weight: [B] share of each row in the loss: 1 / rows, 0 for padding rows.
        veto: Boolean scalar. Where it is True, the loss is NaN and nothing is updated.
    """

    unit: Tensor
    norms: Tensor | None
    target: PositiveLogits
    context: Context
    row_weight: Tensor
    veto: Tensor


@dataclass
class StepContext:
    """The centers of one optimizer step, and the passes over them.

    A step begins with `PartialFC.prepare` or with the first forward. It ends with `PartialFC.step`,
    or with a forward after its centers were updated in backward. A forward of a sampled head that
    is no training has a step of its own, which `PartialFC.step` does not know.

    Attributes:
        centers: The rows that take part.
        classes: [S] int64 ascending local classes that take part, None for all.
        prepared: [n] ascending labels that `prepare` was given on all ranks, or None.
        refusal: The reason why no gradient can be computed in this step, empty if one can.
        updates: Number of updates of the centers in this step.
        is_evaluation: Whether the step is that of one forward which is no training.
        passes: Passes of the fused path whose gradient waits for the update.
        kept: Numerators of the last pass, by first row.
        bad: Boolean scalar, True if the loss of a pass or its gradient is not finite; None before
            the first backward.
        margin_before: Running values of the margin before the step.
    """

    centers: ClassCenters
    classes: Tensor | None = None
    prepared: Tensor | None = None
    refusal: str = ""
    updates: int = 0
    is_evaluation: bool = False
    passes: list[Any] = field(default_factory=list)
    kept: dict[int, Any] = field(default_factory=dict)
    bad: Tensor | None = None
    margin_before: dict[str, Tensor] = field(default_factory=dict)

    def new_kept(self) -> dict[int, Any]:
        """Returns a place for the numerators of a pass; those of the pass before are lost."""
        self.kept.clear()
        self.kept = {}
        return self.kept

    @property
    def version(self) -> int:
        """A number that changes when the centers are written, by an update or by anybody."""
        return self.centers.weight._version

    def check_backward(
        self, updates: int, learning_rate: float | None = None, version: int | None = None
    ) -> None:
        """Refuses a backward that would use other centers than its forward.

        Args:
            updates: Value of `updates` at the forward.
            learning_rate: Learning rate with which this backward updates the centers, or None.
            version: Value of `version` at the forward; None where autograd looks at it.

        Raises:
            RuntimeError: The step is over, or the centers have moved, or are about to be moved by a
                part of the gradient.
        """
        if self.refusal:
            raise RuntimeError(self.refusal)
        if self.updates != updates:
            raise RuntimeError(
                "the class centers have moved between this forward and its backward: for several "
                "losses per step leave learning_rate out of forward and call head.step(...) after"
            )
        if version is not None and self.version != version:
            raise RuntimeError(
                "class centers were loaded or written between this forward and its backward"
            )
        if self.passes and learning_rate is not None:
            raise RuntimeError(
                "a gradient of this step waits for head.step(...): leave learning_rate out of "
                "every forward of the step"
            )

    def skip_if(self, bad: Tensor) -> None:
        """Lets `PartialFC.step` update nothing if the boolean scalar `bad` is True."""
        self.bad = bad if self.bad is None else self.bad | bad

    def guard(self, loss: Tensor) -> None:
        """Does for the backward of the reference path what the fused path does in its own."""
        constant, updates = loss.detach(), self.updates

        def check(upstream: Tensor) -> None:
            self.check_backward(updates)
            self.skip_if(~(torch.isfinite(constant) & torch.isfinite(upstream)))

        loss.register_hook(check)

    def finish(self) -> None:
        """Completes an update of all rows."""
        self.centers.flush()
        self.kept.clear()
        self.updates += 1
