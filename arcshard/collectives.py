"""Collectives of the head: an all-gather, a small all-gather and a reduce-scatter per step.

Each is an autograd function or a plain function of a process group. With no group (one rank) it is
the identity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def gather_rows(
    local_embeddings: Tensor, local_labels: Tensor, pad_label: int, capacity: int, group: Group
) -> tuple[Tensor, Tensor]:
    """Gathers the rows of every rank in rank order, each rank padded to `capacity` rows.

    One all-gather of bytes transports embeddings and labels together. In backward one
    reduce-scatter (sum over ranks) returns the gradient of the global embeddings. Every rank takes
    part in it, also one whose own embeddings require no gradient.

    Args:
        local_embeddings: [b, D], b <= capacity.
        local_labels: [b] int64.
        pad_label: Label of padding rows, whose embeddings are zero.
        capacity: Rows per rank, the same on all ranks.
        group: Process group, None for one rank.

    Returns:
        (embeddings [world x capacity, D], labels [world x capacity]).
    """
    missing = capacity - local_embeddings.shape[0]
    if missing:
        local_embeddings = torch.nn.functional.pad(local_embeddings, (0, 0, 0, missing))
        local_labels = torch.nn.functional.pad(local_labels, (0, missing), value=pad_label)
    if group is None:
        return local_embeddings, local_labels
    # Makes the result differentiable on a rank whose embeddings are not: the others would wait.
    anchor = torch.empty(0, requires_grad=True)
    embeddings, labels = _GatherRows.apply(local_embeddings, local_labels, group, anchor)
    return embeddings, labels


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local_embeddings: Tensor,
        local_labels: Tensor,
        group: dist.ProcessGroup,
        anchor: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.group = group
        world_size = dist.get_world_size(group)
        rows, width = local_embeddings.shape
        split = width * local_embeddings.element_size()
        message = torch.cat(
            [
                local_embeddings.detach().contiguous().view(torch.uint8),
                local_labels[:, None].contiguous().view(torch.uint8),
            ],
            dim=1,
        )
        gathered = message.new_empty(world_size * rows, message.shape[1])
        all_gather_single(gathered, message, group)
        embeddings = gathered[:, :split].contiguous().view(local_embeddings.dtype)
        labels = gathered[:, split:].contiguous().view(torch.int64).squeeze(1)
        ctx.mark_non_differentiable(labels)
        return embeddings, labels

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        global_gradient = gradients[0].contiguous()
        rows = global_gradient.shape[0] // dist.get_world_size(ctx.group)
        local = global_gradient.new_empty(rows, global_gradient.shape[1])
        reduce_scatter_single(local, global_gradient, ctx.group)
        return local, None, None, None


def gather_labels(local_labels: Tensor, pad_label: int, capacity: int, group: Group) -> Tensor:
    """Gathers the labels of the global batch alone, for a sample that is drawn ahead.

    Args:
        local_labels: [b] int64, b <= capacity.
        pad_label: Label of padding rows.
        capacity: Rows per rank, the same on all ranks.
        group: Process group, None for one rank.

    Returns:
        [world x capacity] int64.
    """
    missing = capacity - local_labels.shape[0]
    if missing:
        local_labels = torch.nn.functional.pad(local_labels, (0, missing), value=pad_label)
    if group is None:
        return local_labels
    gathered = local_labels.new_empty(dist.get_world_size(group) * capacity)
    all_gather_single(gathered, local_labels.contiguous(), group)
    return gathered


def max_over_ranks(value: int, group: Group, device: torch.device) -> int:
    """Returns the largest of a whole number over the ranks; this waits for the device."""
    if group is None:
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return int(shared)


def sum_over_ranks(values: Tensor, group: Group) -> Tensor:
    """Returns the sum of a small tensor over the ranks."""
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


def merge_exponentials(maxima: Tensor, *sums: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Merges sums of exp(z - max) over parts of the classes into sums over all of them.

    Args:
        maxima: [parts, B] what was subtracted from the z of each part, -inf for a part without z.
        *sums: [parts, B] sums of exp(z - max), or of numbers times exp(z - max).

    Returns:
        (the largest maximum [B], -inf where there is no z; each sum [B] relative to it).
    """
    peak = maxima.amax(dim=0)
    factor = torch.exp(maxima - peak.masked_fill(peak == -math.inf, 0.0))  # not -inf - -inf
    return peak, [(each * factor).sum(dim=0) for each in sums]


def combine_softmax(
    row_max: Tensor, row_sum: Tensor, target: Tensor, group: Group
) -> tuple[Tensor, Tensor]:
    """Combines the log-sum-exp over the classes of all ranks, and the target logits.

    It is one all-gather of 3 B numbers per rank.

    Args:
        row_max: [B] largest logit among this rank's classes, -inf where it has none.
        row_sum: [B] sum of exp(logit - row_max) over them, 0 where it has none.
        target: [B] target logit on the rank that has the target, 0 on the other ranks.
        group: Process group, None for one rank.

    Returns:
        (log-sum-exp [B], target logit [B]).
    """
    local = torch.stack([row_max, row_sum, target])
    if group is None:
        return row_max + row_sum.log(), target
    parts = local.new_empty(dist.get_world_size(group) * 3, local.shape[1])
    all_gather_single(parts, local, group)
    maxima, sums, targets = parts.view(-1, *local.shape).unbind(1)
    peak, (total,) = merge_exponentials(maxima, sums)
    return peak + total.log(), targets.sum(dim=0)


def all_gather_single(output: torch.Tensor, local: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Concatenates every rank's `local` along the first dimension into `output`."""
    _GATHER(output, local, group=group)


def reduce_scatter_single(
    output: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup
) -> None:
    """Sums `whole` over the ranks, of which rank k receives the k-th equal part in `output`."""
    _REDUCE_SCATTER(output, whole, group=group)


# PyTorch 2.13 renamed these two; older versions have the old names only.
_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
