"""The rank of each row's own class: the number of classes that score above it.

A row is among the top k where fewer than k classes score above its own. Of equal logits the one
with the smaller class number counts as higher, so that the result does not depend on the sharding.
Ranks exchange numbers of B rows only (with split features also logits, a block at a time); logits
are computed in blocks of classes and dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcshard.collectives import Group, sum_over_ranks

BLOCK_ELEMENTS = 2**21  # logits in a block: 8 MiB in fp32
NOWHERE = 2**62  # the rank of a row whose target logit is NaN: below every class


def logit_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts the classes that score above each row's own, in logits of all classes.

    Args:
        logits: [B, C] logits of all classes.
        labels: [B] int64 in [0, C).

    Returns:
        [B] int64, NOWHERE where the target's logit is NaN.
    """
    target = logits.gather(1, labels[:, None])
    return torch.where(target.isnan()[:, 0], NOWHERE, _above(logits, target, labels, 0))


@torch.no_grad()
def target_rank(
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    first_class: int,
    class_group: Group,
    feature_group: Group = None,
) -> Tensor:
    """Counts the classes that score above each row's own, for sharded logits e W^T + b.

    Args:
        embeddings: [B, D], the same rows on every rank; or this rank's features [B, D_local].
        labels: [B] int64 labels over all classes. The rank of a label outside them has no meaning.
        weight: [S, D] or [S, D_local], this rank's part, on any device.
        bias: [S], or None.
        first_class: Global number of this rank's first class.
        class_group: Ranks that hold the other classes.
        feature_group: Ranks that hold the other features, None if this rank has all of them. With a
            group every block of logits is all-reduced.

    Returns:
        [B] int64, the same on every rank of the groups; NOWHERE where the target's logit is NaN.
    """
    num_local = weight.shape[0]
    column = labels - first_class
    is_here = (column >= 0) & (column < num_local)
    target = embeddings.new_zeros(len(labels))
    if num_local:
        rows = column.clamp(0, num_local - 1)
        own = weight[rows.to(weight.device)].to(embeddings)
        target = sum_over_ranks((embeddings * own).sum(dim=1), feature_group)
        if bias is not None:
            target = target + bias[rows.to(bias.device)].to(embeddings)
        target = torch.where(is_here, target, 0.0)
    target = sum_over_ranks(target, class_group)[:, None]  # [B, 1]
    above = torch.zeros_like(labels)
    step = max(BLOCK_ELEMENTS // max(len(labels), 1), 1)
    for start in range(0, num_local, step):
        block = slice(start, min(start + step, num_local))
        logits = sum_over_ranks(embeddings @ weight[block].to(embeddings).T, feature_group)
        if bias is not None:
            logits = logits + bias[block].to(embeddings)
        above += _above(logits, target, labels, first_class + start)
    above = sum_over_ranks(above, class_group)
    return torch.where(target.isnan()[:, 0], NOWHERE, above)


def _above(logits: Tensor, target: Tensor, labels: Tensor, first_class: int) -> Tensor:
    """Counts [B] of these logits [B, S] that score above targets [B, 1]; NaN scores above."""
    classes = torch.arange(first_class, first_class + logits.shape[1], device=logits.device)
    own = labels[:, None]
    is_above = ~(logits <= target) | ((logits == target) & (classes < own))
    return (is_above & (classes != own)).sum(dim=1)
