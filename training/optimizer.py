"""The backbone's optimizer, its state whole on every rank or spread over them (ZeRO)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer


def make_optimizer(
    model: nn.Module, name: str, *, lr: float, momentum: float, weight_decay: float,
    spread: bool = False,
) -> torch.optim.Optimizer:  # fmt: skip
    """SGD or AdamW over what is trained, fused, so that it can leave a step out on the device.

    Args:
        name: "sgd" or "adamw".
        spread: each rank of the default group keeps the state of some parameters and moves them;
            they are then broadcast (Rajbhandari et al. 2020, ZeRO, stage 1).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    kind: Any = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        options["momentum"] = momentum
    optimizer: torch.optim.Optimizer
    if spread:
        optimizer = ZeroRedundancyOptimizer(trained, kind, **options)
    else:
        optimizer = kind(trained, **options)
    if options.get("momentum"):
        # The fused kernel makes these buffers at the first step without filling them, and
        # leaves them so if that step is bad. Zeros give the same first step (no dampening).
        own = own_optimizer(optimizer)
        for parameter in own_parameters(optimizer):
            own.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What steps on this rank and holds its state: the optimizer itself, or ZeRO's inner one."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def own_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that this rank moves."""
    return [p for group in own_optimizer(optimizer).param_groups for p in group["params"]]


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Whether other ranks hold the state of other parameters."""
    return isinstance(optimizer, ZeroRedundancyOptimizer)
