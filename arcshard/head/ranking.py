"""Where each row's own class stands among all classes: how many score above it, counted.

A row is among the top k where fewer than k classes do. Equal logits: the smaller class number
stands above, so that the answer does not depend on the split. Counts of B rows are all that ranks
tell each other; logits are made a block of classes at a time and dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcshard.collectives import Group, sum_over_ranks

BLOCK_ELEMENTS = 2**21  # logits at a time: 8 MiB in fp32
NOWHERE = 2**62  # the place of a row without a number: below every class


def logit_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """[B] int64: classes above the row's own, in whole logits [B, C]; labels [B] in [0, C)."""
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
    """How many of all classes score above each row's own, for split logits e W^T + b.

    Args:
        embeddings: [B, D], the same rows on every rank; or this rank's features [B, D_local].
        labels: [B] int64 of all classes; rows of labels outside them get some place.
        weight: [S, D] or [S, D_local] this rank's part, wherever it lies; bias: [S] or None.
        first_class: global number of its first class.
        class_group: ranks that hold the other classes. feature_group: that hold the other features
            (then every block of logits is all-reduced).

    Returns:
        [B] int64, the same on every rank of the groups.
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
    """[B] how many of these classes [B, S] stand above targets [B, 1]; NaN stands above."""
    classes = torch.arange(first_class, first_class + logits.shape[1], device=logits.device)
    own = labels[:, None]
    is_above = ~(logits <= target) | ((logits == target) & (classes < own))
    return (is_above & (classes != own)).sum(dim=1)
