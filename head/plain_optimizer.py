"""Refuse torch.optim on sampled class centres, with the way out in the message."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook


def refuse_plain_optimizers(weight: nn.Parameter, reason: str) -> None:
    """Let no torch.optim step `weight`; `reason` says why."""
    weight.moved_by_partial_fc = reason  # type: ignore[attr-defined]
    global _refusal_is_registered
    if not _refusal_is_registered:
        register_optimizer_step_pre_hook(_refuse)
        _refusal_is_registered = True


_refusal_is_registered = False


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reason = getattr(parameter, "moved_by_partial_fc", "")
            if reason:
                raise RuntimeError(f"{type(optimizer).__name__} on a PartialFC: {reason}")
