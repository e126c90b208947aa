"""What the ranks agree on at the end of every step, without anybody waiting for it.

A signal reaches one rank, a clock runs over on another, a third is still busy writing: whether to
stop or to save has to be decided by all at the same step. Each rank casts its vote at the end of a
step, in a small all-reduce that runs while the next step computes; at the end of that one everybody
reads the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from utils.distributed import World


class Votes(NamedTuple):
    """True where this rank, or in a result any rank, says so.

    stop: a signal asked the run to stop. save: it is time for a checkpoint.
    busy: the last checkpoint is still being written. give_up: too many saves have failed.
    """

    stop: bool = False
    save: bool = False
    busy: bool = False
    give_up: bool = False


class Agreement:
    """Votes of all ranks; costs one all-reduce of four bytes per step, beside the computation."""

    def __init__(self, world: World) -> None:
        # A group of its own: its operations overlap with those of the step.
        self._group = None if world.world_size == 1 else dist.new_group(backend="gloo")
        self._pending: tuple[dist.Work | None, Tensor] | None = None

    def cast(self, votes: Votes) -> None:
        """Say what this rank wants; the result is for the end of the next step."""
        assert self._pending is None, "result() comes before the next cast()"
        ballot = torch.tensor(votes, dtype=torch.uint8)
        work = None
        if self._group is not None:
            work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, ballot)

    def result(self) -> Votes:
        """What any rank said in the last cast; nothing before the first."""
        if self._pending is None:
            return Votes()
        work, ballot = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        return Votes(*(bool(vote) for vote in ballot.tolist()))

    def now(self, wish: bool) -> bool:
        """Whether any rank wishes so; all ranks call it together and wait for each other."""
        ballot = torch.tensor([wish], dtype=torch.uint8)
        if self._group is not None:
            dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group)
        return bool(ballot)
