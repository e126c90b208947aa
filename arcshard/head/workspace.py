"""The memory plan of the fused path: blocks of classes, and one buffer for them.

`choose_workspace` returns the budget and `plan_blocks` the blocks; both are pure functions. The
block that is being computed needs matrices [B, rows] and [rows, D]. The rest of the budget keeps
softmax numerators from the forward to the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of the budget for the block that is being computed. Large blocks make better matmuls and
# fewer calls; smaller ones leave room to keep numerators, which saves a matmul. On a CPU 4,000 to
# 16,000 rows of 512 take the same time. An accelerator needs more work per kernel launch: at the
# bound in bytes, B = 1024 and D = 512, a block has 131,000 classes, and a pass over its logits
# takes 0.2 ms where a launch takes 0.008 ms (both calculated for an H100, not measured).
CPU_WORK_SHARE, ACCELERATOR_WORK_SHARE = 1 / 8, 1 / 2
MOST_WORK_BYTES = 2 * 2**30
# "auto" is this share of an accelerator's memory, and AUTO_MIB on a CPU or if it is unknown.
AUTO_SHARE = 1 / 8
AUTO_MIB = 256
# With several blocks, the classes of a block are a multiple of this. Tensor cores need rows of
# matrices to begin at multiples of 16 bytes, which is 8 numbers of bf16; numerators [B, rows] have
# `rows` numbers in a row.
ALIGNED = 8


class WorkspaceTooSmallError(ValueError):
    """The workspace does not hold even one class."""


@dataclass(frozen=True)
class Workspace:
    """Memory that the fused path may use beside class centers, their state and O(B D).

    Attributes:
        budget_bytes: All of the memory.
        work_bytes: The most that the block being computed may take of it.
    """

    budget_bytes: int
    work_bytes: int


def choose_workspace(
    mib: float | str, device_type: str, memory_bytes: int | None = None
) -> Workspace:
    """Chooses the workspace of a head on one device.

    Args:
        mib: Its size in MiB. "auto" is an eighth of an accelerator's memory, which keeps the
            numerators of 2 million classes at a global batch of 1024 on 80 GB, and 256 MiB on a CPU
            or where the memory is unknown.
        device_type: "cpu", or the type of an accelerator.
        memory_bytes: Memory of the accelerator, None where it is unknown.
    """
    is_cpu = device_type == "cpu"
    if isinstance(mib, str):
        known = None if is_cpu else memory_bytes
        mib = AUTO_MIB if known is None else AUTO_SHARE * known / 2**20
    budget = int(mib * 2**20)
    if is_cpu:
        return Workspace(budget, int(budget * CPU_WORK_SHARE))
    return Workspace(budget, min(int(budget * ACCELERATOR_WORK_SHARE), MOST_WORK_BYTES))


def memory_bytes_of(device: torch.device) -> int | None:
    """Returns the memory of a CUDA device in bytes, None for other devices."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class BlockCost:
    """What the rows of a block take beside the centers and their state, in elements and bytes.

    Attributes:
        batch: B, rows of the global batch.
        width: D.
        element_bytes: Bytes of a number in working precision.
        kept_bytes: Bytes of a kept numerator.
        batch_matrices: Number of matrices [B, rows] that the block being computed needs at once.
        width_matrices: Number of matrices [rows, D] that it needs at once.
        reads_copies: Whether reading centers copies them, so that the copies are worth keeping.
    """

    batch: int
    width: int
    element_bytes: int = 4
    kept_bytes: int = 4
    batch_matrices: int = 1
    width_matrices: int = 2
    reads_copies: bool = False

    @property
    def work_bytes_per_row(self) -> int:
        """Bytes per row of the block being computed."""
        per_row = self.batch * self.batch_matrices + self.width * self.width_matrices + 4
        return self.element_bytes * per_row

    @property
    def kept_bytes_per_row(self) -> int:
        """Bytes per row whose numerators, one per row of the batch, and 1 / |w| are kept."""
        return self.batch * self.kept_bytes + self.element_bytes

    def total_bytes(self, plan: Plan) -> int:
        """Returns the most that a step by `plan` takes: the block being computed and kept data."""
        work = plan.rows_per_block * self.work_bytes_per_row
        kept = plan.kept_rows * self.kept_bytes_per_row
        return work + kept + plan.copied_rows * self.width * self.element_bytes


@dataclass(frozen=True)
class Plan:
    """How the rows of a step are cut into blocks, and how much of them is kept for backward.

    Attributes:
        num_rows: Number of rows of the step.
        rows_per_block: Number of rows of a block; the last one may have fewer.
        kept_rows: Number of rows, from the first, whose numerators are kept.
        copied_rows: Number of rows, from the first, whose copied centers are kept.
    """

    num_rows: int
    rows_per_block: int
    kept_rows: int
    copied_rows: int = 0

    def blocks(self) -> list[tuple[int, int]]:
        """Returns (start, stop) of every block, in order."""
        step = self.rows_per_block
        return [(a, min(a + step, self.num_rows)) for a in range(0, self.num_rows, step)]


def plan_blocks(
    num_rows: int, cost: BlockCost, workspace: Workspace, centers_per_class: int = 1
) -> Plan:
    """Plans blocks of whole classes whose work and kept numerators together fit the workspace.

    Args:
        num_rows: Number of rows of the step.
        cost: What a row takes.
        workspace: Budget.
        centers_per_class: Number of consecutive rows of a class.

    Raises:
        WorkspaceTooSmallError: Not one class of `centers_per_class` rows fits.
    """
    per_class = cost.work_bytes_per_row * centers_per_class
    budget_bytes = workspace.budget_bytes
    if per_class > budget_bytes:
        raise WorkspaceTooSmallError(
            f"a workspace of {budget_bytes / 2**20:.3g} MiB does not hold one class: a global "
            f"batch of {cost.batch} and embeddings of {cost.width} need {per_class / 2**20:.3g} "
            f"MiB; head_workspace_mib must be at least {math.ceil(per_class / 2**20)}"
        )
    num_classes = max(1, num_rows // centers_per_class)
    classes = min(max(1, workspace.work_bytes // per_class), num_classes)
    if ALIGNED <= classes < num_classes:
        classes -= classes % ALIGNED
    # Blocks of about one size rather than a small last one.
    num_blocks = -(-num_classes // classes)
    classes = -(-num_classes // num_blocks)
    if num_blocks > 1 and classes >= ALIGNED:
        classes += -classes % ALIGNED
    rows = classes * centers_per_class
    left = budget_bytes - rows * cost.work_bytes_per_row
    kept = _whole_blocks(left // cost.kept_bytes_per_row, rows, num_rows)
    copied = 0
    if cost.reads_copies and kept == num_rows:
        left -= kept * cost.kept_bytes_per_row
        copied = _whole_blocks(left // (cost.width * cost.element_bytes), rows, num_rows)
    return Plan(num_rows, rows, kept, copied)


def _whole_blocks(rows: int, rows_per_block: int, num_rows: int) -> int:
    return num_rows if rows >= num_rows else rows // rows_per_block * rows_per_block


class WorkspaceBuffer:
    """Scratch for the block being computed and space for kept numerators, in one allocation.

    The allocation grows when a plan needs more, and lasts as long as the buffer.

    Args:
        device: Device of the buffer.
        dtype: Working precision.
        kept_dtype: Dtype of kept numerators.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, kept_dtype: torch.dtype) -> None:
        self.device, self.dtype, self.kept_dtype = device, dtype, kept_dtype
        # Products of half-precision operands are allocated by matmul, so they need no scratch.
        self._is_half = kept_dtype != dtype
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)
        self._rows = self._batch = self._width = 0

    def arrange(self, plan: Plan, batch: int, width: int) -> None:
        """Lays the buffer out for a plan; its content is lost.

        Args:
            plan: Plan of the step.
            batch: B.
            width: D.
        """
        self._rows, self._batch, self._width = plan.rows_per_block, batch, width
        item = self.dtype.itemsize
        self._kept_at = 0 if self._is_half else _up(item * self._rows * (batch + width))
        self._norms_at = self._kept_at + _up(plan.kept_rows * batch * self.kept_dtype.itemsize)
        self._copies_at = self._norms_at + _up(plan.kept_rows * item)
        self._copied_rows = plan.copied_rows
        size = self._copies_at + plan.copied_rows * width * item
        if size > self._bytes.numel():
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._bytes = torch.empty(size, dtype=torch.uint8, device=self.device)

    def batch_matrix(self, batch: int, rows: int) -> Tensor | None:
        """Returns scratch [batch, rows], batch at most B; None for half-precision operands."""
        if self._is_half:
            return None
        return self._cut(0, batch * rows, self.dtype).view(batch, rows)

    def width_matrix(self, rows: int) -> Tensor | None:
        """Returns scratch [rows, D]; None for half-precision operands."""
        if self._is_half:
            return None
        start = self.dtype.itemsize * self._rows * self._batch
        return self._cut(start, rows * self._width, self.dtype).view(rows, self._width)

    def kept_numerators(self, start: int, stop: int) -> Tensor:
        """Returns space [B, stop - start] for numerators of rows below the plan's `kept_rows`."""
        at = self._kept_at + start * self._batch * self.kept_dtype.itemsize
        shape = (self._batch, stop - start)
        return self._cut(at, shape[0] * shape[1], self.kept_dtype).view(shape)

    def kept_inverse_norms(self, start: int, stop: int) -> Tensor:
        """Returns space [stop - start] for 1 / |w| of rows below the plan's `kept_rows`."""
        return self._cut(self._norms_at + start * self.dtype.itemsize, stop - start, self.dtype)

    def copied_centers(self, start: int, stop: int) -> Tensor | None:
        """Returns space [stop - start, D] for kept copies, None past the plan's `copied_rows`."""
        if stop > self._copied_rows:
            return None
        at = self._copies_at + start * self._width * self.dtype.itemsize
        return self._cut(at, (stop - start) * self._width, self.dtype).view(-1, self._width)

    def _cut(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        return self._bytes[start : start + count * dtype.itemsize].view(dtype)


def _up(size: int) -> int:
    """Rounds up to a multiple of 8, so that every part can hold doubles."""
    return -(-size // 8) * 8
