"""Watches a run for steps that went wrong, without waiting for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.step import StepOutcome


class Diverged(RuntimeError):
    """Too many bad steps in a row; the message is the report."""


class WatchReport(NamedTuple):
    """Since the last report: mean loss of the good steps (NaN if there was none), bad steps,
    the longest row of bad steps, and the last step's gradient norm and loss scale."""

    loss: float
    bad_steps: int
    longest_streak: int
    grad_norm: float
    loss_scale: float


class Watch:
    """Counts bad steps and sums losses on the device; the host looks at log steps only."""

    def __init__(self, device: torch.device) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._good = torch.zeros((), dtype=torch.int64, device=device)
        self._bad = torch.zeros_like(self._good)
        self._streak = torch.zeros_like(self._good)
        self._longest = torch.zeros_like(self._good)
        self._last: StepOutcome | None = None

    def see(self, outcome: StepOutcome) -> None:
        """Take note of one step. Steps that only shrink the fp16 loss scale are not bad."""
        loss: Tensor = outcome.loss.double()
        harmless = torch.isfinite(loss) & (outcome.loss_scale > 1)
        bad = outcome.bad & ~harmless
        self._loss_sum += torch.where(torch.isfinite(loss), loss, 0.0)
        self._good += torch.isfinite(loss)
        self._bad += bad
        self._streak = torch.where(bad, self._streak + 1, 0)
        self._longest = torch.maximum(self._longest, self._streak)
        self._last = outcome

    def state_dict(self) -> dict[str, Tensor]:
        """The running values themselves, for a checkpoint to copy or to fill."""
        return {
            "loss_sum": self._loss_sum, "good": self._good, "bad": self._bad,
            "streak": self._streak, "longest": self._longest,
        }  # fmt: skip

    def report(self) -> WatchReport:
        """Read the counts (waits for the device) and begin anew; a running streak goes on."""
        assert self._last is not None, "report() before the first step"
        good, bad, longest = torch.stack([self._good, self._bad, self._longest]).tolist()
        loss = float(self._loss_sum) / good if good else float("nan")
        for counter in (self._loss_sum, self._good, self._bad, self._longest):
            counter.zero_()
        return WatchReport(
            loss, bad, longest, float(self._last.grad_norm), float(self._last.loss_scale)
        )


def stop_if_diverged(report: WatchReport, max_bad_steps: int, step: int, learning_rate: float):
    """Raise Diverged after `max_bad_steps` bad steps in a row.

    Args:
        step: optimizer steps done; learning_rate: of the last one.
    """
    if report.longest_streak < max_bad_steps:
        return
    raise Diverged(
        f"diverged: {report.longest_streak} steps in a row had a non-finite loss or gradient "
        f"(max_bad_steps={max_bad_steps}). step {step}, learning rate {learning_rate:g}, "
        f"loss {report.loss:g}, loss scale {report.loss_scale:g}, gradient norm "
        f"{report.grad_norm:g}. Nothing moved in those steps. Try a lower lr, a longer "
        "warmup_epoch, a smaller margin, or precision=fp32"
    )
