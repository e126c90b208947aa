"""The global batch of a head: gathered, checked, and the same verdict on every rank.

A rank whose own batch does not fit still takes part in the collective, with a mark instead of
its rows: every rank stops, none waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.collectives import Group, gather_labels, gather_rows, max_over_ranks

PAD_LABEL = -(1 << 40)  # marks rows that only fill a ragged batch; no user's label
POISON_LABEL = PAD_LABEL - 1  # sent by a rank whose batch does not fit, so that all ranks stop


@dataclass
class GlobalBatch:
    """Rows of all ranks in rank order, each rank padded to the same number.

    Attributes:
        embeddings: [B, D]; labels: [B] int64; is_real: [B] boolean, False for filling rows;
        has_unknown: boolean scalar, some label is outside the classes (CUDA only: a CPU raises).
    """

    embeddings: Tensor
    labels: Tensor
    is_real: Tensor
    has_unknown: Tensor


@dataclass(frozen=True)
class BatchGatherer:
    """What a batch must look like, and who brings one."""

    embedding_size: int
    num_classes: int
    batch_size_per_rank: int | None
    rank: int
    group: Group

    def capacity(self, rows: int, device: torch.device) -> int:
        """Rows per rank in the gathered batch.

        Raises:
            ValueError: no rank brings a row.
        """
        if self.batch_size_per_rank is not None:
            return self.batch_size_per_rank
        capacity = max_over_ranks(rows, self.group, device)
        if capacity == 0:
            raise ValueError("the global batch is empty: at least one rank must bring a row")
        return capacity

    def gather(self, embeddings: Tensor, labels: Tensor, dtype: torch.dtype) -> GlobalBatch:
        """The global batch in `dtype`.

        Raises:
            ValueError: on every rank, if any rank's batch does not fit (labels on CPUs only).
        """
        problem = self._problem(embeddings, labels)
        device = embeddings.device
        if problem:
            embeddings = torch.zeros(1, self.embedding_size, dtype=dtype, device=device)
            labels = torch.full((1,), POISON_LABEL, device=device)
        capacity = self.capacity(embeddings.shape[0], device)
        everyone, labels = gather_rows(
            embeddings.to(dtype), labels.to(torch.int64), PAD_LABEL, capacity, self.group
        )
        if problem:
            raise ValueError(problem)
        unknown = self.unknown(labels)
        if device.type == "cpu":
            self._refuse_unknown(labels, unknown, capacity)
        return GlobalBatch(everyone, labels, labels != PAD_LABEL, unknown.any())

    def gather_labels(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The global batch's labels alone, [B] int64, PAD_LABEL where a rank brings fewer rows.

        For a head that needs no other rank's embeddings; errors as `gather`'s.
        """
        problem = self._problem(embeddings, labels)
        device = embeddings.device
        if problem:
            labels = torch.full((1,), POISON_LABEL, device=device)
        capacity = self.capacity(len(labels), device)
        everyone = gather_labels(labels.to(torch.int64), PAD_LABEL, capacity, self.group)
        if problem:
            raise ValueError(problem)
        if device.type == "cpu":
            self._refuse_unknown(everyone, self.unknown(everyone), capacity)
        return everyone

    def unknown(self, labels: Tensor) -> Tensor:
        """[B] boolean: labels of rows that name no class."""
        return (labels != PAD_LABEL) & ((labels < 0) | (labels >= self.num_classes))

    def _problem(self, embeddings: Tensor, labels: Tensor) -> str:
        """What does not fit about this rank's batch, or an empty string."""
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
            "mend the set"
        )


@torch.no_grad()
def mean_pairwise_cosine(unit: Tensor, is_real: Tensor) -> Tensor:
    """How alike different rows of a batch are: 0 as random ones, 1 all the same.

    The mean cosine of two different rows, at least 0; by the norm of the sum of n unit rows it is
    (|sum|^2 - n) / (n (n - 1)). Fewer than two rows are not alike. O(B D), no collective, no wait
    for the device: of the gathered batch every rank works out the same number.

    Args:
        unit: [B, D] rows of length 1. is_real: [B] boolean, False for filling rows.

    Returns:
        Scalar in [0, 1]; NaN if a row is not finite.
    """
    real = is_real.to(unit.dtype)
    count = real.sum()
    squared = (real @ unit.detach()).square().sum()
    mean = ((squared - count) / (count * (count - 1)).clamp_min(1)).clamp(0, 1)
    return mean * (count > 1)  # a single row's length is 1 but for its rounding
