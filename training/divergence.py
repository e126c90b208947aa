"""Detects steps that went wrong, without waiting for the device.

The scalars of the steps stay on the device until a log step or a checkpoint needs them. Then they
are read together and folded into a few running statistics. All numbers are the same on every rank,
so that all ranks take the same decision.

skipped steps   The loss or the gradient was not finite (found_inf), and no weight was updated. The
            code calls them bad steps.
collapse    The embeddings of different images of the global batch point in the same direction
            (`arcshard.head.batch.mean_pairwise_cosine` above COLLAPSE_COSINE) in COLLAPSE_STEPS
            steps in a row after the first SETTLE_STEPS. All images then have the same cosine with a
            class. In these networks the bias of the last batch norm outgrows everything else; fresh
            networks begin near 0. The streak must be long, because a network with another last
            layer may begin near 1. A collapse does not recover: the gradient that would separate
            the embeddings is gone.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.step import StepOutcome

SETTLE_STEPS = 200
COLLAPSE_COSINE = 0.99
COLLAPSE_STEPS = 500
READ_AT_LEAST_EVERY = 1000  # steps whose scalars may wait on the device
# A saved state is 14 numbers, of which earlier versions used five for loss spikes. The fields of
# RunningStats are at these places of it, and the others are not read.
SAVED_NUMBERS, SAVED_PLACES = 14, [0, 1, 2, 3, 4, 5, 8, 12, 13]


class Diverged(RuntimeError):
    """The run cannot continue as it is. The message is the report."""


class RollBack(RuntimeError):
    """Return to the last checkpoint before `bad_steps`, and continue after their data.

    Attributes:
        bad_steps: Optimizer steps of this run, counted from 0.
        number: Number of this rollback, counted from 1.
    """

    def __init__(self, message: str, bad_steps: range, number: int) -> None:
        super().__init__(message)
        self.bad_steps, self.number = bad_steps, number


class StepStats(NamedTuple):
    """Statistics of the steps since the last report.

    Attributes:
        loss: Mean loss of the steps with a finite loss, NaN if there was none.
        bad_steps: Number of skipped steps.
        longest_streak: Length of the longest run of consecutive skipped steps.
        grad_norm: Gradient norm of the last step.
        loss_scale: Loss scale of the last step.
        longest_ended_ago: Steps since the last skipped step of the longest streak.
        mean_pairwise_cosine: Mean pairwise cosine in the last step, NaN if unknown.
        alike_streak: Steps in a row, up to the last one, with a cosine above COLLAPSE_COSINE.
        distillation: Distillation loss of the last step, NaN without a teacher.
    """

    loss: float
    bad_steps: int
    longest_streak: int
    grad_norm: float
    loss_scale: float
    longest_ended_ago: int = 0
    mean_pairwise_cosine: float = math.nan
    alike_streak: int = 0
    distillation: float = math.nan


@dataclass
class RunningStats:
    """Running statistics as they go into a checkpoint. All are float64; counts are exact.

    Attributes:
        seen: Steps since the start of the run.
        loss_sum: Sum of the finite losses since the last report.
        good: Number of finite losses since the last report.
        bad: Skipped steps since the last report.
        longest: Length of the longest streak of skipped steps since the last report.
        longest_end: Value of `seen` at the last step of that streak.
        streak: Skipped steps in a row, up to the last step.
        mean_pairwise_cosine: Mean pairwise cosine in the last step.
        alike_streak: Steps in a row, up to the last one, with a cosine above COLLAPSE_COSINE.
    """

    seen: float = 0.0
    loss_sum: float = 0.0
    good: float = 0.0
    bad: float = 0.0
    longest: float = 0.0
    longest_end: float = 0.0
    streak: float = 0.0
    mean_pairwise_cosine: float = math.nan
    alike_streak: float = 0.0

    def add(
        self, loss: float, is_bad: bool, loss_scale: float, mean_pairwise_cosine: float
    ) -> None:
        """Add one step. A step that only lowers the fp16 loss scale does not count as skipped."""
        self.seen += 1
        is_bad = is_bad and not (math.isfinite(loss) and loss_scale > 1)
        if math.isfinite(loss):
            self.loss_sum += loss
            self.good += 1
        self.bad += is_bad
        self.streak = self.streak + 1 if is_bad else 0
        if is_bad and self.streak >= self.longest:
            self.longest, self.longest_end = self.streak, self.seen
        self.mean_pairwise_cosine = mean_pairwise_cosine
        is_alike = mean_pairwise_cosine > COLLAPSE_COSINE and self.seen > SETTLE_STEPS
        self.alike_streak = self.alike_streak + 1 if is_alike else 0

    def reset(self) -> None:
        """Start a new report; running streaks are kept."""
        self.loss_sum = self.good = self.bad = self.longest = self.longest_end = 0.0


class DivergenceMonitor:
    """Counts what went wrong.

    It waits for the device in `report` and `state_dict`, and once in READ_AT_LEAST_EVERY steps.

    Args:
        device: Device of the outcomes.
    """

    def __init__(self, device: torch.device) -> None:
        self._no_cosine = torch.full((), math.nan, device=device)
        self._unread: list[tuple[StepOutcome, Tensor]] = []
        self._last: StepOutcome | None = None
        # This tensor is the state, so that a checkpoint can be read straight into it.
        self._tally = torch.zeros(SAVED_NUMBERS, dtype=torch.float64)
        self._write(RunningStats())

    def observe(self, outcome: StepOutcome, mean_pairwise_cosine: Tensor | None = None) -> None:
        """Record one step.

        Args:
            outcome: Outcome of the step.
            mean_pairwise_cosine: Mean pairwise cosine of the step's embeddings, a scalar on the
                device, if it is known. It must be the same number on every rank, because the
                decisions of the ranks depend on it.
        """
        self._unread.append(
            (outcome, self._no_cosine if mean_pairwise_cosine is None else mean_pairwise_cosine)
        )
        self._last = outcome
        if len(self._unread) >= READ_AT_LEAST_EVERY:
            self._read()

    def report(self) -> StepStats:
        """Return the statistics since the last report and start a new one; waits for the device."""
        assert self._last is not None, "report() before the first step"
        tally, taught = self._read(), self._last.distillation
        report = StepStats(
            loss=tally.loss_sum / tally.good if tally.good else math.nan,
            bad_steps=int(tally.bad),
            longest_streak=int(tally.longest),
            grad_norm=float(self._last.grad_norm),
            loss_scale=float(self._last.loss_scale),
            longest_ended_ago=int(tally.seen - tally.longest_end) if tally.longest else 0,
            mean_pairwise_cosine=tally.mean_pairwise_cosine,
            alike_streak=int(tally.alike_streak),
            distillation=math.nan if taught is None else float(taught),
        )
        tally.reset()
        self._write(tally)
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensor of running statistics itself, for a checkpoint to copy or to fill.

        It is float64 [SAVED_NUMBERS], in host memory.
        """
        self._read()
        return {"tally": self._tally}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the `state_dict` of a saved run; steps observed before are discarded.

        Raises:
            ValueError: It has another shape.
        """
        tally = state["tally"]
        if tally.shape != self._tally.shape:
            raise ValueError(
                f"the saved watch has shape {tuple(tally.shape)}, this version's "
                f"{tuple(self._tally.shape)}"
            )
        self._unread.clear()
        self._tally.copy_(tally)

    def _read(self) -> RunningStats:
        """Fold the steps that are still on the device into the running statistics."""
        tally = RunningStats(*self._tally[SAVED_PLACES].tolist())
        if not self._unread:
            return tally
        outcomes, alike = zip(*self._unread, strict=True)
        columns = (
            [one.loss for one in outcomes],
            [one.bad for one in outcomes],
            [one.loss_scale for one in outcomes],
            list(alike),
        )
        rows = torch.stack([torch.stack(column).double() for column in columns]).T.tolist()
        self._unread.clear()
        for loss, is_bad, loss_scale, mean_pairwise_cosine in rows:
            tally.add(loss, bool(is_bad), loss_scale, mean_pairwise_cosine)
        self._write(tally)
        return tally

    def _write(self, tally: RunningStats) -> None:
        self._tally[SAVED_PLACES] = torch.tensor(astuple(tally), dtype=torch.float64)


@dataclass
class DivergencePolicy:
    """Decides what a report means for the run: continue, stop, or roll back.

    Args:
        max_bad_steps: Number of consecutive skipped steps that ends the run.
        rolls_back: Whether to raise RollBack, at most `max_rollbacks` times, instead of Diverged.
        max_rollbacks: Largest number of rollbacks.
        rollbacks: Number of rollbacks so far. Save it with the run, and do not restore it from the
            checkpoint that a rollback loads, because the run would then never end.
    """

    max_bad_steps: int
    rolls_back: bool = False
    max_rollbacks: int = 3
    rollbacks: int = 0

    def decide(self, report: StepStats, step: int, learning_rate: float) -> None:
        """Return if the run can continue.

        Args:
            report: Statistics since the last report.
            step: Optimizer steps done.
            learning_rate: Learning rate of the last step.

        Raises:
            Diverged: Too many steps in a row were skipped, or the embeddings collapsed.
            RollBack: The same happened, and `rolls_back` allows a rollback.
        """
        trouble = self._trouble(report, step, learning_rate)
        if trouble is None:
            return
        message, bad_steps = trouble
        if not self.rolls_back:
            raise Diverged(message)
        if self.rollbacks >= self.max_rollbacks:
            raise Diverged(
                f"{message}. It was rolled back {self.rollbacks} times already "
                f"(max_rollbacks={self.max_rollbacks})"
            )
        self.rollbacks += 1
        raise RollBack(message, bad_steps, self.rollbacks)

    def _trouble(
        self, report: StepStats, step: int, learning_rate: float
    ) -> tuple[str, range] | None:
        if report.longest_streak >= self.max_bad_steps:
            end = step - report.longest_ended_ago
            return (
                f"diverged: {report.longest_streak} steps in a row had a non-finite loss or "
                f"gradient (max_bad_steps={self.max_bad_steps}). step {step}, learning rate "
                f"{learning_rate:g}, loss {report.loss:g}, loss scale {report.loss_scale:g}, "
                f"gradient norm {report.grad_norm:g}. Nothing moved in those steps. Try a lower "
                "lr, a longer warmup_epoch, a smaller margin, or precision=fp32"
            ), range(max(end - report.longest_streak, 0), end)
        if report.alike_streak >= COLLAPSE_STEPS:
            return (
                f"diverged: for {report.alike_streak} steps the embeddings of different images "
                f"have been all but the same (mean cosine {report.mean_pairwise_cosine:.4f}, "
                f"collapse from {COLLAPSE_COSINE:g}). step {step}, learning rate "
                f"{learning_rate:g}, loss {report.loss:g}. The network does not tell faces apart "
                "any more and will not come back by itself. Try a lower lr, a longer warmup_epoch, "
                "or a smaller margin to begin with"
            ), range(max(step - report.alike_streak, 0), step)
        return None
