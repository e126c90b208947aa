"""Row optimizers of class centers: one torch.optim per row, stepped when the row is sampled.

A row optimizer owns the optimizer state of this rank's shard. `update_rows` updates the given rows
and their state and nothing else, which is what a sampled head needs: torch.optim on the whole
weight would also update the rows that were not sampled, through weight decay, momentum and Adam's
averages.

Centers or state kept in bf16 are updated in fp32 and rounded stochastically (up or down with
probabilities that make the mean exact), so that small steps are not lost as in rounding to nearest.
The random bits are a hash of (seed, optimizer step, global row, column), so that they do not depend
on blocks, ranks or the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from arcshard.random import hash_key

Rows = slice | Tensor
State = dict[str, Tensor]
Veto = Tensor | None  # boolean scalar on the device; where it is True, nothing is updated


class RowOptimizer(ABC):
    """An update rule and its state for one shard of class centers.

    Args:
        state_dtype: Dtype of the averages in the state; None for the weight's dtype. bfloat16
            halves their memory.

    Attributes:
        sr_counter: Number of optimizer steps so far (`end_step`), part of the saved state of the
            head: the random bits of the rounding are a function of it.
        seed: Seed of these bits.
        first_row: Number of the shard's first row among the rows of all ranks.
    """

    def __init__(self, state_dtype: torch.dtype | None = None) -> None:
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}: torch.bfloat16, or None (the weight's)")
        self.state_dtype = state_dtype
        self._state: State = {}
        self.sr_counter = self.seed = self.first_row = 0

    @abstractmethod
    def create_state(self, weight: Tensor) -> State:
        """Creates zeroed state for `weight` [rows, ...]; each tensor has `rows` rows."""

    @abstractmethod
    def move(
        self, weight: Tensor, gradient: Tensor, state: State, learning_rate: float, bad: Veto
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
        self, weight: Tensor, is_sampled: bool, state: State | None = None
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
        return len(copied) + (5 if rounds else 0)

    def state(self, weight: Tensor) -> State:
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
        bad: Veto = None,
        *,
        state: State | None = None,
        current: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> None:
        """Updates `weight[rows]` in place, as a part of the optimizer step that `end_step` ends.

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
            numbers: [S] int64 numbers of the rows in the shard, where they are others in `weight`.
        """
        if bad is not None and bad.device.type == "cpu":
            if bool(bad):
                return
            bad = None
        rows = slice(None) if rows is None else rows
        state = self.state(weight) if state is None else state
        moved = in_working_precision(take(weight, rows)) if current is None else current
        of_rows = {name: in_working_precision(take(part, rows)) for name, part in state.items()}
        self.move(moved, gradient, of_rows, learning_rate, bad)
        parts, new_parts = (weight, *state.values()), (moved, *of_rows.values())
        bits: Tensor | None = None
        for place, (part, new) in enumerate(zip(parts, new_parts, strict=True)):
            if new.dtype != part.dtype:
                if bits is None:
                    bits = self._random_bits(weight, rows if numbers is None else numbers, moved)
                new = round_stochastically(new, bits_of_part(bits, place))
            elif isinstance(rows, slice):
                continue  # a view, updated in place
            if isinstance(rows, slice):
                part[rows] = new
            else:
                part.index_copy_(0, rows, new)

    def end_step(self) -> None:
        """Ends an optimizer step, so that the next one rounds by other bits."""
        self.sr_counter += 1

    def rounding_keys(self) -> tuple[int, int]:
        """Returns two int32 keys of this step's random bits."""
        key = hash_key(0x5B, self.seed, self.sr_counter)
        return _as_int32(key & _LOW_32), _as_int32(key >> 32)

    def _random_bits(self, weight: Tensor, rows: Rows, like: Tensor) -> Tensor:
        """Returns 32 random bits of every number of the rows, as int32 of the shape of `like`."""
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(weight)), device=weight.device)
        bits = random_bits(rows + self.first_row, like[0].numel(), *self.rounding_keys())
        return bits.view_as(like)


_LOW_32 = 0xFFFFFFFF


def _as_int32(number: int) -> int:
    """Returns the int32 that has the same bits as a number below 2^32."""
    return number - (1 << 32) if number >= 1 << 31 else number


def _mix(x: Tensor) -> Tensor:
    """Mixes the bits of int32 in place (MurmurHash3's finalizer, A. Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        # >> repeats the sign.
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            x.mul_(_as_int32(factor))
    return x


def random_bits(numbers: Tensor, width: int, *keys: int) -> Tensor:
    """Hashes (row, column) and two keys into 32 random bits.

    The kernels of arcshard/head/triton_kernels.py compute the same.

    Args:
        numbers: [n] int64 numbers of the rows.
        width: Number of columns.
        keys: Two numbers of int32.

    Returns:
        [n, width] int32.
    """
    low, high = numbers.to(torch.int32), (numbers >> 32).to(torch.int32)
    row = _mix(_mix(low ^ keys[0]) ^ high ^ keys[1])
    column = torch.arange(width, dtype=torch.int32, device=numbers.device)
    return _mix(row[:, None] ^ column.mul_(_as_int32(0x9E3779B1)))


def bits_of_part(bits: Tensor, place: int) -> Tensor:
    """Returns int32 whose lower halves are the random bits of the weight (0) or of its state."""
    if place == 2:
        return _mix(bits)  # the last use: exp_avg_sq follows exp_avg
    return bits if place == 0 else bits >> 16


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Rounds fp32 to bf16, up or down by the lower halves of int32 `bits` of the same shape.

    Values that bf16 holds stay, and so do infinity and NaN.
    """
    # bf16 is the upper half of fp32: adding noise to the lower half and cutting it off rounds with
    # the right probability, and the cut value converts exactly.
    cut = (bits & 0xFFFF).add_(values.view(torch.int32)).bitwise_and_(-65536)
    return torch.where(torch.isfinite(values), cut.view(torch.float32), values).bfloat16()


def take(part: Tensor, rows: Rows) -> Tensor:
    """Returns a view of a slice of rows, or copies of numbered rows."""
    return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)


def in_working_precision(rows: Tensor) -> Tensor:
    """Returns bf16 rows in fp32, others as they are."""
    return rows.float() if rows.dtype == torch.bfloat16 else rows


def _descend(
    w: Tensor, g: Tensor, bad: Veto, lr: float, decay: float, *buffer: Tensor, momentum: float = 0.0
) -> None:
    """Computes w -= lr (g + decay w), with momentum if there is a buffer for it.

    torch's fused SGD does this in one pass. Under a veto it returns before it writes, so that a
    veto costs no copy, no pass and no wait for the device, and is exact to the bit.
    """
    options: Any = {"lr": lr, "weight_decay": decay, "momentum": momentum, "dampening": 0.0}
    options |= dict.fromkeys(("nesterov", "maximize", "is_first_step"), False)
    found_inf = None if bad is None else bad.float()
    torch._fused_sgd_([w], [g], buffer, **options, found_inf=found_inf)


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

    def create_state(self, weight: Tensor) -> State:
        """Creates the momentum buffer; zeros make the first step the plain gradient, as torch's."""
        if not self.momentum:
            return {}
        return {"momentum_buffer": torch.zeros_like(weight, dtype=self.state_dtype)}

    def move(
        self, weight: Tensor, gradient: Tensor, state: State, learning_rate: float, bad: Veto
    ) -> None:
        """Computes v = mu v + g + wd w and w = w - lr v."""
        rates = learning_rate, self.weight_decay
        _descend(weight, gradient, bad, *rates, *state.values(), momentum=self.momentum)


class AdamWRows(RowOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with a step count per row.

    Args:
        betas: Decay rates of both averages.
        eps: Number added to the denominator.
        weight_decay: wd, at least 0, decoupled from the gradient.
        state_dtype: Dtype of both averages; None for the weight's dtype.
    """

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 5e-4,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(state_dtype)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def create_state(self, weight: Tensor) -> State:
        """Creates both averages, and the number of steps of every row."""
        return {
            "exp_avg": torch.zeros_like(weight, dtype=self.state_dtype),
            "exp_avg_sq": torch.zeros_like(weight, dtype=self.state_dtype),
            # float64 holds counts exactly and the bias corrections to full precision
            "step": torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device),
        }

    def move(
        self, weight: Tensor, gradient: Tensor, state: State, learning_rate: float, bad: Veto
    ) -> None:
        """Computes m and v as Adam does, and w = w (1 - lr wd) - lr m^ / (sqrt(v^) + eps).

        With c1 = 1 - beta1^t and a = c1 / sqrt(1 - beta2^t) of each row, the last term is
        lr m / (a sqrt(v) + eps c1). Only `_descend` writes what a veto protects, and an average is
        a descent too: m += (1 - beta1) (g - m). The gradient's memory holds what is in between,
        which may be NaN under a veto.
        """
        beta1, beta2 = self.betas
        veto = None if bad is None else bad.float()  # once for three uses
        first, second = state["exp_avg"], state["exp_avg_sq"]
        _descend(first, gradient, veto, beta1 - 1, -1.0)
        _descend(second, gradient.square_(), veto, beta2 - 1, -1.0)
        torch.sqrt(second, out=gradient)

        step = state["step"].add_(1 if bad is None else ~bad)
        correction = (1 - beta1**step).view(-1, *[1] * (weight.dim() - 1))
        factor = correction / (1 - beta2**step).sqrt_().view_as(correction)
        factor, eps = factor.to(weight.dtype), (correction * self.eps).to(weight.dtype)
        if bad is None:  # as on CPUs, whose addcmul of two numbers per row is five times slower
            gradient.mul_(factor).add_(eps)
        else:
            torch.addcmul(eps, gradient, factor, out=gradient)
        torch.div(first, gradient, out=gradient)
        _descend(weight, gradient, veto, learning_rate, self.weight_decay)


def refuse_plain_optimizers(weight: nn.Parameter, reason: str) -> None:
    """Makes every torch.optim that steps `weight` raise.

    Args:
        weight: Class centers that only the head may update.
        reason: The reason, for the error message.
    """
    # The mark is on the tensor, because an optimizer knows its tensors and no module.
    weight.moved_by_partial_fc = reason  # type: ignore[attr-defined]
    _register_refusal()


@cache
def _register_refusal() -> None:
    register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reason = getattr(parameter, "moved_by_partial_fc", "")
            if reason:
                raise RuntimeError(f"{type(optimizer).__name__} on a PartialFC: {reason}")
