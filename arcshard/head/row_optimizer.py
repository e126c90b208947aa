"""Update rules for class centers: one torch.optim per row, stepped when the row is sampled.

A rule owns the optimizer state of this rank's shard. `update_rows` moves the given rows and
their state and touches nothing else, which is what a sampled head needs: torch.optim on the
whole weight would also move the rows that were not sampled, through weight decay, momentum
and Adam's averages.

Centers or state kept in bf16 are moved in fp32 and rounded stochastically (up or down with
probabilities that make the mean exact): small steps are not lost, as rounding to nearest would.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.sgd import sgd

from arcshard.random import hash_key

Rows = slice | Tensor


class RowOptimizer(ABC):
    """A rule and its state for one shard of class centers.

    Attributes:
        matrices_for_veto: copies `move` makes where it may not look at `bad` (accelerators).

    Args:
        state_dtype: of the averages it keeps; None is the weight's. bfloat16 halves them.
    """

    matrices_for_veto = 0

    def __init__(self, state_dtype: torch.dtype | None = None) -> None:
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}: torch.bfloat16, or None (the weight's)")
        self.state_dtype = state_dtype
        self._state: dict[str, Tensor] = {}
        self.sr_counter = 0  # draws so far of the stochastic rounding; part of the saved state

    @abstractmethod
    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Zeroed state for `weight` [rows, ...]; each tensor has `rows` as its first dimension."""

    @abstractmethod
    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """One step of the rows given, in place.

        Args:
            weight: [S, ...] rows in working precision.
            gradient: [S, ...]; may be overwritten.
            state: of these rows.
            learning_rate: of this step.
            bad: boolean scalar on the device; where true nothing may move. None: go ahead.
        """

    def matrices_per_block(
        self, weight: Tensor, is_sampled: bool, state: dict[str, Tensor] | None = None
    ) -> int:
        """Matrices of the shape of a block's rows that `update_rows` makes on the way."""
        state = self.state(weight) if state is None else state
        averages = [part for part in state.values() if part.dim() == weight.dim()]
        copied = [part for part in averages if is_sampled or part.dtype == torch.bfloat16]
        rounds = any(part.dtype == torch.bfloat16 for part in (weight, *averages))
        vetoed = 0 if weight.device.type == "cpu" else self.matrices_for_veto
        return len(copied) + (5 if rounds else 0) + vetoed

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
        rows: Rows | None,
        learning_rate: float,
        bad: Tensor | None = None,
        *,
        state: dict[str, Tensor] | None = None,
        current: Tensor | None = None,
    ) -> None:
        """Step `weight[rows]` in place.

        Args:
            weight: [num_rows_local, ...], the shard.
            gradient: of those rows; may be overwritten.
            rows: a slice, [S] int64 distinct row numbers, or None for all rows.
            learning_rate: of this step.
            bad: boolean scalar on the device; where true nothing moves. On an accelerator this
                is decided there, without waiting for it.
            state: of `weight`; None: what this rule owns.
            current: a copy of `weight[rows]` in working precision, if the caller has one already;
                overwritten.
        """
        if bad is not None and bad.device.type == "cpu":
            if bool(bad):
                return
            bad = None
        rows = slice(None) if rows is None else rows
        parts = {"weight": weight, **(self.state(weight) if state is None else state)}
        work = {
            name: current
            if name == "weight" and current is not None
            else _in_working_precision(_take(part, rows))
            for name, part in parts.items()
        }
        work_state = {name: value for name, value in work.items() if name != "weight"}
        self.move(work["weight"], gradient, work_state, learning_rate, bad)
        for name, part in parts.items():
            new = work[name]
            if new.dtype != part.dtype:
                new = self._round_stochastically(new)  # leaves what did not move as it was
            elif isinstance(rows, slice):
                continue  # a view: moved where it lies
            _put(part, rows, new)

    def _round_stochastically(self, values: Tensor) -> Tensor:
        """fp32 -> bf16, up or down at random; the draws follow from a count that is saved."""
        generator = None  # the meta device, where nothing is drawn, has none
        if not values.is_meta:
            generator = torch.Generator(values.device)
            generator.manual_seed(hash_key(0x5B, self.sr_counter))
        self.sr_counter += 1
        noise = torch.randint(
            0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
        )
        # bf16 is the upper half of fp32: adding noise below and cutting off rounds with the
        # right probability; the cut value converts exactly.
        cut = (values.view(torch.int32) + noise) & -65536
        return torch.where(torch.isfinite(values), cut.view(torch.float32), values).bfloat16()


def _take(part: Tensor, rows: Rows) -> Tensor:
    return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)


def _put(part: Tensor, rows: Rows, new: Tensor) -> None:
    if isinstance(rows, slice):
        part[rows] = new
    else:
        part.index_copy_(0, rows, new)


def _in_working_precision(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype == torch.bfloat16 else rows


class SGDRows(RowOptimizer):
    """SGD with momentum and coupled weight decay: torch.optim.SGD's formulas, row by row."""

    def __init__(
        self,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.momentum, self.weight_decay = momentum, weight_decay

    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """One momentum buffer. Zeros make the first step the plain gradient, as torch's."""
        if not self.momentum:
            return {}
        return {"momentum_buffer": torch.zeros_like(weight, dtype=self.state_dtype)}

    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """V = mu v + g + wd w;  w = w - lr v: torch's fused kernel, one pass over the rows."""
        sgd(
            [weight],
            [gradient],
            [state.get("momentum_buffer")],
            fused=True,
            found_inf=None if bad is None else bad.to(torch.float32),
            lr=learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


class AdamWRows(RowOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a step count per row."""

    matrices_for_veto = 4

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 5e-4,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Both averages, and the number of steps of every row."""
        return {
            "exp_avg": torch.zeros_like(weight, dtype=self.state_dtype),
            "exp_avg_sq": torch.zeros_like(weight, dtype=self.state_dtype),
            # float64 holds counts exactly and the bias corrections to full precision
            "step": torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device),
        }

    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """m, v as Adam's; w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps)."""
        parts = [weight, state["exp_avg"], state["exp_avg_sq"], state["step"]]
        before = [part.clone() for part in parts] if bad is not None else []
        beta1, beta2 = self.betas
        step = state["step"].add_(1)
        first = state["exp_avg"].lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        by_row = (-1, *[1] * (weight.dim() - 1))
        step_size = (learning_rate / (1 - beta1**step)).to(weight.dtype).view(by_row)
        correction = (1 - beta2**step).sqrt().to(weight.dtype).view(by_row)
        torch.sqrt(second, out=gradient)
        gradient.div_(correction).add_(self.eps)
        torch.div(first, gradient, out=gradient)
        weight.mul_(1 - learning_rate * self.weight_decay).sub_(gradient.mul_(step_size))
        if bad is not None:
            for part, old in zip(parts, before, strict=True):
                part.copy_(torch.where(bad, old, part))


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
