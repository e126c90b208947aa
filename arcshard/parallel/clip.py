"""The norm of a model's gradient where parameters are split, and clipping by it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arcshard.parallel.split import parallel_splits


def grad_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients as if no parameter were split: a scalar, the same on all ranks.

    Parts of a split parameter add up over its ranks, by one all-reduce of one number per group;
    what every rank holds whole counts once. Call it when the gradients are complete (after DDP's
    backward), on every rank.
    """
    splits = parallel_splits(model)
    by_group: dict[dist.ProcessGroup | None, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        group = splits[name].several if name in splits else None
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        # A rank without a gradient still takes part in its group's all-reduce.
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
    """torch.nn.utils.clip_grad_norm_ for models with split parameters; returns the norm before.

    Args:
        model: every rank's, not wrapped in DDP.
        max_norm: above 0.

    Raises:
        ValueError: a max_norm that is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: above 0")
    norm = grad_norm(model)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.to(parameter.grad.dtype))
    return norm
