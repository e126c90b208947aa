"""Count what an accelerator does in one optimizer step of a fused head, without an accelerator.

The head's own code runs on the meta device, whose tensors have shapes and no memory, and takes the
path of an accelerator there. Every operation that starts a kernel is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from arcshard.head.workspace import Workspace
from arcshard.partial_fc import PartialFC
from training.planner.trace import Operation, OperationLog

# Blocks are alike, so at most this many are traced one by one: an operation on the meta device
# takes 0.1 ms, and a step can have millions.
MOST_BLOCKS = 8
Tracer = Callable[[PartialFC], Sequence[Operation]]


@dataclass(frozen=True)
class HeadOperations:
    """Operations of a step: those of a shorter one, and what each further block adds.

    Attributes:
        base: Operations of the shorter step.
        further: Pairs of the operations of a step with one more block, and how often that block is
            added.
    """

    base: Sequence[Operation]
    further: Sequence[tuple[Sequence[Operation], int]] = ()

    def total(self, measure: Callable[[Sequence[Operation]], float]) -> float:
        """Return the total of a measure that is additive over operations, such as their bytes."""
        base = measure(self.base)
        return base + sum(times * (measure(more) - base) for more, times in self.further)

    @property
    def launches(self) -> int:
        """Number of operations that start a kernel. A few start more than one, such as sorting."""
        return round(self.total(len))

    @property
    def bytes_moved(self) -> float:
        """Bytes that the operations read and write."""
        return self.total(lambda operations: sum(op.bytes_moved for op in operations))

    @property
    def named_bytes(self) -> float:
        """Bytes of the tensors that are arguments or results (`Operation.named_bytes`)."""
        return self.total(lambda operations: sum(op.named_bytes for op in operations))

    @property
    def flops(self) -> float:
        """Floating-point operations in products."""
        return self.total(lambda operations: sum(op.flops for op in operations))


def count_head_step(
    make: Callable[[int], PartialFC], num_classes: int, trace: Tracer
) -> HeadOperations:
    """Count the operations of one step.

    A step of many blocks is extrapolated from steps of a few. The number of launches is exact. The
    bytes are those of blocks of one size, although the last block is a little smaller. Where no
    smaller head has such blocks, because the batch determines the size of its sample, all blocks
    are traced.

    Args:
        make: Makes the head for a number of classes, on the meta device.
        num_classes: Number of classes of this rank.
        trace: Returns the operations of a step of a head: `trace_head_step`, or a part of it.

    Returns:
        The operations.
    """
    head = make(num_classes)
    plan = head.planned_blocks()
    count, rows = len(plan.blocks()), plan.rows_per_block
    if count <= MOST_BLOCKS or head.sample_rate == 0:
        return HeadOperations(trace(head))
    # There are two kinds of blocks at most: the first ones are kept.
    first = math.ceil(plan.kept_rows / rows)
    numbers = (min(first, 2), min(count - first, 2))

    def of_blocks(first: int, others: int) -> PartialFC | None:
        """Make a head with this many blocks of either kind; None if there is none."""
        classes = math.floor((first + others) * rows / head.centers_per_class / head.sample_rate)
        part = make(classes)
        assert part.fused is not None
        work, kept = rows * plan.cost.work, first * rows * plan.kept_bytes_per_row
        part.fused.workspace = Workspace(work + kept, work)
        found = part.planned_blocks()
        has = [len(found.blocks()), found.rows_per_block, math.ceil(found.kept_rows / rows)]
        same = has == [first + others, rows, first] and found.keeps_copies == plan.keeps_copies
        return part if same else None

    wanted = [(numbers, 1)]
    if first > numbers[0]:
        wanted.append(((numbers[0] + 1, numbers[1]), first - numbers[0]))
    if count - first > numbers[1]:
        wanted.append(((numbers[0], numbers[1] + 1), count - first - numbers[1]))
    parts = [(part, times) for blocks, times in wanted if (part := of_blocks(*blocks)) is not None]
    if len(parts) < len(wanted):
        return HeadOperations(trace(head))
    (base, _), *further = [(trace(part), times) for part, times in parts]
    return HeadOperations(base, further)


def trace_head_step(head: PartialFC, passes: int = 1, is_deferred: bool = False) -> list[Operation]:
    """Trace the operations of one optimizer step of `head`, the gathering of the batch included.

    Args:
        head: The head of one rank, on the meta device, with a `batch_size_per_rank` and a
            `row_optimizer`.
        passes: Micro-batches of the step.
        is_deferred: Whether the centers are updated in `head.step` instead of backward, as with a
            loss scaler. Several passes are always deferred.

    Returns:
        The operations in order.
    """
    batch = head.batch_size_per_rank
    assert batch is not None
    assert head.row_optimizer is not None
    head.row_optimizer.state(head.weight)  # created in the first step only, so not counted
    learning_rate = None if is_deferred or passes > 1 else 0.1
    embeddings = torch.empty(
        batch, head.embedding_size, dtype=head.work_dtype, device="meta", requires_grad=True
    )
    labels = torch.empty(batch, dtype=torch.int64, device="meta")
    bad = torch.empty((), dtype=torch.bool, device="meta")
    with OperationLog() as log:
        if passes > 1:
            head.prepare([labels] * passes)
        for _ in range(passes):
            head(embeddings, labels, learning_rate).backward()
            embeddings.grad = None
        head.step(0.1, bad)
    return log.operations
