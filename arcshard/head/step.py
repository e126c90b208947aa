"""What belongs to one optimizer step of a head, and to no other step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arcshard.head.centers import ClassCenters
from arcshard.head.target import PositiveLogits
from arcshard.head.workspace import Plan
from arcshard.margins.base import Context


@dataclass
class StepContext:
    """The centers of one optimizer step, and the passes over them.

    A step begins with `PartialFC.prepare` or with the first forward, and ends with
    `PartialFC.step`, or with a forward after its centers were updated in backward. A forward without
    a gradient, or of a sampled head in evaluation mode, has a step of its own that is never updated.

    Attributes:
        centers: The rows that take part.
        classes: [S] int64 ascending local classes that take part, None for all.
        prepared: [n] ascending labels that `prepare` was given on all ranks, or None.
        refusal: The reason why no gradient can be computed in this step, empty if one can.
        updates: Number of updates of the centers since the last `PartialFC.step`.
        passes: Passes whose gradient waits for the update.
        copies: Copies of centers in the workspace, by their first and last row.
        bad: Boolean scalar, True if the loss of a pass is not finite; None before the first
            backward.
        margin_before: Running values of the margin before the step.
    """

    centers: ClassCenters
    classes: Tensor | None = None
    prepared: Tensor | None = None
    refusal: str = ""
    updates: int = 0
    passes: list[SoftmaxContext] = field(default_factory=list)
    copies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    bad: Tensor | None = None
    margin_before: dict[str, Tensor] = field(default_factory=dict)

    def check_backward(self, updates: int, learning_rate: float | None) -> None:
        """Refuses a backward that would use other centers than its forward.

        Args:
            updates: Value of `updates` at the forward.
            learning_rate: Whether the backward is to update the centers, and how fast.

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
        if self.passes and learning_rate is not None:
            raise RuntimeError(
                "a gradient of this step waits for head.step(...): leave learning_rate out of every "
                "forward of the step"
            )

    def add_bad(self, loss: Tensor) -> None:
        """Lets the step be skipped if this loss is not finite."""
        bad = ~torch.isfinite(loss)
        self.bad = bad if self.bad is None else self.bad | bad

    def guard(self, loss: Tensor) -> None:
        """Checks the backward of a loss that autograd differentiates, as the fused path does."""
        if loss.requires_grad:
            constant, updates = loss.detach(), self.updates

            def check(_: Tensor) -> None:
                self.check_backward(updates, None)
                self.add_bad(constant)

            loss.register_hook(check)

    def finish(self) -> None:
        """Completes an update of all rows."""
        self.centers.flush()
        self.passes.clear()
        self.copies.clear()
        self.updates += 1


@dataclass
class Block:
    """Softmax numerators of a block of classes.

    Attributes:
        numerators: [B, n], divided by |w| in full precision (arcshard/head/block.py).
        norm: [n] |w|, None where the margin does not normalize.
        row_max: [B] what was subtracted from the logits, None where it is the level of all blocks.
        operand: [n, D] the centers as an operand of products, None for a block that is kept.
        has_target: Whether the targets' places are filled.
    """

    numerators: Tensor
    norm: Tensor | None
    row_max: Tensor | None
    operand: Tensor | None
    has_target: bool = False


@dataclass
class SoftmaxContext:
    """One forward pass: what it is given, and what it leaves for backward and the update.

    Attributes:
        step: The optimizer step that the pass belongs to.
        unit: [B, D] embeddings of the global batch, divided by their norms where the margin
            normalizes; constants.
        norms: [B] norms of the embeddings as constants, or None.
        target: What this rank knows of the rows' own classes.
        context: What `margin.begin` returned for this batch.
        row_weight: [B] share of each row in the loss: 1 / rows, 0 for padding rows.
        learning_rate: With it backward updates the centers; with None `update` does.
        plan: Blocks of the step's rows.
    """

    step: StepContext
    unit: Tensor
    norms: Tensor | None
    target: PositiveLogits
    context: Context
    row_weight: Tensor
    learning_rate: float | None
    plan: Plan

    def __post_init__(self) -> None:
        self.updates = self.step.updates  # to detect that the centers have moved since
        self.kept: dict[int, Block] = {}  # by first row
        self.minus_inf = self.unit.new_full((len(self.unit),), -math.inf)
        self.upstream: Tensor | None = None  # gradient of the loss, set by backward
        # FusedMarginSoftmax.forward sets: the operand of the logits' product [B, D], the
        # log-sum-exp [B] over all other classes, dphi/dcos [B], sigma times the row's weight [B], and
        # the loss. `_set_upstream` sets: the factor of each row [B], that times `unit` [B, D], and
        # what goes into the target's place [B].
        self.operand = self.lse = self.slope = self.per_logit = self.loss = self.unit
        self.factor = self.factored = self.at_target = self.unit
