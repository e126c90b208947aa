"""Softmax cross-entropy over classes that are sharded over the ranks.

The loss of row i with target y over all C classes is

    loss_i = a_i (lse_i - z_iy) + b (W lse_i - sum_j w_j z_ij)

where a_i weights the target and b spreads a share over all classes (label smoothing), with class
weights w_j and W = sum_j w_j. Plain cross-entropy is a = 1, b = 0. Once lse is known, each rank
computes its gradient alone: dloss_i/dz_ij = p_ij (a_i + b W) - a_i [j = y] - b w_j.

Rows are visited in blocks. Beyond the logits themselves, which are kept and never overwritten,
forward holds one block; backward holds the gradient that it returns and one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcshard.collectives import Group, combine_softmax, sum_over_ranks

# 8 MiB in fp32: large enough to hide the cost of a call, and far below B x C / n.
BLOCK_ELEMENTS = 2**21


class Spread(NamedTuple):
    """The share of the loss that is spread over all classes.

    Label smoothing e over C classes is b = e / C.

    Attributes:
        share: b.
        weight: [S] weights w_j of this rank's classes, None for ones.
        total: W, the sum of w_j over the classes of all ranks.
    """

    share: float
    weight: Tensor | None
    total: float


def sharded_cross_entropy(
    logits: Tensor,
    target_column: Tensor,
    group: Group,
    target_factor: Tensor | None = None,
    spread: Spread | None = None,
) -> Tensor:
    """Computes the cross-entropy of each row over the columns of all ranks.

    Every rank of the group has the same rows and its own columns. The cost is one all-gather of 3 B
    numbers per rank, and with `spread` one all-reduce of B more.

    Args:
        logits: [B, S] this rank's logits, -inf for classes that do not count; S may be 0.
        target_column: [B] int64 column of the target, -1 where another rank has it.
        group: Process group of the ranks that share the classes, None for one rank.
        target_factor: [B] a, the same on every rank; None for ones.
        spread: Label smoothing, None for none.

    Returns:
        [B] in fp32 at least, the same on every rank. Its gradient with respect to `logits`, in
        their dtype, needs no further collective.
    """
    return _ShardedCrossEntropy.apply(logits, target_column, group, target_factor, spread)


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows = max(BLOCK_ELEMENTS // logits.shape[1], 1)
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target_column: Tensor,
        group: Group,
        target_factor: Tensor | None,
        spread: Spread | None,
    ) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        batch, width = logits.shape
        row_max = torch.full((batch,), -math.inf, dtype=dtype, device=logits.device)
        row_sum, target = torch.zeros_like(row_max), torch.zeros_like(row_max)
        if width:
            row_max = logits.amax(dim=1).to(dtype)
            shift = row_max.masked_fill(row_max == -math.inf, 0.0)
            for rows in _row_blocks(logits):
                row_sum[rows] = torch.sub(logits[rows], shift[rows, None]).exp_().sum(dim=1)
            target = logits.gather(1, target_column.clamp_min(0)[:, None]).squeeze(1).to(dtype)
            target = torch.where(target_column >= 0, target, 0.0)
        log_sum_exp, target = combine_softmax(row_max, row_sum, target, group)
        if target_factor is None:
            target_factor = torch.ones_like(log_sum_exp)
        loss = target_factor * (log_sum_exp - target)
        if spread is not None:
            parts = torch.zeros_like(row_max)  # sum_j w_j z_ij over this rank's classes
            for rows in _row_blocks(logits) if width else ():
                block = logits[rows].to(dtype)
                parts[rows] = block.sum(1) if spread.weight is None else block @ spread.weight
            everywhere = sum_over_ranks(parts, group)
            loss = loss + spread.share * (spread.total * log_sum_exp - everywhere)
        ctx.save_for_backward(logits, target_column, log_sum_exp, target_factor)
        ctx.spread = spread
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, target_column, log_sum_exp, target_factor = ctx.saved_tensors
        upstream, spread = gradients[0], ctx.spread
        on_softmax, on_target = upstream * target_factor, upstream * target_factor
        if spread is not None:
            on_softmax = on_softmax + upstream * (spread.share * spread.total)
        result = torch.empty_like(logits)
        for rows in _row_blocks(logits) if logits.shape[1] else ():
            block = torch.sub(logits[rows], log_sum_exp[rows, None]).exp_()
            block.mul_(on_softmax[rows, None])
            if spread is not None:
                w = block.new_ones(()) if spread.weight is None else spread.weight
                block.sub_((upstream[rows, None] * spread.share) * w)
            column = target_column[rows, None]
            at_target = torch.where(column >= 0, on_target[rows, None], 0.0)
            block.scatter_add_(1, column.clamp_min(0), -at_target)
            result[rows] = block
        return result, None, None, None, None
