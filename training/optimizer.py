"""The backbone's optimizer, its state whole on every rank or spread over them (ZeRO)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from backbones import Backbone


def make_optimizer(
    backbone: Backbone,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    decay_norms_and_biases: bool = True,
    layer_decay: float = 1.0,
    spread: bool = False,
) -> torch.optim.Optimizer:
    """SGD or AdamW over what is trained, fused, so that it can leave a step out on the device.

    Args:
        name: "sgd" or "adamw".
        decay_norms_and_biases, layer_decay: see `parameter_groups`.
        spread: each rank of the default group keeps the state of some parameters and moves them;
            they are then broadcast (Rajbhandari et al. 2020, ZeRO, stage 1).
    """
    groups = parameter_groups(backbone, weight_decay, decay_norms_and_biases, layer_decay)
    kind: Any = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}
    if name == "sgd":
        options["momentum"] = momentum
    optimizer: torch.optim.Optimizer
    if spread:
        optimizer = ZeroRedundancyOptimizer(groups, kind, **options)
    else:
        optimizer = kind(groups, **options)
    set_learning_rate(optimizer, lr)
    if options.get("momentum"):
        # The fused kernel makes these buffers at the first step without filling them, and
        # leaves them so if that step is bad. Zeros give the same first step (no dampening).
        own = own_optimizer(optimizer)
        for parameter in own_parameters(optimizer):
            own.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(
    backbone: Backbone, weight_decay: float, decay_norms_and_biases: bool, layer_decay: float
) -> list[dict[str, Any]]:
    """What is trained, in groups of one weight decay and one share of the learning rate each.

    Args:
        decay_norms_and_biases: False: weight decay shrinks the weights of convolutions and linear
            layers and nothing else: not their biases, norms, PReLU's slopes, positions of patches,
            or the token of masked ones.
        layer_decay: `lr_factor` of a group of `Backbone.layers_by_depth` relative to the one
            after it; the last one has 1.

    Returns:
        Groups for an optimizer, in the order in which their first parameters come; a single one
        with both arguments at their defaults (True, 1).
    """
    matrices = {
        id(module.weight)
        for module in backbone.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    factors = _factors(backbone, layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in backbone.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if decay_norms_and_biases or id(parameter) in matrices else 0.0
        group = {"params": [], "weight_decay": decay, "lr_factor": factors[name]}
        groups.setdefault((decay, factors[name]), group)["params"].append(parameter)
    return list(groups.values())


def _factors(backbone: Backbone, layer_decay: float) -> dict[str, float]:
    """Share of the learning rate by name of the parameter."""
    names = [name for name, _ in backbone.named_parameters()]
    if layer_decay == 1.0:
        return dict.fromkeys(names, 1.0)
    return {
        name: layer_decay**above
        for above, parts in enumerate(reversed(backbone.layers_by_depth()))
        for name in names
        if any(name == part or name.startswith(f"{part}.") for part in parts)
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Of every group, times its share."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What steps on this rank and holds its state: the optimizer itself, or ZeRO's inner one."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def own_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that this rank moves."""
    return [p for group in own_optimizer(optimizer).param_groups for p in group["params"]]


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Whether other ranks hold the state of other parameters."""
    return isinstance(optimizer, ZeroRedundancyOptimizer)
