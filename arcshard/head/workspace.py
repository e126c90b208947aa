"""The memory plan of the fused path: blocks of classes, and what is kept of them.

`choose_workspace` returns the budget and `plan_blocks` the blocks; both are pure functions. The
block that is being computed needs matrices [B, rows] and [rows, D]. The rest of the budget keeps
softmax numerators from the forward to the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arcshard.head.block import LEVEL, logits_are_small
from arcshard.head.centers import ClassCenters
from arcshard.margins.base import Margin

# Share of the budget for the block that is being computed. Large blocks make better matmuls and
# fewer calls; smaller ones leave memory for numerators, which saves a matmul. On a CPU 2,000 to
# 16,000 rows of 512 take the same time, and a sixteenth instead of an eighth of the budget makes
# the resident memory of a step 20 to 25 % smaller (C = 100,000, B = 128). An accelerator needs more
# work per kernel launch: at the bound in bytes, B = 1024 and D = 512, a block has 182,000 classes,
# and a pass over its logits takes 0.3 ms (calculated for an H100), a launch 0.02 ms (measured).
CPU_WORK_SHARE, ACCELERATOR_WORK_SHARE = 1 / 16, 1 / 2
MOST_WORK_BYTES = 2 * 2**30
# "auto" is this share of an accelerator's memory, and AUTO_MIB on a CPU or if it is unknown.
AUTO_SHARE = 1 / 8
AUTO_MIB = 256
# With several blocks, the classes of a block are a multiple of this. Tensor cores need rows of
# matrices to begin at multiples of 16 bytes, which is 8 numbers of bf16; numerators [B, rows] have
# `rows` numbers in a row.
ALIGNED = 8


@dataclass(frozen=True)
class Workspace:
    """Memory that the fused path may use beside class centers, their state and O(B D).

    Attributes:
        budget_bytes: All of the memory.
        work_bytes: The most that the block being computed may take of it.
        note: What the log should say of a size that was asked for and is not used, or "".
    """

    budget_bytes: int
    work_bytes: int
    note: str = ""


def choose_workspace(
    mib: float | str, device_type: str, memory_bytes: int | None = None
) -> Workspace:
    """Chooses the workspace of a head on one device.

    Args:
        mib: Its size in MiB. "auto" is an eighth of an accelerator's memory, which keeps the
            numerators of 2 million classes at a global batch of 1024 on 80 GB, and 256 MiB on a CPU
            or where the memory is unknown. More MiB than the accelerator has count as "auto".
        device_type: "cpu", or the type of an accelerator.
        memory_bytes: Memory of the accelerator, None where it is unknown.
    """
    is_cpu, note = device_type == "cpu", ""
    known = None if is_cpu else memory_bytes
    if known is not None and not isinstance(mib, str) and mib * 2**20 > known:
        note = f"{mib:,.0f} MiB were asked for, the device has {known / 2**20:,.0f}: automatic"
        mib = "auto"
    if isinstance(mib, str):
        mib = AUTO_MIB if known is None else AUTO_SHARE * known / 2**20
    budget = int(mib * 2**20)
    if is_cpu:
        return Workspace(budget, int(budget * CPU_WORK_SHARE))
    work = min(int(budget * ACCELERATOR_WORK_SHARE), MOST_WORK_BYTES)
    return Workspace(budget, work, note)


def memory_bytes_of(device: torch.device) -> int | None:
    """Returns the memory of a CUDA device in bytes, None for other devices."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class BlockCost:
    """Bytes that a row of a step takes beside the centers and their state.

    Attributes:
        work: Bytes of a row of the block that is being computed.
        kept: Bytes of a row whose numerators, one per row of the batch, and norm are kept.
        copied: Bytes of a center's copy, where one is made in the forward pass that backward needs
            again; else 0.
    """

    work: int
    kept: int
    copied: int = 0


@dataclass(frozen=True)
class Plan:
    """How the rows of a step are cut into blocks, and how much of them is kept for backward.

    Attributes:
        num_rows: Number of rows of the step.
        rows_per_block: Number of rows of a block; the last one may have fewer.
        kept_rows: Number of rows, from the first, whose numerators are kept.
        keeps_copies: Whether copies of centers are kept with the numerators, of all rows.
        cost: What a row takes.
    """

    num_rows: int
    rows_per_block: int
    kept_rows: int
    keeps_copies: bool
    cost: BlockCost

    @property
    def kept_bytes_per_row(self) -> int:
        """Bytes that are kept of a row of which anything is kept."""
        return self.cost.kept + self.cost.copied * self.keeps_copies

    @property
    def total_bytes(self) -> int:
        """The most that a step takes: the block being computed, and what is kept."""
        return self.rows_per_block * self.cost.work + self.kept_rows * self.kept_bytes_per_row

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
        ValueError: Not one class of `centers_per_class` rows fits.
    """
    per_class = cost.work * centers_per_class
    budget_bytes = workspace.budget_bytes
    if per_class > budget_bytes:
        raise ValueError(
            f"a workspace of {budget_bytes / 2**20:.3g} MiB does not hold one class, which needs "
            f"{per_class / 2**20:.3g} MiB at this global batch and embedding size; "
            f"head_workspace_mib must be at least {math.ceil(per_class / 2**20)}"
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
    left = budget_bytes - rows * cost.work
    keeps_copies = cost.copied > 0 and left >= num_rows * (cost.kept + cost.copied)
    kept = num_rows if keeps_copies else min(left // cost.kept, num_rows)
    kept = kept if kept == num_rows else kept // rows * rows
    return Plan(num_rows, rows, kept, keeps_copies, cost)


@dataclass
class FusedSettings:
    """The settings of a head's fused path, and the blocks that follow from them.

    Attributes:
        margin: The loss.
        group: Process group of the ranks that share the classes, None for one rank.
        workspace: Budget.
        device: Device of the computation.
        dtype: Working precision.
        operand_dtype: Dtype of the large matmuls' operands: torch.bfloat16, or the working
            precision.
        centers_per_class: K.
        has_kernels: Whether Triton kernels do what is not a plain product.
    """

    margin: Margin
    group: dist.ProcessGroup | None
    workspace: Workspace
    device: torch.device
    dtype: torch.dtype
    operand_dtype: torch.dtype
    centers_per_class: int
    has_kernels: bool = False

    @property
    def divides(self) -> bool:
        """Whether numerators, rather than operands, are divided by |w|."""
        is_full_precision = self.operand_dtype == self.dtype and not self.has_kernels
        return self.margin.normalize and is_full_precision

    @property
    def level(self) -> float:
        """What is subtracted from all logits where `has_small_logits`."""
        return LEVEL if self.divides else 0.0

    @property
    def has_small_logits(self) -> bool:
        """Whether no maximum has to be subtracted, and a class has one center."""
        return self.centers_per_class == 1 and logits_are_small(self.margin)

    @property
    def has_logits_kernel(self) -> bool:
        """Whether a kernel computes numerators without storing logits."""
        return self.has_kernels and self.has_small_logits

    @property
    def has_normalize_kernel(self) -> bool:
        """Whether a kernel makes the operands, so that no rows are read."""
        return self.has_kernels and self.margin.normalize

    def plan(self, centers: ClassCenters, batch: int, width: int) -> Plan:
        """Plans the blocks of a step's rows.

        Args:
            centers: Centers of the step.
            batch: B, the rows of the global batch.
            width: D.

        Raises:
            ValueError: Not one class fits the budget.
        """
        item, operand = self.dtype.itemsize, self.operand_dtype.itemsize
        half = operand if operand < item or self.has_kernels else 0
        copies = item if half and self.device.type == "cpu" else 0  # operands that `matmul` casts
        of_batch: float = half + copies  # numerators
        # Logits, or the sums of each tile of them, which has at least 32 classes.
        of_batch += item / 32 if self.has_logits_kernel else item
        of_batch += 3 * item if self.margin.touches_others else 0  # values, slope, mask
        of_batch += 3 * item if self.centers_per_class > 1 else 0  # best values and their places
        of_width = 2 * item + half + copies  # the gradient, and a part of it or its projection
        reads_copies = centers.reads_copies and not self.has_normalize_kernel
        of_width += item * reads_copies
        # What updating the centers copies.
        of_width += item * centers.rule_matrices * (not self.has_kernels)
        copied = item if reads_copies else half if self.has_normalize_kernel else 0
        cost = BlockCost(
            work=math.ceil(batch * of_batch) + width * of_width + 4 * item,
            kept=batch * operand + item,
            copied=width * copied,
        )
        return plan_blocks(centers.num_rows, cost, self.workspace, self.centers_per_class)
