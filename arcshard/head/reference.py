"""The reference path, against which fused.py is tested: a matrix of logits, and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from arcshard.collectives import Group
from arcshard.head.cross_entropy import sharded_cross_entropy
from arcshard.head.step import SoftmaxInputs
from arcshard.margins.base import Margin


def reference_loss(
    margin: Margin,
    inputs: SoftmaxInputs,
    weight: Tensor,
    bias: Tensor | None,
    centers_per_class: int,
    group: Group,
    half: torch.dtype | None = None,
) -> Tensor:
    """Computes the mean loss over the global batch; weight and bias get gradients from autograd.

    Args:
        margin: The loss.
        inputs: What is known of the global batch.
        weight: [S K, D] centers of this rank that take part.
        bias: [S K], or None.
        centers_per_class: K.
        group: Process group of the ranks that share the classes, None for one rank.
        half: Dtype of the product's operands and result, as in autocast; None for fp32.

    Returns:
        Scalar, the same on every rank.
    """
    unit, norms, target, context, row_weight, veto = inputs
    column = target.column  # [B] place of the class among `weight`'s, -1 on other ranks
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
        # Backward sums over ranks: only the rank that has a row's class adds the penalty's slope.
        slope = torch.where(column >= 0, slope, 0.0)
        losses = losses + value + slope * (norms - norms.detach())
    loss = torch.where(row_weight > 0, losses * row_weight, 0.0).sum()
    return loss + torch.where(veto, torch.nan, 0.0)
