"""Margin softmax over sharded class centers: forward and backward, a block of classes at a time.

Forward keeps, per row, the log-sum-exp over the classes that are not its own and the logit of its
own. With d = lse - z_target the loss of a row is log(1 + exp(d)), which is exact however small it
is. With sigma = 1 / (1 + exp(-d)) and numerators N = exp(z - m)

    dloss/dz_j = sigma exp(m - lse) N_j  (others),     dloss/dz_target = -sigma

so that the target's place among the numerators, empty in forward, gets -exp(lse - m) dphi/dcos
before backward, and one factor per row makes N the gradient of all similarities.

Backward visits the blocks again. A block adds to dE, and its dw goes to the row optimizer at once.
Where the step can still be skipped or is not complete, backward adds to dE only, and `update`
visits the blocks once more. Numerators of the first blocks are kept from the forward pass, as far
as the workspace allows (3 matmuls); those of the others are computed again (4 matmuls, 5 when the
update is deferred).

Beyond the centers and their state this holds one workspace, O(B D), and O(B) per block.

    B rows of the global batch, D width, n rows of a block (K per class)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from arcshard.collectives import combine_softmax
from arcshard.head.block import (
    LEVEL,
    add_at_target,
    add_matmul,
    as_operand,
    exponentials,
    logits_are_small,
    matmul,
    normalization_backward,
    norms_of,
    small_exponentials,
    without_autocast,
)
from arcshard.head.centers import ClassCenters
from arcshard.head.step import Block, SoftmaxContext, StepContext
from arcshard.head.target import PositiveLogits
from arcshard.head.workspace import BlockCost, Plan, Scratch, Workspace, plan_blocks
from arcshard.margins.base import Context, Margin


class FusedMarginSoftmax:
    """The fused path of a head: its settings and its workspace.

    Args:
        margin: The loss.
        group: Process group of the ranks that share the classes, None for one rank.
        workspace: Budget.
        device: Device of the computation.
        dtype: Working precision.
        centers_per_class: K.
        half: Dtype of the large matmuls' operands (torch.bfloat16), None for full precision.

    Attributes:
        operand_dtype: Dtype of the large matmuls' operands.
    """

    def __init__(
        self,
        margin: Margin,
        group: dist.ProcessGroup | None,
        workspace: Workspace,
        device: torch.device,
        dtype: torch.dtype,
        *,
        centers_per_class: int = 1,
        half: torch.dtype | None = None,
    ) -> None:
        self.margin, self.group, self.workspace = margin, group, workspace
        self.device, self.dtype, self.centers_per_class = device, dtype, centers_per_class
        self.operand_dtype = half if half is not None and dtype == torch.float32 else dtype
        self.scratch = Scratch(device)
        self._is_half = self.operand_dtype != dtype
        self._divides = margin.normalize and not self._is_half  # numerators by |w|
        self._is_small = logits_are_small(margin) and centers_per_class == 1
        self._level = LEVEL if self._divides else 0.0
        self._keeper: SoftmaxContext | None = None  # the pass whose numerators the scratch holds

    def plan(self, centers: ClassCenters, batch: int, width: int) -> Plan:
        """Plans the blocks of a step's rows.

        Args:
            centers: Centers of the step.
            batch: B, the rows of the global batch.
            width: D.

        Raises:
            WorkspaceTooSmallError: Not one class fits the budget.
        """
        cost = self.cost(centers, batch, width)
        return plan_blocks(centers.num_rows, cost, self.workspace, self.centers_per_class)

    def cost(self, centers: ClassCenters, batch: int, width: int) -> BlockCost:
        """Computes what a row of a step takes in the workspace.

        Args:
            centers: Centers of the step.
            batch: B, the rows of the global batch.
            width: D.
        """
        item, operand = self.dtype.itemsize, self.operand_dtype.itemsize * self._is_half
        copies_operands = item if self._is_half and self.device.type == "cpu" else 0
        of_batch = item + operand + copies_operands  # logits, numerators
        of_batch += 3 * item if self.margin.touches_others else 0  # values, slope, mask
        of_batch += 3 * item if self.centers_per_class > 1 else 0  # best values and their places
        # The gradient before and after the normalization, the operand, and the copies that reading
        # and updating the centers makes.
        of_width = item * (2 + centers.reads_copies + centers.rule_matrices)
        of_width += operand + copies_operands
        return BlockCost(
            work=batch * of_batch + width * of_width + 4 * item,
            kept=batch * self.operand_dtype.itemsize + item,
            copied=width * item if centers.reads_copies else 0,
        )

    def __call__(
        self,
        step: StepContext,
        weight: Tensor,
        unit: Tensor,
        norms: Tensor | None,
        target: PositiveLogits,
        context: Context,
        row_weight: Tensor,
        learning_rate: float | None,
        veto: Tensor,
    ) -> Tensor:
        """Computes the mean loss over the global batch, differentiable in embeddings and norms.

        Args:
            step: The optimizer step.
            weight: The class centers. They make the loss differentiable where no embedding is (a
                frozen backbone), and get no gradient here.
            unit: [B, D] embeddings of the global batch, divided by their norms where the margin
                normalizes.
            norms: [B] norms of the embeddings, or None.
            target: What this rank knows of the rows' own classes.
            context: What `margin.begin` returned for this batch.
            row_weight: [B] share of each row in the loss: 1 / rows, 0 for padding rows.
            learning_rate: With it backward updates the centers; with None `update` does.
            veto: Boolean scalar. Where it is True, the loss is NaN and nothing is updated.

        Returns:
            Scalar, the same on every rank.
        """
        plan = self.plan(step.centers, *unit.shape)
        if step.refusal or not torch.is_grad_enabled():
            plan = replace(plan, kept_rows=0, copied_rows=0)  # there is no backward
        constants = (unit.detach(), None if norms is None else norms.detach())
        one = SoftmaxContext(step, *constants, target, context, row_weight, learning_rate, plan)
        loss: Tensor = _MarginSoftmax.apply(unit, norms, weight, self, one, veto)
        return loss

    def forward(self, one: SoftmaxContext, veto: Tensor) -> Tensor:
        """Computes the mean loss over the global batch.

        Args:
            one: The pass.
            veto: Boolean scalar. Where it is True, the loss is NaN and nothing is updated.

        Returns:
            Scalar, the same on every rank.
        """
        margin, target, blocks = self.margin, one.target, one.plan.blocks()
        scale = 1.0 if margin.touches_others else margin.scale
        one.operand = (scale * one.unit).to(self.operand_dtype)  # [B, D]
        # One slot per block, and one that stands for no class at all.
        row_sum = one.unit.new_zeros(len(blocks) + 1, len(one.unit))
        row_max = torch.full_like(row_sum, self._level)
        row_max[-1] = -math.inf
        self._take_scratch(one)
        for number, (start, stop) in enumerate(blocks):
            rows = self._read(one.step, one.plan, start, stop)  # [n, D]
            block = self._numerators(one, start, stop, rows, row_sum[number], one.kept)
            if block.row_max is not None:
                row_max[number] = block.row_max
        peak = row_max.amax(dim=0)
        shift = peak.masked_fill(peak == -math.inf, 0.0)  # not -inf - -inf
        total = (row_sum * torch.exp(row_max - shift)).sum(dim=0)

        phi, one.slope = margin.target(target.similarity, one.context)
        z_target = torch.where(target.here, margin.scale * phi, 0.0)
        lse, z_target = combine_softmax(peak, total, z_target, self.group)
        excess = lse - z_target  # [B]
        row_loss = torch.logaddexp(torch.zeros_like(excess), excess)
        if one.norms is not None and (penalty := margin.penalty(one.norms)) is not None:
            row_loss = row_loss + penalty[0]
        is_real = one.row_weight > 0
        loss = torch.where(is_real, row_loss * one.row_weight, 0.0).sum()
        one.loss = torch.where(veto, torch.nan, loss)
        one.lse = lse.masked_fill(lse == -math.inf, 0.0)  # -inf: there is no other class at all
        one.per_logit = torch.where(is_real, one.row_weight * torch.sigmoid(excess), 0.0)
        return one.loss

    def backward(
        self, one: SoftmaxContext, upstream: Tensor, wants_embeddings: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Computes this rank's gradients; with a learning rate, also updates the centers.

        Args:
            one: The pass.
            upstream: Scalar gradient of the loss.
            wants_embeddings: Whether dE is needed.

        Returns:
            (dE [B, D] or None, dnorm [B] or None).

        Raises:
            RuntimeError: It is the second backward of this pass, its step is over, or the centers
                were updated after its forward.
        """
        if one.upstream is not None:
            raise RuntimeError(
                "a second backward of the same loss: the head adds up and moves its class "
                "centers in backward; call forward again"
            )
        one.step.check_backward(one.updates, one.learning_rate)
        one.step.add_bad(one.loss)
        self._set_upstream(one, upstream)
        gradient = torch.zeros_like(one.unit) if wants_embeddings else None
        if one.learning_rate is None:
            one.step.passes.append(one)
        bad = ~(torch.isfinite(one.loss) & torch.isfinite(upstream))
        self._visit([one], gradient, one.learning_rate, bad)
        if gradient is not None:
            gradient.mul_(one.factor[:, None])
        return gradient, self._norm_gradient(one)

    def update(
        self,
        step: StepContext,
        learning_rate: float,
        bad: Tensor | None,
        gradient_scale: Tensor | None,
    ) -> None:
        """Updates the centers by the gradient of all passes that wait for it.

        Args:
            step: The step, with at least one such pass.
            learning_rate: Learning rate of this step.
            bad: Boolean scalar or None. Where it is True, nothing is updated.
            gradient_scale: Factor by which the loss was multiplied; the gradient is divided by it.
        """
        for one in step.passes:
            if gradient_scale is not None and one.upstream is not None:
                self._set_upstream(one, one.upstream / gradient_scale)
        self._visit(step.passes, None, learning_rate, bad)

    def _visit(
        self,
        passes: list[SoftmaxContext],
        gradient: Tensor | None,
        learning_rate: float | None,
        bad: Tensor | None,
    ) -> None:
        """Adds to the similarities' dE [B, D], or updates the centers, or both."""
        if gradient is None and learning_rate is None:
            return
        step = passes[0].step
        plan = max(passes, key=lambda one: len(one.unit)).plan
        for start, stop in plan.blocks():
            rows = self._read(step, plan, start, stop)  # [n, D]
            dw = db = norm = None
            for one in passes:
                block = self._block(one, plan, start, stop, rows)
                norm = block.norm
                if gradient is not None:  # [B, n] x [n, D]
                    operand = block.operand
                    if operand is None:
                        operand = as_operand(rows, block.norm, self.operand_dtype)
                    add_matmul(gradient, block.numerators, operand)
                if learning_rate is not None:  # [n, B] x [B, D]
                    if dw is None:
                        dw = self._product("gradient", block.numerators.t(), one.factored)
                    else:
                        add_matmul(dw, block.numerators.t(), one.factored)
                    if self.margin.bias:
                        part = self._bias_gradient(one, block)
                        db = part if db is None else db + part
            if dw is not None and learning_rate is not None:
                if norm is not None:
                    dw = normalization_backward(dw, rows, norm, self._divides)
                step.centers.update(start, stop, rows, dw, db, learning_rate, bad)
        if learning_rate is not None:
            step.finish()
            self._take_scratch(None)

    def _numerators(
        self,
        one: SoftmaxContext,
        start: int,
        stop: int,
        rows: Tensor,
        row_sum: Tensor | None = None,
        kept: dict[int, Block] | None = None,
    ) -> Block:
        """Computes a block; a block that the plan keeps is entered into `kept`."""
        k, (batch, n) = self.centers_per_class, (len(one.unit), stop - start)
        store = None
        if kept is not None and stop <= one.plan.kept_rows:
            store = self.scratch.get("numerators", one.plan.kept_rows, batch, self.operand_dtype)
            store = store[start:stop].view(batch, n)
        norm = norms_of(rows) if self.margin.normalize else None
        operand = as_operand(rows, norm, self.operand_dtype)
        z = self._product("logits", one.operand, operand.t(), None if self._is_half else store)
        numerators = z
        if self._is_half:
            numerators = torch.empty_like(z, dtype=self.operand_dtype) if store is None else store
        row_sum = torch.empty_like(one.minus_inf) if row_sum is None else row_sum
        at = (one.target.column - start // k, one.minus_inf, norm if self._divides else None)
        row_max = None
        if self._is_small:
            small_exponentials(z, *at, row_sum, numerators)
        else:
            bias = one.step.centers.read_bias(start, stop)
            row_max = exponentials(z, *at, row_sum, self.margin, one.context, bias, k)
            numerators = numerators.copy_(z) if self._is_half else z
        block = Block(numerators, norm, row_max, operand)
        if kept is not None and store is not None:
            block.operand = None
            kept[start] = block
        return block

    def _read(self, step: StepContext, plan: Plan, start: int, stop: int) -> Tensor:
        """Returns centers start .. stop - 1, [n, D]; copies that the plan keeps are made once."""
        if stop > plan.copied_rows:
            return step.centers.read(start, stop)
        if (start, stop) not in step.copies:
            width = step.centers.weight.shape[1]
            flat = self.scratch.get("centers", plan.copied_rows, width, self.dtype)
            step.copies[start, stop] = step.centers.read(start, stop, flat[start:stop])
        return step.copies[start, stop]

    def _product(self, name: str, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiplies into `out`, or into scratch of this name where a product can be given one."""
        if out is None and (not self._is_half or self.device.type == "cpu"):
            out = self.scratch.get(name, len(left), right.shape[1], self.dtype)
        return matmul(left, right, out)

    def _set_upstream(self, one: SoftmaxContext, upstream: Tensor) -> None:
        """Computes what the gradient of the loss makes of each row of the batch."""
        one.upstream = upstream
        share = torch.exp(self._level - one.lse) if self._is_small else torch.ones_like(one.lse)
        one.factor = upstream * self.margin.scale * one.per_logit * share  # [B]
        one.factored = (one.factor[:, None] * one.unit).to(self.operand_dtype)  # [B, D]
        at_target = -one.slope / share
        if self._divides:
            at_target = at_target / one.target.norm
        one.at_target = at_target.to(self.operand_dtype)

    def _block(self, one: SoftmaxContext, plan: Plan, start: int, stop: int, rows: Tensor) -> Block:
        """Returns numerators that, times the factor of each row, are the similarities' gradient."""
        block = one.kept.get(start) if one.plan == plan else None
        if block is None:
            block = self._numerators(one, start, stop, rows)
        if not block.has_target:
            if block.row_max is not None:
                block.numerators.mul_(torch.exp(block.row_max - one.lse)[:, None])
            add_at_target(block.numerators, one.target.row - start, one.at_target)
            block.has_target = True
        return block

    def _bias_gradient(self, one: SoftmaxContext, block: Block) -> Tensor:
        """Returns [n] the gradient of the block's biases."""
        gradient = block.numerators.t().to(one.factor.dtype) @ one.factor
        return gradient * block.norm if self._divides and block.norm is not None else gradient

    def _norm_gradient(self, one: SoftmaxContext) -> Tensor | None:
        """Computes [B] the gradient of the norms.

        Only the rank that has the target returns it, so that the sum over ranks counts no row
        twice.
        """
        if one.norms is None:
            return None
        assert one.upstream is not None
        gradient = torch.zeros_like(one.norms)
        slope = self.margin.norm_slope(one.target.similarity, one.context)
        if slope is not None:
            gradient -= self.margin.scale * one.per_logit * slope
        penalty = self.margin.penalty(one.norms)
        if penalty is not None:
            gradient += one.row_weight * penalty[1]
        return one.upstream * torch.where(one.target.here, gradient, 0.0)

    def _take_scratch(self, one: SoftmaxContext | None) -> None:
        """Makes room for a pass's numerators; another pass computes its own again."""
        if one is None or one.plan.kept_rows:
            if self._keeper is not None:
                self._keeper.kept.clear()
            self._keeper = one


class _MarginSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        norms: Tensor | None,
        weight: Tensor,
        fused: FusedMarginSoftmax,
        one: SoftmaxContext,
        veto: Tensor,
    ) -> Tensor:
        ctx.fused, ctx.one = fused, one
        return fused.forward(one, veto)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(gradients[0].device):
            found = ctx.fused.backward(ctx.one, gradients[0], ctx.needs_input_grad[0])
        return *found, None, None, None, None
