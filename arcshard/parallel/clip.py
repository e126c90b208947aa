"""The norm of a model's gradient where parameters are split, and clipping by it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from arcshard.parallel.split import local_part


def grad_norm(model: nn.Module) -> Tensor:
    """Computes the 2-norm of all gradients as if no parameter were split, the same on all ranks.

    It is torch.nn.utils.get_total_norm, which takes either DTensors or plain tensors, of both: a
    parameter that every rank holds whole counts once. Every rank calls it when the gradients are
    complete (after DDP's backward).

    Args:
        model: The model of this rank.

    Returns:
        Scalar.
    """
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {None: []}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        gradient = parameter.grad
        if gradient is None and mesh is not None and parameter.requires_grad:
            gradient = torch.zeros_like(parameter)  # this rank takes part in the all-reduce
        if gradient is not None:
            by_mesh.setdefault(mesh, []).append(gradient.detach())
    norms = [nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole))


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
            gradient = local_part(parameter.grad)
            gradient.mul_(factor.to(gradient.dtype))
    return norm
