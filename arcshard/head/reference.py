"""The reference path, which fused.py is tested against: a matrix of logits, and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from arcshard.collectives import Group
from arcshard.head.cross_entropy import sharded_cross_entropy
from arcshard.margins.base import Context, Margin


def reference_loss(
    margin: Margin,
    unit: Tensor,
    norms: Tensor | None,
    column: Tensor,
    context: Context,
    weight: Tensor,
    bias: Tensor | None,
    centers_per_class: int,
    row_weight: Tensor,
    group: Group,
    half: torch.dtype | None = None,
) -> Tensor:
    """Mean loss over the global batch; weight and bias get gradients of their own.

    Args:
        unit: [B, D], divided by its norm where the margin normalizes; norms: [B] or None.
        column: [B] int64 place of each row's class among `weight`'s classes, -1 elsewhere.
        weight: [S K, D] centers of this rank that take part; bias: [S K] or None.
        row_weight: [B] share of each row in the loss.
        half: dtype of the product's operands and result, as autocast has it; None for fp32.
    """
    centers = normalize(weight) if margin.normalize else weight
    if half is not None and unit.dtype == torch.float32:
        similarities = linear(unit.to(half), centers.to(half)).float()  # [B, S K]
        similarities = similarities if bias is None else similarities + bias
    else:
        similarities = linear(unit, centers, bias)
    if centers_per_class > 1 and similarities.shape[1]:
        grouped = similarities.view(len(unit), -1, centers_per_class)
        similarities = grouped.max(dim=2).values
    logits = margin.logits(similarities, column, context, norms)  # [B, S]
    losses = sharded_cross_entropy(logits, column, group)  # [B]
    penalty = margin.penalty(norms) if norms is not None else None
    if penalty is not None and norms is not None:
        value, slope = penalty
        # Ranks are summed in backward: only the owner of a row lets its penalty through.
        slope = torch.where(column >= 0, slope, 0.0)
        losses = losses + value + slope * (norms - norms.detach())
    return torch.where(row_weight > 0, losses * row_weight, 0.0).sum()
