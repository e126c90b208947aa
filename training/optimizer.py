"""The backbone's optimizer, with its state whole on every rank or sharded over them (ZeRO)."""

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
    """Make a fused SGD or AdamW over the trainable parameters, which can skip a step on the device.

    Args:
        backbone: The network.
        name: "sgd" or "adamw".
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        decay_norms_and_biases: See `parameter_groups`.
        layer_decay: See `parameter_groups`.
        spread: Whether each rank of the default group keeps the state of some parameters and
            updates them. These are then broadcast (Rajbhandari et al., 2020, ZeRO, stage 1).

    Returns:
        The optimizer.
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
        # The fused kernel makes these buffers at the first step without filling them, and leaves
        # them so if that step is skipped. Zeros give the same first step (no dampening).
        own = own_optimizer(optimizer)
        for parameter in own_parameters(optimizer):
            own.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(
    backbone: Backbone, weight_decay: float, decay_norms_and_biases: bool, layer_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters by weight decay and by factor of the learning rate.

    Args:
        backbone: The network.
        weight_decay: Weight decay.
        decay_norms_and_biases: Whether weight decay applies to all parameters. Otherwise it applies
            only to the weights of convolutions and linear layers, but not to biases, norms, slopes
            of PReLU, positions of patches, or the mask token.
        layer_decay: `lr_factor` of a group of `Backbone.layers_by_depth` relative to the next
            group; the last one has 1.

    Returns:
        Groups for an optimizer, in the order in which their first parameters come. There is a
        single one with both arguments at their defaults (True, 1).
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
    """Return the factor of the learning rate by name of the parameter."""
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
    """Set the learning rate of every group to `learning_rate` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_factor"]


def own_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer that steps on this rank: the given one, or the inner one of ZeRO."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def own_parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters that this rank updates."""
    return [p for group in own_optimizer(optimizer).param_groups for p in group["params"]]


def is_spread(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether other ranks hold the state of other parameters."""
    return isinstance(optimizer, ZeroRedundancyOptimizer)
