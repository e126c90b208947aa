"""Watches a run for steps that went wrong, without waiting for the device.

The steps' scalars stay on the device until a log step, or a checkpoint, needs them; then they
are read at once and folded into a few running numbers. What is looked for, all of it in numbers
that every rank has in common, so that all ranks decide alike:

bad steps   the loss or the gradient was not finite; nothing moved.
spikes      the loss of a step is above mean + SPIKE_SIGMAS deviations *and* above SPIKE_FACTOR
            means of the steps before. Both, because either alone cries wolf: with large batches
            the deviation is a percent of the mean, and late in a run a mean near 0 is doubled by
            one hard image. 6 deviations: margin losses have a heavy tail (the margin punishes a
            few wrong labels with s m2, tens of nats), where 3 are passed all the time. Not within
            the first SETTLE_STEPS steps, when loss and learning rate move fast. Mean and
            deviation forget with 1 / SPIKE_WINDOW per step; a spike counts in them as the limit
            it passed, so that one does not hide the next, and a lasting new level is accepted
            after some tens of steps. A spike is warned of, nothing else: most heal.
collapse    the embeddings of different images of the global batch point the same way
            (`arcshard.head.batch.mean_pairwise_cosine` above COLLAPSE_COSINE), so that all images
            have the same cosine with a class, in COLLAPSE_STEPS steps in a row after the first
            SETTLE_STEPS. In these networks it is the bias of the last batch norm that outgrows
            everything else; fresh ones begin at 0. It must last, because a network that ends
            otherwise may begin near 1. It does not heal: the gradient that would part them is gone.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.step import StepOutcome

SPIKE_SIGMAS = 6.0
SPIKE_FACTOR = 1.5
SPIKE_WINDOW = 200  # steps
SETTLE_STEPS = 200
COLLAPSE_COSINE = 0.99
COLLAPSE_STEPS = 500
READ_AT_LEAST_EVERY = 1000  # steps whose scalars may wait on the device


class Diverged(RuntimeError):
    """The run cannot go on as it is; the message is the report."""


class RollBack(RuntimeError):
    """Go back to the last good checkpoint and past the data of `bad_steps`.

    Attributes:
        bad_steps: optimizer steps of this run, the first one of it being 0.
        number: of this roll-back, from 1.
    """

    def __init__(self, message: str, bad_steps: range, number: int) -> None:
        super().__init__(message)
        self.bad_steps, self.number = bad_steps, number


class StepStats(NamedTuple):
    """Since the last report: mean loss of the good steps (NaN if there was none), bad steps,
    the longest row of bad steps, and the last step's gradient norm and loss scale.

    longest_ended_ago: steps since the last bad step of the longest row.
    spikes: how many; worst_spike: the highest of them (NaN without); usual_loss: the running mean.
    mean_pairwise_cosine: of the last step, NaN if unknown; alike_streak: steps in a row, up to the
    last one, in which it was above COLLAPSE_COSINE.
    distillation: the last step's, NaN without a teacher.
    """

    loss: float
    bad_steps: int
    longest_streak: int
    grad_norm: float
    loss_scale: float
    longest_ended_ago: int = 0
    spikes: int = 0
    worst_spike: float = math.nan
    usual_loss: float = math.nan
    mean_pairwise_cosine: float = math.nan
    alike_streak: int = 0
    distillation: float = math.nan


@dataclass
class RunningStats:
    """The running numbers, as they go into a checkpoint. All float64; counts are exact."""

    seen: float = 0.0
    # since the last report
    loss_sum: float = 0.0
    good: float = 0.0
    bad: float = 0.0
    longest: float = 0.0
    longest_end: float = 0.0  # `seen` at its last step
    spikes: float = 0.0
    worst_spike: float = math.nan
    # for ever
    streak: float = 0.0
    steady: float = 0.0  # steps that mean and variance have seen
    mean: float = 0.0
    variance: float = 0.0
    mean_pairwise_cosine: float = math.nan
    alike_streak: float = 0.0

    def add(
        self, loss: float, is_bad: bool, loss_scale: float, mean_pairwise_cosine: float
    ) -> None:
        """One step. Steps that only shrink the fp16 loss scale are not bad."""
        self.seen += 1
        is_bad = is_bad and not (math.isfinite(loss) and loss_scale > 1)
        if math.isfinite(loss):
            self.loss_sum += loss
            self.good += 1
            if not is_bad:
                self._follow(loss)
        self.bad += is_bad
        self.streak = self.streak + 1 if is_bad else 0
        if is_bad and self.streak >= self.longest:
            self.longest, self.longest_end = self.streak, self.seen
        self.mean_pairwise_cosine = mean_pairwise_cosine
        is_alike = mean_pairwise_cosine > COLLAPSE_COSINE and self.seen > SETTLE_STEPS
        self.alike_streak = self.alike_streak + 1 if is_alike else 0

    def _follow(self, loss: float) -> None:
        """Is it a spike? And move the running mean and variance."""
        if self.steady >= SETTLE_STEPS:
            limit = max(
                self.mean + SPIKE_SIGMAS * math.sqrt(self.variance), SPIKE_FACTOR * self.mean
            )
            if loss > limit:
                self.spikes += 1
                # not max(worst, loss): with NaN as "none yet" its answer depends on the order
                if not self.worst_spike >= loss:
                    self.worst_spike = loss
                loss = limit
        self.steady += 1
        weight = max(1 / self.steady, 1 / SPIKE_WINDOW)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference * difference)

    def reset(self) -> None:
        """A report was made: running streaks, mean and deviation go on."""
        self.loss_sum = self.good = self.bad = self.longest = self.longest_end = 0.0
        self.spikes, self.worst_spike = 0.0, math.nan


class DivergenceMonitor:
    """Counts what went wrong; waits for the device in `report` and `state_dict` only, and once
    in READ_AT_LEAST_EVERY steps.

    Args:
        device: of the outcomes.
    """

    def __init__(self, device: torch.device) -> None:
        self._no_cosine = torch.full((), math.nan, device=device)
        self._unread: list[tuple[StepOutcome, Tensor]] = []
        self._last: StepOutcome | None = None
        # The truth lies in this tensor, so that a checkpoint can be read straight into it.
        self._tally = torch.tensor(astuple(RunningStats()), dtype=torch.float64)

    def observe(self, outcome: StepOutcome, mean_pairwise_cosine: Tensor | None = None) -> None:
        """Take note of one step.

        Args:
            mean_pairwise_cosine: scalar on the device, of the step's embeddings, if
                known; the same number on every rank, or the ranks will not decide alike.
        """
        self._unread.append(
            (outcome, self._no_cosine if mean_pairwise_cosine is None else mean_pairwise_cosine)
        )
        self._last = outcome
        if len(self._unread) >= READ_AT_LEAST_EVERY:
            self._read()

    def report(self) -> StepStats:
        """What happened since the last report (waits for the device); begins anew."""
        assert self._last is not None, "report() before the first step"
        tally, taught = self._read(), self._last.distillation
        report = StepStats(
            loss=tally.loss_sum / tally.good if tally.good else math.nan,
            bad_steps=int(tally.bad),
            longest_streak=int(tally.longest),
            grad_norm=float(self._last.grad_norm),
            loss_scale=float(self._last.loss_scale),
            longest_ended_ago=int(tally.seen - tally.longest_end) if tally.longest else 0,
            spikes=int(tally.spikes),
            worst_spike=tally.worst_spike,
            usual_loss=tally.mean if tally.steady else math.nan,
            mean_pairwise_cosine=tally.mean_pairwise_cosine,
            alike_streak=int(tally.alike_streak),
            distillation=math.nan if taught is None else float(taught),
        )
        tally.reset()
        self._write(tally)
        return report

    def state_dict(self) -> dict[str, Tensor]:
        """The running numbers themselves, [len(fields)] float64 in host memory, for a checkpoint
        to copy or to fill.
        """
        self._read()
        return {"tally": self._tally}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict` of a saved run; what was seen here is forgotten.

        Raises:
            ValueError: it is of another shape.
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
        """Fold the steps that still lie on the device into the tally."""
        tally = RunningStats(*self._tally.tolist())
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
        self._tally.copy_(torch.tensor(astuple(tally), dtype=torch.float64))


@dataclass
class DivergencePolicy:
    """What a report means for the run: go on, warn, stop, or go back.

    Args:
        max_bad_steps: bad steps in a row that end the run's patience.
        rolls_back: False: raise Diverged; True: RollBack, at most `max_rollbacks` times, and then
            Diverged.
        rollbacks: how many there were. Save it with the run, and do not take it back from the
            checkpoint that a roll-back loads, or it would never end.
    """

    max_bad_steps: int
    rolls_back: bool = False
    max_rollbacks: int = 3
    rollbacks: int = 0

    def decide(self, report: StepStats, step: int, learning_rate: float) -> list[str]:
        """Warnings to log; none is a good sign.

        Args:
            step: optimizer steps done; learning_rate: of the last one.

        Raises:
            Diverged: too many bad steps in a row, or a collapse.
            RollBack: the same, where `rolls_back`.
        """
        trouble = self._trouble(report, step, learning_rate)
        if trouble is not None:
            self._end(*trouble)
        if not report.spikes:
            return []
        return [
            f"{report.spikes} loss spikes since the last line, up to {report.worst_spike:.4f} "
            f"(usual: {report.usual_loss:.4f}); if they do not heal, lower lr or set "
            "clip_grad_norm"
        ]

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

    def _end(self, message: str, bad_steps: range) -> None:
        if not self.rolls_back:
            raise Diverged(message)
        if self.rollbacks >= self.max_rollbacks:
            raise Diverged(
                f"{message}. It was rolled back {self.rollbacks} times already "
                f"(max_rollbacks={self.max_rollbacks})"
            )
        self.rollbacks += 1
        raise RollBack(message, bad_steps, self.rollbacks)
