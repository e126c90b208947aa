"""Keeps the run: at the end of every step, all ranks decide alike whether to save or to stop."""

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
    """True where this rank, or in a result any rank, says so.

    stop: a signal asked the run to stop. save: it is time for a checkpoint.
    busy: the last checkpoint is still being written. give_up: too many saves have failed.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False
    give_up: bool = False


class Flags:
    """Flags of all ranks; costs one all-reduce of four bytes per step, beside the computation."""

    def __init__(self, world: DistContext) -> None:
        # A group of its own: its operations overlap with those of the step.
        self._group = None if world.world_size == 1 else dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work | None, Tensor] | None = None

    def post(self, flags: RunFlags) -> None:
        """Say what this rank wants; the result is for the end of the next step."""
        assert self._pending is None, "result() comes before the next cast()"
        message = torch.tensor(flags, dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, message)

    def result(self) -> RunFlags:
        """What any rank said in the last cast; nothing before the first."""
        if self._pending is None:
            return RunFlags()
        work, message = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return RunFlags(*(bool(flag) for flag in message.tolist()))

    def any_rank(self, wish: bool) -> bool:
        """Whether any rank wishes so; all ranks call it together and wait for each other."""
        message = torch.tensor([wish], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        return bool(message)


class Stopped(Exception):
    """A signal ended the run; its state is saved, unless the message says otherwise."""


class SavesFailed(RuntimeError):
    """Too many checkpoints in a row could not be written."""


class CheckpointManager:
    """Saves and stops on time.

    Args:
        world: this rank. state: collects what is saved. facts: plain values saved beside it.
        checkpointer: writes. signals: of this process.
        every_steps, every_minutes: between two checkpoints, 0: not by that measure. The ends of
            epochs, a new best accuracy and the end of the run are saved in any case.
        is_on: False: only what a signal asks for is saved.
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

    def after_step(
        self, progress: Progress, *, epoch_ends: bool, is_best: bool, is_last: bool
    ) -> None:
        """Save if it is time to; what the ranks want is known one step later.

        Raises:
            Stopped: a signal came to some rank.
            SavesFailed: max_failed_saves of them in a row.
        """
        agreed = self.flags.result()
        if agreed.stop and not is_last:
            self._stop(progress)
        if agreed.give_up:
            raise self._saves_failed()
        if self.is_on:
            due = bool(self.every_steps) and progress.step % self.every_steps == 0
            if epoch_ends or is_best or is_last:
                self._save(progress, is_best=is_best)
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

    def save_now(self, progress: Progress, *, is_best: bool = False) -> None:
        """A checkpoint, unless they are switched off; returns when it is written."""
        if self.is_on:
            self._save(progress, is_best=is_best, wait=True)

    def is_asked_to_stop(self) -> bool:
        """A signal came to this rank."""
        return self.signals.received is not None

    def stop_if_asked(self, progress: Progress) -> None:
        """Between steps, all ranks together.

        Raises:
            Stopped: a signal came to some rank; the state is saved.
        """
        if self.flags.any_rank(self.is_asked_to_stop()):
            self._stop(progress)

    def _save(self, progress: Progress, *, is_best: bool = False, wait: bool = False) -> None:
        self._last_save = time.monotonic()
        facts = {**self.facts, **self.state.facts(progress)}
        self.checkpointer.save(
            progress.step, self.state.tensors(), facts, is_best=is_best, wait=wait
        )

    def roll_back(self, progress: Progress, bad: RollBack) -> None:
        """To the last checkpoint before the bad steps, and past their data; all ranks together.

        The learning rate goes on with the step. Checkpoints made since are removed.

        Raises:
            Diverged: there is none.
        """
        self.checkpointer.wait()
        ranks = self.checkpointer.ranks
        found = find_intact(self.checkpointer.folder, ranks, at_most=bad.bad_steps.start)
        if found is None:
            raise Diverged(f"{bad}. There is no checkpoint to go back to") from bad
        position = progress.position - (progress.step - bad.bad_steps.stop)
        logger.error("%s", bad)
        logger.error(
            "rolling back (number %d) from step %d to %s, past the data of steps %d to %d",
            bad.number,
            progress.step,
            found.path,
            bad.bad_steps.start,
            bad.bad_steps.stop - 1,
        )
        saved = self.state.load(found, ranks)
        vars(progress).update({**vars(saved), "position": position, "rollbacks": bad.number})
        if ranks.is_main:
            remove_after(self.checkpointer.folder, progress.step)
        ranks.gather(None)

    def finish(self) -> None:
        """Until what is being written is written.

        Raises:
            SavesFailed: the last one was not.
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
