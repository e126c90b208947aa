"""Margin softmax over sharded class centers: forward and backward, a block of classes at a time.

Forward keeps, per row, the log-sum-exp over the classes that are not its own and the logit of its
own. With d = lse - z_target the loss of a row is log(1 + exp(d)), which is exact however small it
is. With sigma = 1 / (1 + exp(-d)) and numerators N = exp(z - level)

    dloss/dz_j = sigma exp(level - lse) N_j  (others),     dloss/dz_target = -sigma

so the target's place among the numerators, empty in forward, gets -exp(lse - level) dphi/dcos in
backward; then N times one factor per row is the gradient of all similarities.

Backward visits the blocks again. A block adds to dE, and its dw goes to the row optimizer at once.
Where the step can still be skipped or is not complete, backward adds to dE only, and `update`
visits the blocks once more. Numerators of the first blocks are kept from the forward pass, as far
as the workspace allows (3 matmuls); those of the others are computed again (4 matmuls, 5 when the
update is deferred).

    B rows of the global batch, D width, n rows of a block (K per class)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcshard.collectives import combine_softmax
from arcshard.head.block import (
    LEVEL,
    add_at_target,
    add_matmul,
    as_operand,
    exponentials,
    matmul,
    normalization_backward,
    norms_of,
    small_exponentials,
    without_autocast,
)
from arcshard.head.step import SoftmaxInputs, StepContext
from arcshard.head.workspace import BlockPlanner


@dataclass
class Block:
    """Softmax numerators of a block of classes.

    Attributes:
        numerators: [B, n], divided by |w| in full precision (arcshard/head/block.py).
        norm: [n] |w|, None where the margin does not normalize.
        row_max: [B] what was subtracted from the logits, None where it is the level of all blocks.
        operand: [n, D] the centers as an operand of products, None in a block that is kept.
        copy: [n, D] copied centers, None where they are read again.
        has_target: Whether the targets' places are filled.
    """

    numerators: Tensor
    norm: Tensor | None
    row_max: Tensor | None
    operand: Tensor | None
    copy: Tensor | None = None
    has_target: bool = False


class FusedMarginSoftmax(torch.autograd.Function):
    """Forward and backward of one pass over the classes of this rank."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        norms: Tensor | None,
        weight: Tensor,
        planner: BlockPlanner,
        step: StepContext,
        inputs: SoftmaxInputs,
        learning_rate: float | None,
        keeps: bool,
    ) -> Tensor:
        """Computes the mean loss over the global batch.

        Args:
            ctx: What backward and the update need of this pass.
            unit: [B, D], that of `inputs`, which get the gradient.
            norms: [B] or None, those of `inputs`, which get the gradient.
            weight: The class centers. They make the loss differentiable where no embedding is (a
                frozen backbone), and get no gradient here. They stay if they require none.
            planner: The fused path's settings.
            step: The optimizer step.
            inputs: What is known of the global batch.
            learning_rate: With it backward updates the centers; with None `update_centers` does.
            keeps: Whether there will be a backward, for which numerators are kept.

        Returns:
            Scalar, the same on every rank.
        """
        margin, (batch, width) = planner.margin, unit.shape
        target, context, row_weight, veto = inputs[2:]
        ctx.planner, ctx.step, ctx.target, ctx.context = planner, step, target, context
        ctx.unit, ctx.row_weight = unit.detach(), row_weight
        ctx.norms = None if norms is None else norms.detach()
        ctx.learning_rate, ctx.updates, ctx.upstream = learning_rate, step.updates, None
        ctx.plan = planner.plan(step.centers, batch, width)
        ctx.kept = step.new_kept() if keeps else {}
        ctx.minus_inf = unit.new_full((batch,), -math.inf)
        scale = 1.0 if margin.touches_others else margin.scale
        ctx.operand = (scale * unit).to(planner.operand_dtype)  # [B, D]

        blocks = ctx.plan.blocks()
        # One slot per block, and one that stands for no class at all.
        row_sum = unit.new_zeros(len(blocks) + 1, batch)
        row_max = torch.full_like(row_sum, LEVEL if planner.divides else 0.0)
        row_max[-1] = -math.inf
        for number, (start, stop) in enumerate(blocks):
            rows = step.centers.read(start, stop)  # [n, D]
            block = _numerators(ctx, start, stop, rows, row_sum[number])
            if block.row_max is not None:
                row_max[number] = block.row_max
            if keeps and stop <= ctx.plan.kept_rows:
                block.operand, block.copy = None, rows if ctx.plan.keeps_copies else None
                ctx.kept[start] = block
        peak = row_max.amax(dim=0)
        shift = peak.masked_fill(peak == -math.inf, 0.0)  # not -inf - -inf
        total = (row_sum * torch.exp(row_max - shift)).sum(dim=0)

        phi, ctx.slope = margin.target(target.similarity, context)
        z_target = torch.where(target.here, margin.scale * phi, 0.0)
        lse, z_target = combine_softmax(peak, total, z_target, planner.group)
        excess = lse - z_target  # [B]
        row_loss = torch.logaddexp(torch.zeros_like(excess), excess)
        if norms is not None and (penalty := margin.penalty(norms)) is not None:
            row_loss = row_loss + penalty[0]
        loss = torch.where(row_weight > 0, row_loss * row_weight, 0.0).sum()
        ctx.loss = loss = torch.where(veto, torch.nan, loss)
        ctx.lse = lse.masked_fill(lse == -math.inf, 0.0)  # -inf: there is no other class at all
        ctx.per_logit = torch.where(row_weight > 0, row_weight * torch.sigmoid(excess), 0.0)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes this rank's gradients; with a learning rate, also updates the centers.

        Raises:
            RuntimeError: It is the second backward of this pass, its step is over, or the centers
                were updated after its forward.
        """
        if ctx.upstream is not None:
            raise RuntimeError(
                "a second backward of the same loss: the head adds up and moves its class "
                "centers in backward; call forward again"
            )
        ctx.step.check_backward(ctx.updates, ctx.loss, ctx.learning_rate)
        with without_autocast(ctx.unit.device):
            _set_upstream(ctx, gradients[0])
            gradient = torch.zeros_like(ctx.unit) if ctx.needs_input_grad[0] else None
            learning_rate = ctx.learning_rate
            if not ctx.needs_input_grad[2]:  # frozen centers
                learning_rate = None
            elif learning_rate is None:
                ctx.step.passes.append(ctx)
            bad = ~(torch.isfinite(ctx.loss) & torch.isfinite(gradients[0]))
            _visit([ctx], gradient, learning_rate, bad)
            if gradient is not None:
                gradient.mul_(ctx.factor[:, None])
            return gradient, _norm_gradient(ctx), *[None] * 6


def update_centers(
    step: StepContext, learning_rate: float, bad: Tensor | None, gradient_scale: Tensor | None
) -> None:
    """Updates the centers by the gradient of all passes that wait for it.

    Args:
        step: The step, with at least one such pass.
        learning_rate: Learning rate of this step.
        bad: Boolean scalar or None. Where it is True, nothing is updated.
        gradient_scale: Factor by which the loss was multiplied; the gradient is divided by it.
    """
    for ctx in step.passes:
        if gradient_scale is not None:
            _set_upstream(ctx, ctx.upstream / gradient_scale)
    _visit(step.passes, None, learning_rate, bad)


def _visit(
    passes: list[Any], gradient: Tensor | None, learning_rate: float | None, bad: Tensor | None
) -> None:
    """Adds to `gradient` [B, D], updates the centers, or both.

    Args:
        passes: Passes of one step; one of them where `gradient` is given.
        gradient: [B, D], receives dE without the factor of each row; None if it is not wanted.
        learning_rate: Learning rate of the update, None for none.
        bad: Boolean scalar or None. Where it is True, nothing is updated.
    """
    if gradient is None and learning_rate is None:
        return
    largest = max(passes, key=lambda ctx: len(ctx.unit))
    planner, centers, plan = largest.planner, largest.step.centers, largest.plan
    for start, stop in plan.blocks():
        kept = [ctx.kept.get(start) if ctx.plan == plan else None for ctx in passes]
        copies = [block.copy for block in kept if block is not None and block.copy is not None]
        rows = copies[0] if copies else centers.read(start, stop)  # [n, D]
        dw: Tensor | None = None
        db: Tensor | None = None
        for ctx, block in zip(passes, kept, strict=True):
            block = block or _numerators(ctx, start, stop, rows)
            _fill_targets(ctx, block, start)
            norm = block.norm
            if gradient is not None:  # [B, n] x [n, D]
                operand = block.operand
                if operand is None:
                    operand = as_operand(rows, norm, planner.operand_dtype)
                add_matmul(gradient, block.numerators, operand)
            if learning_rate is not None:  # [n, B] x [B, D]
                if dw is None:
                    dw = matmul(block.numerators.t(), ctx.factored)
                else:
                    add_matmul(dw, block.numerators.t(), ctx.factored)
                if planner.margin.bias:
                    part = block.numerators.t().to(ctx.factor.dtype) @ ctx.factor
                    part = part * norm if planner.divides else part
                    db = part if db is None else db + part
        if dw is not None and learning_rate is not None:
            if norm is not None:
                dw = normalization_backward(dw, rows, norm, planner.divides)
            centers.update(start, stop, rows, dw, db, learning_rate, bad)
    if learning_rate is not None:
        largest.step.finish()


def _numerators(
    ctx: Any, start: int, stop: int, rows: Tensor, row_sum: Tensor | None = None
) -> Block:
    """Computes the numerators of centers `rows` [n, D], and their sums [B] into `row_sum`."""
    planner, k = ctx.planner, ctx.planner.centers_per_class
    norm = norms_of(rows) if planner.margin.normalize else None
    operand = as_operand(rows, norm, planner.operand_dtype)
    z = matmul(ctx.operand, operand.t())  # [B, n]
    row_sum = torch.empty_like(ctx.minus_inf) if row_sum is None else row_sum
    column = ctx.target.column - start // k
    divisor = norm if planner.divides else None
    if planner.is_small:
        numerators = z if planner.divides else torch.empty_like(z, dtype=planner.operand_dtype)
        small_exponentials(z, column, ctx.minus_inf, divisor, row_sum, numerators)
        return Block(numerators, norm, None, operand)
    bias = ctx.step.centers.read_bias(start, stop)
    row_max = exponentials(
        z, column, ctx.minus_inf, divisor, row_sum, planner.margin, ctx.context, bias, k
    )
    return Block(z.to(planner.operand_dtype), norm, row_max, operand)


def _set_upstream(ctx: Any, upstream: Tensor) -> None:
    """Computes what the gradient of the loss makes of each row of the batch."""
    planner = ctx.planner
    level = (LEVEL if planner.divides else 0.0) if planner.is_small else ctx.lse
    share = torch.exp(level - ctx.lse)
    ctx.upstream = upstream
    ctx.factor = upstream * planner.margin.scale * ctx.per_logit * share  # [B]
    ctx.factored = (ctx.factor[:, None] * ctx.unit).to(planner.operand_dtype)  # [B, D]
    at_target = -ctx.slope / share  # [B]
    at_target = at_target / ctx.target.norm if planner.divides else at_target
    ctx.at_target = at_target.to(planner.operand_dtype)


def _fill_targets(ctx: Any, block: Block, start: int) -> None:
    """Makes numerators, times the factor of each row, the gradient of the similarities."""
    if block.has_target:
        return
    if block.row_max is not None:  # all blocks get the level lse
        block.numerators.mul_(torch.exp(block.row_max - ctx.lse)[:, None])
    add_at_target(block.numerators, ctx.target.row - start, ctx.at_target)
    block.has_target = True


def _norm_gradient(ctx: Any) -> Tensor | None:
    """Computes [B] the gradient of the norms, on the rank that has the target; 0 on the others."""
    if ctx.norms is None:
        return None
    margin = ctx.planner.margin
    gradient = torch.zeros_like(ctx.norms)
    if (slope := margin.norm_slope(ctx.target.similarity, ctx.context)) is not None:
        gradient -= margin.scale * ctx.per_logit * slope
    if (penalty := margin.penalty(ctx.norms)) is not None:
        gradient += ctx.row_weight * penalty[1]
    return ctx.upstream * torch.where(ctx.target.here, gradient, 0.0)
