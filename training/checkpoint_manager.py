"""Saves the run: after every step all ranks take the same decision whether to save or to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from signal import Signals
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.checkpoint.checkpointer import Checkpointer, find_intact, remove_after
from training.divergence import Diverged, RollBack
from training.signals import StopSignals
from training.state import Progress, RunState
from utils.distributed import DistContext

logger = logging.getLogger("train")


class RunFlags(NamedTuple):
    """Flags of one rank, or of all ranks joined by "or".

    Attributes:
        stop: A signal asked the run to stop.
        save: A checkpoint is due by time.
        busy: The last checkpoint is still being written.
        give_up: Too many saves have failed.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False
    give_up: bool = False


class Flags:
    """Joins the flags of all ranks.

    This costs one all-reduce of four bytes per step, which overlaps with the computation.
    """

    def __init__(self, world: DistContext) -> None:
        # A separate group, because its operations overlap with those of the step.
        self._group = None if world.world_size == 1 else dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work | None, Tensor] | None = None

    def post(self, flags: RunFlags) -> None:
        """Post the flags of this rank; `result` returns the joined ones after the next step."""
        assert self._pending is None, "result() comes before the next post()"
        message = torch.tensor(flags, dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, message)

    def result(self) -> RunFlags:
        """Return the flags that any rank set in the last `post`; all are false before it."""
        if self._pending is None:
            return RunFlags()
        work, message = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return RunFlags(*(bool(flag) for flag in message.tolist()))

    def any_rank(self, wish: bool) -> bool:
        """Return whether `wish` is true on any rank; all ranks call this together and wait."""
        message = torch.tensor([wish], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        return bool(message)


class Stopped(Exception):
    """A signal ended the run. Its state is saved, unless the message says otherwise."""


class SavesFailed(RuntimeError):
    """Too many checkpoints in a row could not be written."""


class CheckpointManager:
    """Decides when to save and when to stop.

    The ends of epochs, a new best accuracy and the end of the run are saved in any case.

    Args:
        world: This process among the ranks.
        state: Collects what is saved.
        facts: Plain values that are saved beside the state.
        checkpointer: Writes the checkpoints.
        signals: Stop signals of this process.
        every_steps: Optimizer steps between two checkpoints; 0 saves none by steps.
        every_minutes: Minutes between two checkpoints; 0 saves none by time.
        is_on: Whether checkpoints are saved. If not, only a signal saves one.
    """

    def __init__(
        self,
        world: DistContext,
        state: RunState,
        facts: Mapping[str, Any],
        checkpointer: Checkpointer,
        signals: StopSignals,
        *,
        every_steps: int,
        every_minutes: float,
        is_on: bool,
    ) -> None:
        self.world, self.state, self.facts = world, state, dict(facts)
        self.checkpointer, self.signals = checkpointer, signals
        self.every_steps, self.every_minutes, self.is_on = every_steps, every_minutes, is_on
        self.flags = Flags(world)
        self._last_save = time.monotonic()

    def after_step(self, progress: Progress, *, epoch_ends: bool, is_last: bool) -> None:
        """Save if a checkpoint is due; the flags of the ranks take effect one step later.

        Raises:
            Stopped: A signal came to some rank.
            SavesFailed: `max_failed_saves` checkpoints in a row could not be written.
        """
        agreed = self.flags.result()
        if agreed.stop and not is_last:
            self._stop(progress)
        if agreed.give_up:
            raise self._saves_failed()
        if self.is_on:
            due = bool(self.every_steps) and progress.step % self.every_steps == 0
            if epoch_ends or progress.is_best or is_last:
                self._save(progress)
            elif (due or agreed.save) and agreed.busy:
                logger.warning(
                    "the checkpoint of step %d is left out: the one before is still being "
                    "written. A faster disk or fewer checkpoints would do",
                    progress.step,
                )
            elif due or agreed.save:
                self._save(progress)
        if not is_last:
            self.flags.post(
                RunFlags(
                    stop=self.is_asked_to_stop(),
                    save=self._time_is_up(),
                    busy=self.checkpointer.is_busy,
                    give_up=self.checkpointer.gave_up,
                )
            )

    def save_now(self, progress: Progress) -> None:
        """Save a checkpoint unless they are switched off, and return when it is written."""
        if self.is_on:
            self._save(progress, wait=True)

    def is_asked_to_stop(self) -> bool:
        """Return whether a signal came to this rank."""
        return self.signals.received is not None

    def stop_if_asked(self, progress: Progress) -> None:
        """Save and stop if a signal came to any rank; all ranks call this together between steps.

        Raises:
            Stopped: A signal came to some rank, and the state is saved.
        """
        if self.flags.any_rank(self.is_asked_to_stop()):
            self._stop(progress)

    def _save(self, progress: Progress, *, wait: bool = False) -> None:
        self._last_save = time.monotonic()
        facts = {**self.facts, **self.state.facts(progress)}
        self.checkpointer.save(
            progress.step, self.state.tensors(), facts, is_best=progress.is_best, wait=wait
        )

    def roll_back(self, progress: Progress, bad: RollBack) -> None:
        """Load the last checkpoint before the bad steps and continue after their data.

        All ranks call this together. The learning rate follows the step of the checkpoint.
        Checkpoints of later steps are removed.

        Args:
            progress: Progress of the run, updated in place.
            bad: The steps to undo.

        Raises:
            Diverged: There is no such checkpoint.
        """
        self.checkpointer.wait()
        ranks = self.checkpointer.ranks
        found = find_intact(self.checkpointer.folder, ranks, at_most=bad.bad_steps.start)
        if found is None:
            raise Diverged(f"{bad}. There is no checkpoint to go back to") from bad
        logger.error("%s", bad)
        logger.error(
            "rolling back (number %d) from step %d to %s, past the data of steps %d to %d",
            bad.number,
            progress.step,
            found.path,
            bad.bad_steps.start,
            bad.bad_steps.stop - 1,
        )
        progress.go_back(self.state.load(found, ranks), bad)
        if ranks.is_main:
            remove_after(self.checkpointer.folder, progress.step)
        ranks.gather(None)

    def finish(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            SavesFailed: The last checkpoint could not be written.
        """
        self.checkpointer.wait()
        if self.checkpointer.failed_in_a_row:
            raise self._saves_failed()

    def _saves_failed(self) -> SavesFailed:
        return SavesFailed(
            f"{self.checkpointer.failed_in_a_row} checkpoints in a row could not be written "
            f"(max_failed_saves={self.checkpointer.max_failed}), the last because: "
            f"{self.checkpointer.last_error}. Make room or mend the disk and start again with "
            "resume=auto"
        )

    def _time_is_up(self) -> bool:
        minutes = (time.monotonic() - self._last_save) / 60
        return self.world.is_main and 0 < self.every_minutes <= minutes

    def _stop(self, progress: Progress) -> None:
        failed_before = self.checkpointer.failed_in_a_row
        self._save(progress, wait=True)
        name = Signals(self.signals.received).name if self.signals.received else "another rank's"
        if self.checkpointer.failed_in_a_row > failed_before:
            raise Stopped(
                f"stopped by {name} signal at step {progress.step}, and this state could NOT be "
                f"saved: {self.checkpointer.last_error}. resume=auto goes on from the last one"
            )
        raise Stopped(
            f"stopped by {name} signal at step {progress.step}; the state is saved, resume=auto "
            "goes on from it"
        )
