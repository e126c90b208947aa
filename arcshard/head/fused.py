"""Margin softmax over sharded class centers: forward and backward, a block of classes at a time.

Forward keeps, per row, the log-sum-exp over the classes that are not its own and the logit of its
own. With d = lse - z_target the loss of a row is log(1 + exp(d)), which is exact however small it
is. With sigma = 1 / (1 + exp(-d)) and numerators N = exp(z - level)

    dloss/dz_j = sigma exp(level - lse) N_j  (others),     dloss/dz_target = -sigma

so the target's place among the numerators, empty in forward, gets -exp(lse - level) dphi/dcos in
backward; then N times one factor per row is the gradient of all similarities.

Backward visits the blocks again. A block adds to dE, and its dw goes to the row optimizer at once.
Where the step can still be skipped or is not complete, backward adds to dE only, and
`update_centers` visits the blocks once more. Numerators of the first blocks are kept from the
forward pass, as far as the workspace allows (3 matmuls); those of the others are computed again (4
matmuls, 5 when the update is deferred).

    B rows of the global batch, D width, n rows of a block (K per class)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from arcshard.collectives import combine_softmax, merge_exponentials
from arcshard.head import kernels
from arcshard.head.block import (
    add_at_target,
    add_matmul,
    as_operand,
    exponentials,
    exponentials_of_small_logits,
    is_finite,
    matmul,
    normalization_backward,
    norms_of,
    without_autocast,
)
from arcshard.head.centers import ClassCenters
from arcshard.head.step import SoftmaxInputs, StepContext
from arcshard.head.workspace import FusedSettings, Plan


class BlockCenters:
    """The class centers of one block, in the forms that products and the update need.

    Each is made when it is first read. `release` drops what no plan counts as kept.

    Args:
        settings: The fused path's settings.
        centers: Centers of the step.
        start: First row.
        stop: Row after the last one.
    """

    def __init__(
        self, settings: FusedSettings, centers: ClassCenters, start: int, stop: int
    ) -> None:
        self.settings, self.centers, self.start, self.stop = settings, centers, start, stop

    @cached_property
    def rows(self) -> Tensor:
        """[n, D] in working precision."""
        return self.centers.read(self.start, self.stop)

    @cached_property
    def norm(self) -> Tensor | None:
        """[n] |w|, None where the margin does not normalize."""
        if self.settings.has_normalize_kernel:
            return self._normalized[1]
        return norms_of(self.rows) if self.settings.margin.normalize else None

    @property
    def operand(self) -> Tensor:
        """[n, D] as an operand of products; divided by |w| unless the numerators are."""
        if self.settings.has_normalize_kernel:
            return self._normalized[0]
        return self._operand

    @cached_property
    def _operand(self) -> Tensor:
        return as_operand(self.rows, self.norm, self.settings.operand_dtype)

    @cached_property
    def _normalized(self) -> tuple[Tensor, Tensor]:
        return self.centers.normalized(self.start, self.stop, self.settings.operand_dtype)

    def release(self, keeps_copies: bool) -> None:
        """Drops the operand that is made of rows, and with `keeps_copies` False all copies."""
        made = self.__dict__
        made.pop("_operand", None)
        if not keeps_copies:
            made.pop("rows", None)
            made.pop("_normalized", None)


@dataclass
class Block:
    """Softmax numerators of a block of classes.

    Attributes:
        numerators: [B, n], divided by |w| in full precision (arcshard/head/block.py). The kernels
            write them as [n, B], of which this is a view.
        row_max: [B] what was subtracted from the logits, None where it is the level of all blocks.
        centers: The block's centers.
        has_target: Whether the targets' places are filled.
    """

    numerators: Tensor
    row_max: Tensor | None
    centers: BlockCenters
    has_target: bool = False


@dataclass
class SoftmaxContext:
    """One forward pass over the classes, as backward and the update need it.

    Attributes:
        settings: The fused path's settings.
        step: The optimizer step that the pass belongs to.
        inputs: What is known of the global batch, as constants.
        learning_rate: With it backward updates the centers; with None `update_centers` does.
        plan: Blocks of the step's rows.
        updates: Number of updates of the step before this pass.
        version: Number that changes when the centers are written.
        kept: Blocks that are kept for backward, by first row.
        operand: [B, D] embeddings as an operand of the logits' products, times s unless the margin
            touches the other classes.
        slope: [B] dphi/dcos.
        lse: [B] log-sum-exp over the classes that are not the row's own; 0 where there are none.
        per_logit: [B] sigma times the row's share in the loss.
        loss: The loss as a constant.
        upstream: Scalar gradient of the loss, None before backward.
        factor: [B] factors that make numerators the gradient of the similarities.
        factored: [B, D] embeddings times these factors, as an operand.
        at_target: [B] what goes into the targets' places.
        overflows: Boolean scalar, True if one of these numbers is not finite. Then no center of
            this rank moves.
    """

    settings: FusedSettings
    step: StepContext
    inputs: SoftmaxInputs
    learning_rate: float | None
    plan: Plan
    updates: int
    version: int
    kept: dict[int, Block]
    operand: Tensor
    slope: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    per_logit: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    upstream: Tensor | None = None
    factor: Tensor = field(init=False)
    factored: Tensor = field(init=False)
    at_target: Tensor = field(init=False)
    overflows: Tensor = field(init=False)


class FusedMarginSoftmax(torch.autograd.Function):
    """Forward and backward of one pass over the classes of this rank."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        norms: Tensor | None,
        weight: Tensor,
        settings: FusedSettings,
        step: StepContext,
        inputs: SoftmaxInputs,
        learning_rate: float | None,
        keeps: bool,
    ) -> Tensor:
        """Computes the mean loss over the global batch.

        Args:
            ctx: Holds the pass.
            unit: [B, D], that of `inputs`, which get the gradient.
            norms: [B] or None, those of `inputs`, which get the gradient.
            weight: The class centers. They make the loss differentiable where no embedding is (a
                frozen backbone), and get no gradient here. They stay if they require none.
            settings: The fused path's settings.
            step: The optimizer step.
            inputs: What is known of the global batch.
            learning_rate: With it backward updates the centers; with None `update_centers` does.
            keeps: Whether there will be a backward, for which numerators are kept.

        Returns:
            Scalar, the same on every rank.
        """
        margin, batch = settings.margin, len(unit)
        unit, norms = unit.detach(), None if norms is None else norms.detach()
        inputs = inputs._replace(unit=unit, norms=norms)
        target, context, row_weight, veto = inputs[2:]
        plan = settings.plan(step.centers, *unit.shape)
        scale = 1.0 if margin.touches_others else margin.scale
        operand = (scale * unit).to(settings.operand_dtype)  # [B, D]
        kept = step.new_kept() if keeps else {}
        ctx.one = one = SoftmaxContext(
            settings, step, inputs, learning_rate, plan, step.updates, step.version, kept, operand
        )

        blocks = plan.blocks()
        # One slot per block, and one that stands for no class at all.
        row_sum = unit.new_zeros(len(blocks) + 1, batch)
        row_max = torch.full_like(row_sum, -math.inf)
        for number, (start, stop) in enumerate(blocks):
            block = _numerators(
                one, BlockCenters(settings, step.centers, start, stop), row_sum[number]
            )
            if block.row_max is not None:
                row_max[number] = block.row_max
            if keeps and stop <= plan.kept_rows:
                block.centers.release(plan.keeps_copies)
                kept[start] = block
            del block  # or two blocks would be there while the next one is computed
        if settings.has_small_logits:
            peak, total = torch.full_like(row_sum[0], settings.level), row_sum.sum(dim=0)
        else:
            peak, (total,) = merge_exponentials(row_max, row_sum)

        phi, one.slope = margin.target(target.similarity, context)
        z_target = torch.where(target.here, margin.scale * phi, 0.0)
        lse, z_target = combine_softmax(peak, total, z_target, settings.group)
        excess = lse - z_target  # [B]
        row_loss = torch.logaddexp(torch.zeros_like(excess), excess)
        if norms is not None and (penalty := margin.penalty(norms)) is not None:
            row_loss = row_loss + penalty[0]
        loss = torch.where(row_weight > 0, row_loss * row_weight, 0.0).sum()
        loss = torch.where(veto, torch.nan, loss)
        one.loss = loss.detach()  # the output itself would hold the graph, and the graph it
        one.lse = lse.masked_fill(lse == -math.inf, 0.0)  # -inf: there is no other class at all
        one.per_logit = torch.where(row_weight > 0, row_weight * torch.sigmoid(excess), 0.0)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes this rank's gradients; with a learning rate, also updates the centers.

        Raises:
            RuntimeError: It is the second backward of this pass, its step is over, or the centers
                were updated after its forward.
        """
        one: SoftmaxContext | None = ctx.one
        if one is None:
            raise RuntimeError(
                "a second backward of the same loss: the head adds up and moves its class "
                "centers in backward; call forward again"
            )
        one.step.check_backward(one.updates, one.learning_rate, one.version)
        ctx.one = None  # frees what the pass holds, although the user may hold the loss
        wants_embeddings, _, is_trained, *_ = ctx.needs_input_grad
        learning_rate = one.learning_rate if is_trained else None
        with without_autocast(one.operand.device):
            bad = ~(is_finite(one.loss) & is_finite(gradients[0]))
            one.step.skip_if(bad)
            _set_upstream(one, gradients[0])
            gradient = torch.zeros_like(one.inputs.unit) if wants_embeddings else None
            _visit([one], gradient, learning_rate, bad)
            if is_trained and learning_rate is None and not one.step.is_evaluation:
                one.step.passes.append(one)
            if gradient is not None:
                gradient.mul_(one.factor[:, None])
            return gradient, _norm_gradient(one), *[None] * 6


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
    passes, step.passes = step.passes, []  # after an error nothing is updated twice
    for one in passes:
        if gradient_scale is not None and one.upstream is not None:
            _set_upstream(one, one.upstream / gradient_scale)
    _visit(passes, None, learning_rate, bad)


def _visit(
    passes: list[SoftmaxContext],
    gradient: Tensor | None,
    learning_rate: float | None,
    bad: Tensor | None,
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
    for one in passes:
        bad = one.overflows if bad is None else bad | one.overflows
    largest = max(passes, key=lambda one: len(one.operand))
    settings, centers, plan = largest.settings, largest.step.centers, largest.plan
    for start, stop in plan.blocks():
        kept = [one.kept.get(start) if one.plan == plan else None for one in passes]
        block_centers = next(
            (block.centers for block in kept if block is not None),
            BlockCenters(settings, centers, start, stop),
        )
        _visit_block(passes, kept, block_centers, gradient, learning_rate, bad)
        block_centers.release(plan.keeps_copies)
    if learning_rate is not None:
        largest.step.finish()


def _visit_block(
    passes: list[SoftmaxContext],
    kept: list[Block | None],
    centers: BlockCenters,
    gradient: Tensor | None,
    learning_rate: float | None,
    bad: Tensor | None,
) -> None:
    """Does for one block what `_visit` does; `kept` has each pass's numerators, or None."""
    settings = centers.settings
    dw: Tensor | None = None
    db: Tensor | None = None
    for one, block in zip(passes, kept, strict=True):
        block = block or _numerators(one, centers)
        _fill_targets(one, block)
        if gradient is not None:  # [B, n] x [n, D]
            add_matmul(gradient, block.numerators, centers.operand)
        if learning_rate is not None:  # [n, B] x [B, D]
            if dw is None:
                dw = matmul(block.numerators.t(), one.factored)
            else:
                add_matmul(dw, block.numerators.t(), one.factored)
            if settings.margin.bias:
                part = block.numerators.t().to(one.factor.dtype) @ one.factor
                if settings.divides and centers.norm is not None:
                    part = part * centers.norm
                db = part if db is None else db + part
    if dw is not None and learning_rate is not None:
        _update(centers, dw, db, learning_rate, bad)


def _update(
    block: BlockCenters, dw: Tensor, db: Tensor | None, learning_rate: float, bad: Tensor | None
) -> None:
    """Updates the centers of a block by dw [n, D] of their operands, and their biases by db [n]."""
    settings, centers, place = block.settings, block.centers, (block.start, block.stop)
    if settings.has_kernels:
        normalizes = settings.margin.normalize
        centers.update_by_kernel(*place, dw, learning_rate, bad, normalizes)
    else:
        if block.norm is not None:
            dw = normalization_backward(dw, block.rows, block.norm, settings.divides)
        centers.update(*place, block.rows, dw, learning_rate, bad)
    if db is not None:
        centers.update_bias(*place, db, learning_rate, bad)


def _numerators(one: SoftmaxContext, centers: BlockCenters, row_sum: Tensor | None = None) -> Block:
    """Computes the numerators of a block, and their sums [B] into `row_sum` in forward."""
    settings, k, start = one.settings, one.settings.centers_per_class, centers.start
    column = one.inputs.target.column
    if settings.has_logits_kernel:
        at_target = None if row_sum is not None else one.at_target
        by_class, sums = kernels.softmax_numerators(
            one.operand, centers.operand, column, start, at_target, row_sum is not None
        )
        if row_sum is not None:
            torch.sum(sums, dim=0, out=row_sum)
        return Block(by_class.t(), None, centers, has_target=row_sum is None)
    z = matmul(one.operand, centers.operand.t())  # [B, n]
    row_sum = z.new_empty(len(z)) if row_sum is None else row_sum
    column = column - start // k
    divisor = centers.norm if settings.divides else None
    if settings.has_small_logits:
        numerators = z if settings.divides else torch.empty_like(z, dtype=settings.operand_dtype)
        exponentials_of_small_logits(z, column, divisor, row_sum, numerators)
        return Block(numerators, None, centers)
    bias = centers.centers.read_bias(start, centers.stop)
    row_max = exponentials(
        z, column, divisor, row_sum, settings.margin, one.inputs.context, bias, k
    )
    return Block(z.to(settings.operand_dtype), row_max, centers)


def _set_upstream(one: SoftmaxContext, upstream: Tensor) -> None:
    """Computes what the gradient of the loss makes of each row of the batch."""
    settings, one.upstream = one.settings, upstream
    level = settings.level if settings.has_small_logits else one.lse
    share = torch.exp(level - one.lse)
    one.factor = upstream * settings.margin.scale * one.per_logit * share  # [B]
    one.factored = (one.factor[:, None] * one.inputs.unit).to(settings.operand_dtype)  # [B, D]
    target = one.inputs.target
    at_target = -one.slope / share  # [B]
    at_target = at_target / target.norm if settings.divides else at_target
    one.at_target = torch.where(target.here, at_target, 0.0).to(settings.operand_dtype)
    one.overflows = ~(is_finite(one.factored).all() & is_finite(one.at_target).all())


def _fill_targets(one: SoftmaxContext, block: Block) -> None:
    """Makes numerators, times the factor of each row, the gradient of the similarities."""
    if block.has_target:
        return
    start, target = block.centers.start, one.inputs.target
    if block.row_max is not None:  # all blocks get the level lse
        block.numerators.mul_(torch.exp(block.row_max - one.lse)[:, None])
    if one.settings.has_logits_kernel:
        kernels.fill_targets(block.numerators.t(), target.column, start, one.at_target)
    else:
        add_at_target(block.numerators, target.row - start, one.at_target)
    block.has_target = True


def _norm_gradient(one: SoftmaxContext) -> Tensor | None:
    """Computes [B] the gradient of the norms, on the rank that has the target; 0 on the others."""
    margin, (_, norms, target, context, row_weight, _) = one.settings.margin, one.inputs
    if norms is None or one.upstream is None:
        return None
    gradient = torch.zeros_like(norms)
    if (slope := margin.norm_slope(target.similarity, context)) is not None:
        gradient -= margin.scale * one.per_logit * slope
    if (penalty := margin.penalty(norms)) is not None:
        gradient += row_weight * penalty[1]
    return one.upstream * torch.where(target.here, gradient, 0.0)
