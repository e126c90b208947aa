"""Differentiable copy, reduce, gather and scatter between the ranks of a group.

They fit together by one convention: **a whole tensor has its whole gradient on every rank** (all
ranks compute the same thing from it), and a part has the gradient of its part.

    function   forward                     backward          as DTensor placements
    copy       the identity                all-reduce (sum)  Replicate; its gradient Partial
    reduce     all-reduce (sum)            the identity      Partial -> Replicate
    gather     all-gather: parts -> whole  this rank's part  Shard -> Replicate
    scatter    this rank's part            all-gather        Replicate -> Shard

copy comes before work that differs from rank to rank, reduce after it. With one rank all are the
identity. Every rank of the group calls them in the same order and runs the same backward. Three are
redistributions of a DTensor; `gather` also joins batches, whose parts have any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from arcshard.collectives import all_gather_single
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.split import Split, as_dtensor, mesh_of, size_of

Group = dist.ProcessGroup | None


def copy(tensor: Tensor, group: Group = None) -> Tensor:
    """Passes a whole tensor on to work that differs by rank; its gradients are summed.

    Args:
        tensor: Any shape, equal on all ranks.
        group: Ranks; None for the default group.
    """
    return _redistributed(tensor, resolve_group(group), Replicate(), Replicate(), Partial())


def reduce(tensor: Tensor, group: Group = None) -> Tensor:
    """Sums over the ranks, with the result on every rank.

    Args:
        tensor: The same shape on all ranks.
        group: Ranks; None for the default group.
    """
    return _redistributed(tensor, resolve_group(group), Partial(), Replicate(), Replicate())


def gather(
    tensor: Tensor,
    dim: int = -1,
    group: Group = None,
    *,
    sizes: Sequence[int] | None = None,
    under_ddp: bool = False,
) -> Tensor:
    """Joins the parts of all ranks along `dim` in rank order; parts may differ in length.

    Args:
        tensor: This rank's part; integers are allowed (labels).
        dim: Dimension along which the parts are joined.
        group: Ranks; None for the default group.
        sizes: Length of each rank's part. With None the ranks exchange them, which costs one tiny
            collective and, on CUDA, a wait for the device.
        under_ddp: Whether the tensor is a batch gathered from a model under DDP. Its gradient is
            then multiplied by the size of the group, because DDP divides by all ranks what one
            rank's rows contribute.

    Raises:
        ValueError: `sizes` has not one length per rank, or another one for this rank's part.
    """
    group = resolve_group(group)
    if size_of(group) == 1:
        return tensor
    assert group is not None
    dim = dim % tensor.ndim
    if sizes is None:
        length = torch.tensor([tensor.shape[dim]], device=tensor.device)
        lengths = length.new_empty(size_of(group))
        all_gather_single(lengths, length, group)
        sizes = lengths.tolist()
    elif len(sizes) != size_of(group) or sizes[dist.get_rank(group)] != tensor.shape[dim]:
        raise ValueError(
            f"sizes={list(sizes)} on rank {dist.get_rank(group)} of {size_of(group)}, whose part "
            f"is {tensor.shape[dim]} long: one length per rank, this rank's own among them"
        )
    factor = size_of(group) if under_ddp else 1
    whole: Tensor = _Gather.apply(tensor, dim, group, list(sizes), factor)
    return whole


def scatter(tensor: Tensor, dim: int = -1, group: Group = None) -> Tensor:
    """Returns this rank's part of a tensor that all ranks hold whole, cut as by `Split`.

    Args:
        tensor: The whole tensor.
        dim: Dimension that is split.
        group: Ranks; None for the default group.
    """
    part = Shard(dim % tensor.ndim)
    return _redistributed(tensor, resolve_group(group), Replicate(), part, part)


def gather_split(part: Tensor, split: Split) -> Tensor:
    """Joins the parts of an activation; its gradient is this rank's part."""
    if split.several is None:
        return part
    mesh = mesh_of(split.several, part.device)
    return as_dtensor(part, split, mesh).redistribute(mesh, [Replicate()]).to_local()


def _redistributed(
    tensor: Tensor, group: Group, there: Placement, here: Placement, gradient: Placement
) -> Tensor:
    """Redistributes a local tensor of placement `there` to `here`, whose gradient is `gradient`."""
    if size_of(group) == 1:
        return tensor
    assert group is not None
    mesh = mesh_of(group, tensor.device)
    whole = DTensor.from_local(tensor, mesh, [there], run_check=False)
    return whole.redistribute(mesh, [here]).to_local(grad_placements=[gradient])


def join_parts(part: Tensor, dim: int, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Joins every rank's part along `dim`; shorter parts are padded for the transfer.

    Args:
        part: This rank's part.
        dim: Dimension along which the parts are joined.
        group: Ranks.
        sizes: Length of each rank's part.
    """
    longest = max(sizes)
    front = part.movedim(dim, 0)
    if len(front) < longest:
        front = torch.cat([front, front.new_zeros(longest - len(front), *front.shape[1:])])
    everything = front.new_empty(len(sizes) * longest, *front.shape[1:])
    all_gather_single(everything, front.contiguous(), group)
    if min(sizes) < longest:
        pieces = [everything[k * longest : k * longest + n] for k, n in enumerate(sizes)]
        everything = torch.cat(pieces)
    return everything.movedim(0, dim).contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor: Tensor,
        dim: int,
        group: dist.ProcessGroup,
        sizes: list[int],
        factor: int,
    ) -> Tensor:
        rank = dist.get_rank(group)
        ctx.place, ctx.factor = (dim, sum(sizes[:rank]), sizes[rank]), factor
        return join_parts(tensor, dim, group, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mine = gradients[0].narrow(*ctx.place)
        return mine if ctx.factor == 1 else mine * ctx.factor, None, None, None, None
