"""Cross-entropy on logits whose classes are split over ranks; nothing of size B x C is gathered.

The math is in arcshard/head/cross_entropy.py, which PartialFC's reference path uses too.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arcshard.head.cross_entropy import Spread, sharded_cross_entropy
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.split import Split, check_sizes, is_marked, split_of

Reduction = Literal["mean", "sum", "none"]


class ParallelCrossEntropyLoss(nn.Module):
    """nn.CrossEntropyLoss for class labels, on logits [B, C] or on this rank's columns of them.

    The labels and the rows of the logits are the same on all ranks of the group, and so is the
    loss. The gradient of this rank's logits is computed without a collective.

    Args:
        reduction: "mean" (weighted by `weight`, over labels that are not ignored), "sum" or "none".
        ignore_index: Label of rows that do not count.
        label_smoothing: Share of the target that is spread over all classes, in [0, 1].
        weight: [C] weights of all classes, whole on every rank, or None.
        num_classes: C. Needed where the logits do not come directly from a parallel layer; they are
            then this rank's part of C columns. Otherwise the layer has marked them.
        process_group: Group that belongs to num_classes; None for the default group.

    Raises:
        ValueError: An argument is outside its domain.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        num_classes: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r}: mean, sum or none")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing={label_smoothing!r}: a share in [0, 1]")
        if weight is not None and weight.ndim != 1:
            raise ValueError(f"weight of shape {tuple(weight.shape)}: one number per class, [C]")
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing = float(label_smoothing)
        self.register_buffer("weight", weight)
        self.split: Split | None = None
        if num_classes is not None:
            check_sizes(num_classes=num_classes)
            self.split = Split(1, num_classes, resolve_group(process_group))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss in fp32 at least: a scalar, or [B] for reduction="none".

        Args:
            logits: [B, C], or this rank's columns [B, C_local] where C_local may be 0; floating.
            labels: [B] int64 in [0, C), or ignore_index.

        Raises:
            ValueError: Shapes do not fit, or a label is outside the range. On CUDA, where checking
                labels would wait for the device, the loss is NaN instead.
        """
        split = split_for(logits, labels, self.split)
        num_classes = logits.shape[1] if split is None else split.size
        if self.weight is not None and len(self.weight) != num_classes:
            raise ValueError(
                f"weight has {len(self.weight)} numbers and the logits {num_classes} classes: "
                "give every class one"
            )
        is_ignored = labels == self.ignore_index
        unknown = unknown_labels(labels, num_classes, is_ignored)
        mine = range(num_classes) if split is None else split.mine
        dtype = torch.promote_types(logits.dtype, torch.float32)
        row_weight = torch.ones(len(labels), dtype=dtype, device=logits.device)
        local_weight, total = None, float(num_classes)
        if self.weight is not None:
            row_weight = self.weight.to(dtype)[labels.clamp(0, num_classes - 1)]
            local_weight = self.weight[mine.start : mine.stop].to(dtype)
            total = float(self.weight.sum()) if self.label_smoothing else 0.0
        row_weight = row_weight.masked_fill(is_ignored, 0.0)

        spread = None
        if self.label_smoothing:
            spread = Spread(self.label_smoothing / num_classes, local_weight, total)
        rows = sharded_cross_entropy(
            logits,
            local_columns(labels.masked_fill(is_ignored, -1), mine),
            None if split is None else split.several,
            (1.0 - self.label_smoothing) * row_weight,
            spread,
        )
        rows = rows.masked_fill(is_ignored, 0.0).masked_fill(unknown, torch.nan)
        if self.reduction == "none":
            return rows
        return rows.sum() if self.reduction == "sum" else rows.sum() / row_weight.sum()


def split_for(logits: Tensor, labels: Tensor, named: Split | None) -> Split | None:
    """Finds how logits are split, from the layer's mark or from the loss's arguments.

    Args:
        logits: [B, C], or this rank's columns.
        labels: [B] int64.
        named: The split according to the loss's arguments, or None.

    Returns:
        The split, None for whole logits.

    Raises:
        ValueError: Shapes or dtypes do not fit, or nothing says how the logits are split.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: [B, classes] and [B]; "
            "flatten other dimensions into B"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}: class numbers in int64 (not probabilities)")
    if named is None and not is_marked(logits):
        raise ValueError(
            f"logits of {logits.shape[1]} columns do not say whether they are all classes or a "
            "part: pass a parallel layer's output as it comes, or num_classes=... to the loss"
        )
    split = named if named is not None else split_of(logits)
    if split is not None and logits.shape[1] != len(split.mine):
        raise ValueError(
            f"logits have {logits.shape[1]} columns, but rank {split.rank} of {split.num_parts} "
            f"owns {len(split.mine)} of {split.size} classes"
        )
    return split


def unknown_labels(labels: Tensor, num_classes: int, is_ignored: Tensor) -> Tensor:
    """Finds labels that name no class.

    Args:
        labels: [B] int64.
        num_classes: C.
        is_ignored: [B] boolean, True for rows that do not count.

    Returns:
        [B] boolean, all False on a CPU.

    Raises:
        ValueError: A label names no class, and the labels are on a CPU.
    """
    unknown = ~is_ignored & ((labels < 0) | (labels >= num_classes))
    if labels.device.type == "cpu" and unknown.any():
        row = int(unknown.nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} in row {row} is outside [0, {num_classes}) and is not the "
            "ignored one: correct the labels, or more classes are needed"
        )
    return unknown


def local_columns(labels: Tensor, mine: range) -> Tensor:
    """Returns [B] int64, the column of each label among this rank's classes, else -1."""
    here = (labels >= mine.start) & (labels < mine.stop)
    return torch.where(here, labels - mine.start, -1)
