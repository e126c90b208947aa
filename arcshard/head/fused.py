"""The loop over blocks of classes: a margin softmax that never holds all logits.

Forward keeps, per row, the log-sum-exp over the classes that are not its own and the logit of its
own. With d = lse - z_target the loss of a row is log(1 + exp(d)), which is exact however small it
is, and with sigma = 1 / (1 + exp(-d))

    dloss/dz_j = sigma exp(z_j - lse)  (others),     dloss/dz_target = -sigma

so that the target needs O(B) numbers and all other classes are treated alike
(arcshard/head/block.py).

Backward visits the blocks again: it adds to dE, and passes dw of a block to the row optimizer at
once. Where the step can still be skipped or is not complete, backward adds to dE only, and `finish`
visits the blocks once more. The numerators of the first blocks are kept from the forward pass, as
far as the work buffer allows (3 matmuls); those of the others are computed again (4 matmuls, 5 when
the update is deferred).

Beyond the centers and their state this holds one work buffer, O(B D), and O(B) per kept block.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from arcshard.collectives import combine_softmax
from arcshard.head.block import (
    exponentials,
    inverse_norms,
    matmul,
    normalization_backward,
    without_autocast,
)
from arcshard.head.centers import ClassCenters
from arcshard.head.target import PositiveLogits, PositiveLogitsGradient
from arcshard.head.workspace import BlockCost, Plan, Workspace, WorkspaceBuffer, plan_blocks
from arcshard.margins.base import Context, Margin


class Block(NamedTuple):
    """Softmax numerators of a block of classes.

    Attributes:
        numerators: [B, rows] E / |w|, or E where the margin does not normalize.
        row_max: [B] row maxima.
        inverse_norm: [rows] 1 / |w|, None where the margin does not normalize.
    """

    numerators: Tensor
    row_max: Tensor
    inverse_norm: Tensor | None


class FusedMarginSoftmax:
    """The fused path: its settings, its work buffer, and the passes whose update is still to come.

    Args:
        margin: The loss.
        group: Process group of the ranks that share the classes, None for one rank.
        workspace: Budget of the work buffer.
        centers_per_class: K.
        half: Dtype of the large matmuls' operands (torch.bfloat16), None for full precision.
    """

    def __init__(
        self,
        margin: Margin,
        group: dist.ProcessGroup | None,
        workspace: Workspace,
        *,
        centers_per_class: int = 1,
        half: torch.dtype | None = None,
    ) -> None:
        self.margin, self.group, self.half = margin, group, half
        self.workspace = workspace
        self.centers_per_class = centers_per_class
        self.update_count = 0  # number of updates of the centers, to detect a stale pass
        self.has_updated_since_finish = False
        self._pending: list[SoftmaxContext] = []
        self._buffer: WorkspaceBuffer | None = None
        self._buffer_user: SoftmaxContext | None = None

    def plan(self, centers: ClassCenters, batch: int, width: int, like: Tensor) -> Plan:
        """Plans the blocks of this step's rows.

        Args:
            centers: Centers of the step.
            batch: B, the rows of the global batch.
            width: D.
            like: Any tensor of the working precision, on the device of the work.

        Raises:
            WorkspaceTooSmallError: Not one class fits the budget.
        """
        cost = self.cost(centers, batch, width, like)
        return plan_blocks(centers.num_rows, cost, self.workspace, self.centers_per_class)

    def cost(self, centers: ClassCenters, batch: int, width: int, like: Tensor) -> BlockCost:
        """Computes what a row of this step takes in the work buffer and beside it.

        Args:
            centers: Centers of the step.
            batch: B, the rows of the global batch.
            width: D.
            like: Any tensor of the working precision, on the device of the work.
        """
        half = self.matmul_dtype(like) != like.dtype
        batch_matrices = 1 + half  # z, and what it is rounded from or to
        batch_matrices += 3 if self.margin.touches_others else 0  # values, slope, mask
        batch_matrices += 3 if self.centers_per_class > 1 else 0  # best values and their places
        return BlockCost(
            batch,
            width,
            like.itemsize,
            kept_bytes=self.matmul_dtype(like).itemsize,
            batch_matrices=batch_matrices,
            # The gradient before and after the normalization, operands in half precision, and
            # the copies that reading and updating the centers makes.
            width_matrices=2 + 2 * half + centers.reads_copies + centers.rule_matrices,
            reads_copies=centers.reads_copies,
        )

    def forward(
        self,
        unit: Tensor,
        norms: Tensor | None,
        target: PositiveLogits,
        context: Context,
        centers: ClassCenters,
        row_weight: Tensor,
        learning_rate: float | None,
        veto: Tensor,
    ) -> tuple[Tensor, SoftmaxContext]:
        """Computes the mean loss over the global batch.

        Args:
            unit: [B, D] embeddings of the global batch, divided by their norms where the margin
                normalizes; constants.
            norms: [B] norms of the embeddings as constants, or None.
            target: What this rank knows of the rows' own classes.
            context: What `margin.begin` returned for this batch.
            centers: Centers of the step.
            row_weight: [B] share of each row in the loss: 1 / rows, 0 for padding rows.
            learning_rate: Learning rate with which `SoftmaxContext.backward` updates the centers;
                with None `finish` updates them.
            veto: Boolean scalar. Where it is True, the loss is NaN and nothing is updated.

        Returns:
            (scalar loss, the pass that computes its gradient).
        """
        one = SoftmaxContext(self, unit, norms, target, context, centers, row_weight, learning_rate)
        return one.forward(veto), one

    def finish(
        self, learning_rate: float, bad: Tensor | None, gradient_scale: Tensor | None
    ) -> None:
        """Updates the centers by the gradient of all passes that wait for it.

        Args:
            learning_rate: Learning rate of this step.
            bad: Boolean scalar or None. Where it is True, nothing is updated.
            gradient_scale: Factor by which the loss was multiplied; the gradient is divided by it.
        """
        passes, self._pending = self._pending, []
        if not passes:
            self.has_updated_since_finish = False
            return
        largest = max(passes, key=lambda one: len(one.unit))
        for one in passes:
            bad = one.bad if bad is None else bad | one.bad
            if gradient_scale is not None:
                assert one.upstream is not None
                one.upstream = one.upstream / gradient_scale
        if len(passes) > 1:
            for one in passes:  # the buffer is laid out for the largest pass, which overwrites it
                one.forget_kept()
        self.acquire_buffer(largest)
        update = CenterUpdate(self, passes, learning_rate, bad)
        for start, stop in largest.plan.blocks():
            rows = largest.read(start, stop)
            for one in passes:
                update.add(one, one.block(start, stop, rows), rows)
            update.apply(start, stop, rows)
        update.finish()
        self.release_buffer()
        self.has_updated_since_finish = False

    @property
    def has_pending(self) -> bool:
        """Whether the gradient of a pass waits for `finish`."""
        return bool(self._pending)

    def wait_for_update(self, one: SoftmaxContext) -> None:
        """Registers a pass by whose gradient `finish` will update the centers."""
        self._pending.append(one)

    @property
    def buffer(self) -> WorkspaceBuffer:
        """The work buffer, laid out for the pass that uses it."""
        assert self._buffer is not None
        return self._buffer

    def acquire_buffer(self, one: SoftmaxContext) -> None:
        """Lays the buffer out for a pass; the numerators that another pass kept are lost."""
        if self._buffer_user is one:
            return
        if self._buffer is None:
            self._buffer = WorkspaceBuffer(
                one.unit.device, one.unit.dtype, self.matmul_dtype(one.unit)
            )
        if self._buffer_user is not None:
            self._buffer_user.forget_kept()
        one.forget_kept()
        self._buffer.arrange(one.plan, *one.unit.shape)
        self._buffer_user = one

    def release_buffer(self) -> None:
        """Releases the pass that uses the buffer, with its centers, at the end of a step."""
        if self._buffer_user is not None:
            self._buffer_user.forget_kept()
            self._buffer_user = None

    def matmul_dtype(self, like: Tensor) -> torch.dtype:
        """Returns the dtype of the operands of the large products."""
        return self.half if self.half is not None and like.dtype == torch.float32 else like.dtype


class SoftmaxContext:
    """One forward pass over the classes, and its gradient.

    The arguments are those of `FusedMarginSoftmax.forward`.
    """

    def __init__(
        self,
        fused: FusedMarginSoftmax,
        unit: Tensor,
        norms: Tensor | None,
        target: PositiveLogits,
        context: Context,
        centers: ClassCenters,
        row_weight: Tensor,
        learning_rate: float | None,
    ) -> None:
        self.fused, self.margin, self.context = fused, fused.margin, context
        self.unit, self.norms, self.target, self.centers = unit, norms, target, centers
        self.row_weight, self.learning_rate = row_weight, learning_rate
        self.plan = fused.plan(centers, unit.shape[0], unit.shape[1], unit)
        self.kept: dict[tuple[int, int], Block] = {}
        self.copies: dict[tuple[int, int], Tensor] = {}
        self.update_count = fused.update_count
        self.upstream: Tensor | None = None  # gradient of the loss, set by backward

    def forget_kept(self) -> None:
        """Forgets the kept numerators, which are computed again: another pass needs the buffer."""
        self.kept.clear()
        self.copies.clear()

    def forward(self, veto: Tensor) -> Tensor:
        """Returns the mean loss over the global batch; a non-finite loss makes a skipped step."""
        margin, target = self.margin, self.target
        self.fused.acquire_buffer(self)
        peak, total = self._log_sum_exp_here()
        phi, slope = margin.target(target.similarity, self.context)
        z_target = torch.where(target.here, margin.scale * phi, 0.0)
        lse, z_target = combine_softmax(peak, total, z_target, self.fused.group)
        excess = lse - z_target  # [B]
        row_loss = torch.logaddexp(torch.zeros_like(excess), excess)
        if self.norms is not None and (penalty := margin.penalty(self.norms)) is not None:
            row_loss = row_loss + penalty[0]
        is_real = self.row_weight > 0
        loss = torch.where(is_real, row_loss * self.row_weight, 0.0).sum()

        loss = torch.where(veto, torch.nan, loss)
        self.bad = ~torch.isfinite(loss)
        self.lse = lse.masked_fill(lse == -math.inf, 0.0)  # -inf: there is no other class at all
        self.slope = slope
        self.per_logit = torch.where(is_real, self.row_weight * torch.sigmoid(excess), 0.0)
        return loss

    def backward(self, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes this rank's gradients; with a learning rate, also updates the centers.

        Args:
            upstream: Scalar gradient of the loss.

        Returns:
            (dE [B, D], dnorm [B] or None).

        Raises:
            RuntimeError: It is the second backward of this pass, or the centers were updated after
                its forward.
        """
        if self.upstream is not None:
            raise RuntimeError(
                "a second backward of the same loss: the head adds up and moves its class "
                "centers in backward; call forward again"
            )
        if self.update_count != self.fused.update_count:
            raise RuntimeError(
                "the class centers have moved between this forward and its backward: for several "
                "losses per step leave learning_rate out of forward and call head.step(...) after"
            )
        self.upstream = upstream
        self.fused.acquire_buffer(self)
        update = None
        if self.learning_rate is not None:
            bad = self.bad | ~torch.isfinite(upstream)
            update = CenterUpdate(self.fused, [self], self.learning_rate, bad)
        else:
            self.fused.wait_for_update(self)

        gradient = self.target_coefficient()[:, None] * self.target.unit_center  # [B, D]
        for start, stop in self.plan.blocks():
            rows = self.read(start, stop)  # [rows, D]
            block = self.block(start, stop, rows)
            part = matmul(block.numerators, rows, self._matmul_dtype)
            gradient.addcmul_(self.row_factor(block)[:, None], part)
            if update is not None:
                update.add(self, block, rows)
                update.apply(start, stop, rows)
        if update is not None:
            update.finish()
            self.fused.release_buffer()
        return gradient, self._norm_gradient()

    def read(self, start: int, stop: int) -> Tensor:
        """Returns the centers of a block, [rows, D]; copies that fit the buffer are made once."""
        if not self.centers.reads_copies:
            return self.centers.read(start, stop)
        copy = self.copies.get((start, stop))
        if copy is None:
            place = self.fused.buffer.copied_centers(start, stop)
            copy = self.centers.read(start, stop, place)
            if place is not None:
                self.copies[start, stop] = copy
        return copy

    def block(self, start: int, stop: int, rows: Tensor) -> Block:
        """Returns the numerators of rows start .. stop - 1, kept ones or computed again."""
        kept = self.kept.get((start, stop))
        return kept if kept is not None else self._visit(start, stop, rows)[0]

    def row_factor(self, block: Block) -> Tensor:
        """Returns [B] factors that turn a block's numerators into the similarities' gradient."""
        assert self.upstream is not None
        share = torch.exp(block.row_max - self.lse) * self.per_logit
        return self.upstream * self.margin.scale * torch.where(self.per_logit > 0, share, 0.0)

    def target_coefficient(self) -> Tensor:
        """Returns [B] the gradient of the target's similarity, 0 where another rank has it."""
        assert self.upstream is not None
        coefficient = self.upstream * -self.margin.scale * self.per_logit * self.slope
        return torch.where(self.target.here, coefficient, 0.0)

    def _norm_gradient(self) -> Tensor | None:
        """Computes [B] the gradient of the norms.

        Only the rank that has the target returns it, so that the sum over ranks counts no row
        twice.
        """
        if self.norms is None:
            return None
        assert self.upstream is not None
        gradient = torch.zeros_like(self.norms)
        slope = self.margin.norm_slope(self.target.similarity, self.context)
        if slope is not None:
            gradient -= self.margin.scale * self.per_logit * slope
        penalty = self.margin.penalty(self.norms)
        if penalty is not None:
            gradient += self.row_weight * penalty[1]
        return self.upstream * torch.where(self.target.here, gradient, 0.0)

    def _log_sum_exp_here(self) -> tuple[Tensor, Tensor]:
        """Returns (peak [B], sum of exp(z - peak) [B]) over this rank's classes but the target."""
        peak = self.unit.new_full((len(self.unit),), -math.inf)
        total = torch.zeros_like(peak)
        for start, stop in self.plan.blocks():
            keep = stop <= self.plan.kept_rows
            block, row_sum = self._visit(start, stop, self.read(start, stop), keep)
            if keep:
                self.kept[start, stop] = block
            higher = torch.maximum(peak, block.row_max)
            shift = higher.masked_fill(higher == -math.inf, 0.0)  # no other class so far
            total = total * torch.exp(peak - shift) + row_sum * torch.exp(block.row_max - shift)
            peak = higher
        return peak, total

    def _visit(
        self, start: int, stop: int, rows: Tensor, keep: bool = False
    ) -> tuple[Block, Tensor]:
        """Computes the numerators of a block, and their row sums [B] before the division by |w|."""
        fused, margin, k = self.fused, self.margin, self.fused.centers_per_class
        store = fused.buffer.kept_numerators(start, stop) if keep else None
        into = store if store is not None and store.dtype == self.unit.dtype else None
        scratch = fused.buffer.batch_matrix(len(self.unit), stop - start)
        z = matmul(self.unit, rows.t(), self._matmul_dtype, out=scratch if into is None else into)
        inverse_norm = inverse_norms(rows) if margin.normalize else None
        factor = 1.0 if margin.touches_others else margin.scale
        if inverse_norm is not None:
            z.mul_(inverse_norm * factor)
        elif factor != 1.0:
            z.mul_(factor)
        bias = self.centers.read_bias(start, stop)
        if bias is not None:
            z.add_(bias, alpha=factor)
        numerators, row_max, row_sum = exponentials(
            z, margin, self.context, self.target.column - start // k, k
        )
        if inverse_norm is not None:
            numerators.mul_(inverse_norm)
        if store is not None:
            numerators = store.copy_(numerators) if into is None else numerators
            if inverse_norm is not None:
                inverse_norm = fused.buffer.kept_inverse_norms(start, stop).copy_(inverse_norm)
        return Block(numerators, row_max, inverse_norm), row_sum

    @property
    def _matmul_dtype(self) -> torch.dtype:
        return self.fused.matmul_dtype(self.unit)


class FusedMarginSoftmaxFunction(torch.autograd.Function):
    """FusedMarginSoftmax as an autograd function: from unit embeddings and norms to the mean loss.

    `weight` makes the loss differentiable where no embedding requires a gradient (a frozen
    backbone). It gets no gradient here, because the head updates the centers itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        norms: Tensor | None,
        weight: Tensor,
        fused: FusedMarginSoftmax,
        arguments: tuple[Any, ...],
    ) -> Tensor:
        """Runs `FusedMarginSoftmax.forward` on constants."""
        norms = None if norms is None else norms.detach()
        loss, ctx.one = fused.forward(unit.detach(), norms, *arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Runs `SoftmaxContext.backward` without autocast."""
        with without_autocast(gradients[0].device):
            gradient, norm_gradient = ctx.one.backward(gradients[0])
        return gradient, norm_gradient, None, None, None


class CenterUpdate:
    """The update of the centers, block by block.

    `add` sums dw of a block over the passes; `apply` takes it through the normalization and passes
    it to the row optimizer.

    Args:
        fused: The fused path that owns the buffer.
        passes: Passes whose gradients are summed.
        learning_rate: Learning rate of this step.
        bad: Boolean scalar or None. Where it is True, nothing is updated.
    """

    def __init__(
        self,
        fused: FusedMarginSoftmax,
        passes: list[SoftmaxContext],
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        self.fused, self.learning_rate, self.bad = fused, learning_rate, bad
        fused.update_count += 1
        fused.has_updated_since_finish = True
        self.centers = passes[0].centers
        self.targets = {
            one: PositiveLogitsGradient(
                one.target, one.target_coefficient(), one.unit, self.centers.num_rows
            )
            for one in passes
        }
        self._gradient: Tensor | None = None
        self._bias_gradient: Tensor | None = None
        self._inverse_norm: Tensor | None = None

    def add(self, one: SoftmaxContext, block: Block, rows: Tensor) -> None:
        """Adds a pass's gradient of the block to those of the passes before it."""
        factor = one.row_factor(block)  # [B]
        scaled = factor[:, None] * one.unit  # [B, D]
        is_first = self._gradient is None
        part = matmul(
            block.numerators.t(),
            scaled,
            self.fused.matmul_dtype(one.unit),
            out=self.fused.buffer.width_matrix(len(rows)) if is_first else None,
        )  # [rows, D]
        self._gradient = part if self._gradient is None else self._gradient.add_(part)
        if self.centers.read_bias(0, 0) is not None:
            bias = block.numerators.to(factor.dtype).t() @ factor  # [rows]
            if block.inverse_norm is not None:
                bias = bias / block.inverse_norm
            self._bias_gradient = (
                bias if self._bias_gradient is None else self._bias_gradient + bias
            )
        self._inverse_norm = block.inverse_norm

    def apply(self, start: int, stop: int, rows: Tensor) -> None:
        """Adds the targets' part of the gradient and updates the rows."""
        gradient, bias_gradient = self._gradient, self._bias_gradient
        assert gradient is not None
        self._gradient = self._bias_gradient = None
        for target in self.targets.values():
            target.add_to(start, gradient, bias_gradient)
        if self._inverse_norm is not None:
            gradient = normalization_backward(gradient, rows, self._inverse_norm)
        self.centers.update(
            start, stop, rows, gradient, bias_gradient, self.learning_rate, self.bad
        )

    def finish(self) -> None:
        """Completes the step; called when all blocks are updated."""
        self.centers.flush()
