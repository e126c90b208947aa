"""The global batch of a head: gathered from all ranks and checked.

A rank whose own batch does not fit still takes part in the collective. It sends one row with
POISON_LABEL instead of its rows, so that no rank waits for ever: on CPUs all ranks raise, on CUDA
the loss of the other ranks is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.collectives import Group, gather_labels, gather_rows, max_over_ranks

PAD_LABEL = -(1 << 40)  # marks padding rows of a ragged batch; no user has this label
POISON_LABEL = PAD_LABEL - 1  # sent by a rank whose batch does not fit


@dataclass
class GlobalBatch:
    """Rows of all ranks in rank order, each rank padded to the same number of rows.

    Attributes:
        embeddings: [B, D] embeddings, zero in padding rows.
        labels: [B] int64 labels, PAD_LABEL in padding rows.
        is_real: [B] boolean, False for padding rows.
        has_unknown: Boolean scalar, True if a label is outside the classes. This occurs on CUDA
            only; on a CPU such a label raises.
    """

    embeddings: Tensor
    labels: Tensor
    is_real: Tensor
    has_unknown: Tensor


@dataclass(frozen=True)
class BatchGatherer:
    """Gathers the global batch and checks what each rank brings.

    Attributes:
        embedding_size: D.
        num_classes: C over all ranks; labels must be in [0, C).
        batch_size_per_rank: Largest number of rows of a rank. With None the ranks agree on it in
            every step.
        rank: This rank in the group.
        group: Process group of the ranks, None for one rank.
    """

    embedding_size: int
    num_classes: int
    batch_size_per_rank: int | None
    rank: int
    group: Group

    def capacity(self, rows: int, device: torch.device) -> int:
        """Returns the number of rows per rank in the gathered batch.

        Args:
            rows: Number of rows that this rank brings.
            device: Device of the collective that finds the maximum over the ranks.

        Raises:
            ValueError: No rank brings a row, and there is no `batch_size_per_rank`.
        """
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank
        capacity = max_over_ranks(rows, self.group, device)
        if capacity == 0:
            raise ValueError("the global batch is empty: at least one rank must bring a row")
        return capacity

    def gather(self, embeddings: Tensor, labels: Tensor, dtype: torch.dtype) -> GlobalBatch:
        """Gathers the global batch in `dtype`.

        Args:
            embeddings: [b, D] floating embeddings of this rank.
            labels: [b] integer labels of this rank.
            dtype: Dtype of the gathered embeddings.

        Raises:
            ValueError: The shape, dtype or size of a rank's batch does not fit, a label is outside
                the classes, or the global batch is empty. On CPUs every rank raises. On CUDA the
                labels are not looked at, and only the rank whose own shape, dtype or size does not
                fit raises.
        """
        if problem := self._problem(embeddings, labels):
            embeddings = embeddings.new_zeros(1, self.embedding_size, dtype=dtype)
            labels = torch.full((1,), POISON_LABEL, device=embeddings.device)
        capacity = self.capacity(len(labels), labels.device)
        everyone, labels = gather_rows(
            embeddings.to(dtype), labels.to(torch.int64), PAD_LABEL, capacity, self.group
        )
        unknown = self._checked(problem, labels, capacity)
        return GlobalBatch(everyone, labels, labels != PAD_LABEL, unknown.any())

    def gather_labels(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers the labels of the global batch, for a head that needs no other rank's embeddings.

        Args:
            embeddings: [b, D] floating embeddings of this rank, which are only checked.
            labels: [b] integer labels of this rank.

        Returns:
            ([B] int64 labels, PAD_LABEL where a rank brings fewer rows; boolean scalar, True if a
            label is outside the classes).

        Raises:
            ValueError: As in `gather`.
        """
        if problem := self._problem(embeddings, labels):
            labels = torch.full((1,), POISON_LABEL, device=labels.device)
        capacity = self.capacity(len(labels), labels.device)
        labels = gather_labels(labels.to(torch.int64), PAD_LABEL, capacity, self.group)
        return labels, self._checked(problem, labels, capacity).any()

    def _checked(self, problem: str, labels: Tensor, capacity: int) -> Tensor:
        """Returns [B] boolean, True for rows that name no class; on a CPU they are refused."""
        if problem:
            raise ValueError(problem)
        unknown = (labels != PAD_LABEL) & ((labels < 0) | (labels >= self.num_classes))
        if labels.device.type == "cpu":
            self._refuse_unknown(labels, unknown, capacity)
        return unknown

    def _problem(self, embeddings: Tensor, labels: Tensor) -> str:
        """Says what does not fit about this rank's batch, or returns an empty string."""
        limit = self.batch_size_per_rank
        if embeddings.dim() != 2 or embeddings.shape[1] != self.embedding_size:
            given, wanted = f"embeddings {list(embeddings.shape)}", f"[b, {self.embedding_size}]"
        elif not embeddings.dtype.is_floating_point:
            given, wanted = f"embeddings of {embeddings.dtype}", "a floating dtype"
        elif labels.dim() != 1 or labels.shape[0] != embeddings.shape[0]:
            given, wanted = f"labels {list(labels.shape)}", f"[{embeddings.shape[0]}]"
        elif labels.dtype.is_floating_point or labels.dtype == torch.bool:
            given, wanted = f"labels of {labels.dtype}", "an integer dtype"
        elif limit is not None and len(labels) > limit:
            given, wanted = f"{len(labels)} rows", f"at most batch_size_per_rank={limit}"
        else:
            return ""
        return f"rank {self.rank} brought {given}; needed: {wanted}"

    def _refuse_unknown(self, labels: Tensor, unknown: Tensor, capacity: int) -> None:
        if bool((labels == PAD_LABEL).all()):
            raise ValueError("the global batch is empty: at least one rank must bring a row")
        if not bool(unknown.any()):
            return
        row = int(torch.nonzero(unknown)[0])
        rank, row_there = divmod(row, capacity)
        if labels[row] == POISON_LABEL:
            raise ValueError(f"rank {rank} brought a batch that does not fit; it says what")
        raise ValueError(
            f"label {int(labels[row])} in row {row_there} of rank {rank}'s batch: labels must be "
            f"in [0, {self.num_classes}); set num_classes to at least the largest label + 1, or "
            "correct the labels"
        )


@torch.no_grad()
def mean_pairwise_cosine(unit: Tensor, is_real: Tensor) -> Tensor:
    """Computes how alike the rows of a batch are: about 0 for random rows, 1 for equal ones.

    The result is the mean cosine over pairs of different rows, clamped to [0, 1]. It follows from
    the norm of the sum of n unit rows as (|sum|^2 - n) / (n (n - 1)). It costs O(B D), no
    collective and no wait for the device: every rank computes the same number from the gathered
    batch.

    Args:
        unit: [B, D] rows of length 1.
        is_real: [B] boolean, False for padding rows.

    Returns:
        Scalar in [0, 1], 0 for fewer than two rows, NaN if a row is not finite.
    """
    real = is_real.to(unit.dtype)
    count = real.sum()
    squared = (real @ unit.detach()).square().sum()
    mean = ((squared - count) / (count * (count - 1)).clamp_min(1)).clamp(0, 1)
    return mean * (count > 1)  # the length of a single row is 1 only up to rounding
