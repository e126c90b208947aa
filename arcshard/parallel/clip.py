"""The norm of a model's gradient where parameters are split, and clipping by it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arcshard.parallel.split import parallel_splits


def grad_norm(model: nn.Module) -> Tensor:
    """Computes the 2-norm of all gradients as if no parameter were split, the same on all ranks.

    The squares of the parts of a split parameter are summed over its ranks, by one all-reduce of
    one number per group; a parameter that every rank holds whole counts once. Every rank calls it
    when the gradients are complete (after DDP's backward).

    Args:
        model: The model of this rank.

    Returns:
        Scalar.
    """
    splits = parallel_splits(model)
    by_group: dict[dist.ProcessGroup | None, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group = splits[name].several if name in splits else None
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # A rank without a gradient takes part in its group's all-reduce too.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        square = torch.zeros((), dtype=dtype, device=parameter.device)
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(parameter.grad, dtype=dtype).square()
        by_group[group] = by_group[group] + square if group in by_group else square
    for group, square in by_group.items():
        if group is not None:
            dist.all_reduce(square, group=group)
    total = torch.stack([square.double() for square in by_group.values()]).sum()
    return total.sqrt().to(next(iter(by_group.values())).dtype)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Does what torch.nn.utils.clip_grad_norm_ does, for models with split parameters.

    Args:
        model: The model of this rank, not wrapped in DDP.
        max_norm: Largest norm, above 0.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: above 0")
    norm = grad_norm(model)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
    return norm
