"""Update rules for class centres: one torch.optim per row, stepped when the row is sampled.

A rule owns the optimizer state of this rank's shard. `update_rows` moves the given rows and
their state and touches nothing else, which is what a sampled head needs: torch.optim on the
whole weight would also move the rows that were not sampled, through weight decay, momentum
and Adam's averages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class RowUpdate(ABC):
    """A rule and its state for one shard of class centres."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    @abstractmethod
    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Zeroed state for `weight` [rows, D]; each tensor has `rows` as its first dimension."""

    @abstractmethod
    def step_rows(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """New rows and new state for the rows given ([S, D] each); pure."""

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """The state for `weight`, created at first use, on its device."""
        if not self._state:
            self._state = self.create_state(weight)
        return self._state

    @torch.no_grad()
    def update_rows(
        self,
        weight: Tensor,
        gradient: Tensor,
        rows: Tensor | None,
        learning_rate: float,
        bad: Tensor | None = None,
    ) -> None:
        """Step `weight[rows]` in place.

        Args:
            weight: [num_classes_local, D], the shard.
            gradient: [S, D] gradient of those rows (all rows if `rows` is None).
            rows: [S] int64 distinct row numbers, or None for all rows.
            learning_rate: of this step.
            bad: boolean scalar on the device; where true nothing moves (decided on the
                device, without waiting for it).
        """
        state = self.state(weight)
        if rows is None:
            old, old_state = weight, state
        else:
            old, old_state = weight[rows], {name: value[rows] for name, value in state.items()}
        new, new_state = self.step_rows(old, gradient, old_state, learning_rate)
        _write(weight, rows, old, new, bad)
        for name, value in new_state.items():
            _write(state[name], rows, old_state[name], value, bad)


def _write(
    into: Tensor, rows: Tensor | None, old: Tensor, new: Tensor, bad: Tensor | None
) -> None:
    if bad is not None:
        new = torch.where(bad, old, new)
    if rows is None:
        into.copy_(new)
    else:
        into[rows] = new


class SGDRows(RowUpdate):
    """SGD with momentum and coupled weight decay: torch.optim.SGD's formulas, row by row."""

    def __init__(self, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        super().__init__()
        self.momentum, self.weight_decay = momentum, weight_decay

    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(weight)} if self.momentum else {}

    def step_rows(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction = gradient + self.weight_decay * weight
        if not self.momentum:
            return weight - learning_rate * direction, {}
        # A zero buffer makes the first step the plain gradient, as torch.optim.SGD has it.
        direction = self.momentum * state["momentum_buffer"] + direction
        return weight - learning_rate * direction, {"momentum_buffer": direction}


class AdamWRows(RowUpdate):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a step count per row."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            # float64 holds counts exactly and the bias corrections to full precision
            "step": torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device),
        }

    def step_rows(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], learning_rate: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = self.betas
        step = state["step"] + 1
        first = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        second = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient.square()
        correction1 = (1 - beta1**step).to(weight.dtype)[:, None]
        correction2 = (1 - beta2**step).sqrt().to(weight.dtype)[:, None]
        change = (first / correction1) / (second.sqrt() / correction2 + self.eps)
        new = weight * (1 - learning_rate * self.weight_decay) - learning_rate * change
        return new, {"exp_avg": first, "exp_avg_sq": second, "step": step}
