"""Row optimizers of class centers: one torch.optim per row, stepped when the row is sampled.

A row optimizer owns the optimizer state of this rank's shard. `update_rows` updates the given rows
and their state and nothing else, which is what a sampled head needs: torch.optim on the whole
weight would also update the rows that were not sampled, through weight decay, momentum and Adam's
averages.

Centers or state kept in bf16 are updated in fp32 and rounded stochastically (up or down with
probabilities that make the mean exact), so that small steps are not lost as in rounding to nearest.
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
    """An update rule and its state for one shard of class centers.

    Args:
        state_dtype: Dtype of the averages in the state; None for the weight's dtype. bfloat16
            halves their memory.

    Attributes:
        matrices_for_veto: Number of copies that `move` makes where `bad` can be read only on the
            device (accelerators).
        sr_counter: Number of stochastic roundings so far, part of the saved state of the head.
    """

    matrices_for_veto = 0

    def __init__(self, state_dtype: torch.dtype | None = None) -> None:
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}: torch.bfloat16, or None (the weight's)")
        self.state_dtype = state_dtype
        self._state: dict[str, Tensor] = {}
        self.sr_counter = 0

    @abstractmethod
    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Creates zeroed state for `weight` [rows, ...]; each tensor has `rows` rows."""

    @abstractmethod
    def move(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """Applies one step to the given rows, in place.

        Args:
            weight: [S, ...] rows in working precision.
            gradient: [S, ...]; may be overwritten.
            state: State of these rows.
            learning_rate: Learning rate of this step.
            bad: Boolean scalar on the device, or None. Where it is True, nothing is updated.
        """

    def matrices_per_block(
        self, weight: Tensor, is_sampled: bool, state: dict[str, Tensor] | None = None
    ) -> int:
        """Counts the temporary matrices of the shape of a block's rows that `update_rows` makes.

        Args:
            weight: [num_rows_local, ...], the shard.
            is_sampled: Whether the rows are copies picked by number rather than a slice.
            state: State of `weight`; None for the state that this optimizer owns.
        """
        state = self.state(weight) if state is None else state
        averages = [part for part in state.values() if part.dim() == weight.dim()]
        copied = [part for part in averages if is_sampled or part.dtype == torch.bfloat16]
        rounds = any(part.dtype == torch.bfloat16 for part in (weight, *averages))
        vetoed = 0 if weight.device.type == "cpu" else self.matrices_for_veto
        return len(copied) + (5 if rounds else 0) + vetoed

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the state of `weight`, created at first use on its device."""
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
        """Updates `weight[rows]` in place.

        Args:
            weight: [num_rows_local, ...], the shard.
            gradient: [S, ...] gradient of those rows; may be overwritten.
            rows: A slice, [S] int64 distinct row numbers, or None for all rows.
            learning_rate: Learning rate of this step.
            bad: Boolean scalar on the device, or None. Where it is True, nothing is updated. On an
                accelerator this is decided on the device, without waiting for it.
            state: State of `weight`; None for the state that this optimizer owns.
            current: A copy of `weight[rows]` in working precision, if the caller has one;
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
                new = self._round_stochastically(new)  # exact for values that did not change
            elif isinstance(rows, slice):
                continue  # a view, updated in place
            _put(part, rows, new)

    def _round_stochastically(self, values: Tensor) -> Tensor:
        """Rounds fp32 to bf16, up or down at random; the draws follow from a saved count."""
        generator = None  # the meta device, where nothing is drawn, has none
        if not values.is_meta:
            generator = torch.Generator(values.device)
            generator.manual_seed(hash_key(0x5B, self.sr_counter))
        self.sr_counter += 1
        noise = torch.randint(
            0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
        )
        # bf16 is the upper half of fp32: adding noise to the lower half and cutting it off rounds
        # with the right probability, and the cut value converts exactly.
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
    """SGD with momentum and coupled weight decay: torch.optim.SGD's formulas, row by row.

    Args:
        momentum: mu, in [0, 1); 0 needs no state.
        weight_decay: wd, at least 0.
        state_dtype: Dtype of the momentum buffer; None for the weight's dtype.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.momentum, self.weight_decay = momentum, weight_decay

    def create_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Creates the momentum buffer; zeros make the first step the plain gradient, as torch's."""
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
        """Computes v = mu v + g + wd w and w = w - lr v.

        torch's fused kernel does this in one pass over the rows.
        """
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
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a step count per row.

    Args:
        betas: Decay rates of both averages.
        eps: Number added to the denominator.
        weight_decay: wd, at least 0, decoupled from the gradient.
        state_dtype: Dtype of both averages; None for the weight's dtype.
    """

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
        """Creates both averages, and the number of steps of every row."""
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
        """Computes m and v as Adam does, and w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps)."""
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
    """Makes every torch.optim that steps `weight` raise.

    Args:
        weight: Class centers that only the head may update.
        reason: The reason, for the error message.
    """
    # The mark is on the tensor, because an optimizer knows its tensors and no module.
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
