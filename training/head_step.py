"""What an accelerator does in one optimizer step of a fused head, counted without one.

The head's own code runs on the meta device, whose tensors have shapes and no memory, and takes the
path of an accelerator there. Every operation that starts a kernel is written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from head.work_buffer import Workspace
from partial_fc import PartialFC
from training.trace import Operation, OperationLog

# Blocks are alike. Of more than twice this many the rest is worked out from what the second half of
# these adds to the first: an operation on the meta device takes 0.1 ms, and there can be millions.
FEW_BLOCKS = 16


@dataclass(frozen=True)
class HeadOperations:
    """Operations of a step: `some`, and `factor` times what `more` has beyond `some`."""

    some: Sequence[Operation]
    more: Sequence[Operation]
    factor: float

    def total(self, measure: Callable[[Sequence[Operation]], float]) -> float:
        """Of a measure that adds up over operations, such as their number or their bytes."""
        base = measure(self.some)
        return base + self.factor * (measure(self.more) - base)

    @property
    def launches(self) -> int:
        """Kernels that the host starts."""
        return round(self.total(len))

    @property
    def bytes_moved(self) -> float:
        """Bytes that they read and write."""
        return self.total(lambda operations: sum(op.bytes_moved for op in operations))


def count_head_step(
    make: Callable[[int], PartialFC], num_classes: int, passes: int = 1, is_deferred: bool = False
) -> HeadOperations:
    """The operations of one optimizer step; exact where there are few blocks.

    Args:
        make: gives the head for a number of classes, as `trace_head_step` needs it.
        num_classes: of this rank. passes, is_deferred: as of `trace_head_step`.
    """
    head = make(num_classes)
    assert head.engine is not None
    plan, cost = head.planned_blocks()
    blocks = len(plan.blocks())
    if blocks <= 2 * FEW_BLOCKS:
        return HeadOperations((), trace_head_step(head, passes, is_deferred), 1.0)
    found = []
    for count in (FEW_BLOCKS, 2 * FEW_BLOCKS):
        share = count / blocks
        part = make(math.ceil(num_classes * share))
        assert part.engine is not None
        kept, copied = (
            round(rows * share / plan.rows_per_block) * plan.rows_per_block
            for rows in (plan.kept_rows, plan.copied_rows)
        )
        budget = plan.rows_per_block * cost.work_bytes_per_row + kept * cost.kept_bytes_per_row
        budget += copied * cost.width * cost.element_bytes
        part.engine.workspace = Workspace(budget, head.engine.workspace.work_bytes)
        found.append(trace_head_step(part, passes, is_deferred))
    return HeadOperations(found[0], found[1], (blocks - FEW_BLOCKS) / FEW_BLOCKS)


def trace_head_step(
    head: PartialFC, passes: int = 1, is_deferred: bool = False
) -> list[Operation]:
    """The operations of one optimizer step of `head`, the gathering of the batch included.

    Args:
        head: of one rank, on the meta device, with a `batch_size_per_rank` and a `row_update`.
        passes: micro-batches of the step.
        is_deferred: the centers move in `head.step` rather than in backward; several passes and a
            loss scaler make it so.
    """
    batch = head.batch_size_per_rank
    assert batch is not None
    assert head.row_update is not None
    head.row_update.state(head.weight)  # made once, in the first step
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
