"""The logits of the rows' own classes: O(B D), beside the loop over all other classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.head.block import norms_of
from arcshard.head.centers import ClassCenters


@dataclass
class PositiveLogits:
    """What this rank knows of the rows' own classes.

    Attributes:
        column: [B] int64 place of the class among this rank's classes of the step, -1 where another
            rank has the class.
        row: [B] int64 row of the best center of the class, -1 where another rank has the class.
        similarity: [B] similarity with that center, 0 where another rank has the class.
        norm: [B] norm of that center, 1 if the margin does not normalize.
    """

    column: Tensor
    row: Tensor
    similarity: Tensor
    norm: Tensor

    @property
    def here(self) -> Tensor:
        """[B] boolean, True where this rank has the class."""
        return self.column >= 0


def find_positive_logits(
    unit_embeddings: Tensor, column: Tensor, centers: ClassCenters, normalize: bool, k: int
) -> PositiveLogits:
    """Finds each row's own center, the best of its k, and the similarity with it.

    Args:
        unit_embeddings: [B, D] constants, divided by their norms if the margin normalizes.
        column: [B] int64 place of the class among the classes of the step, -1 where another rank
            has the class.
        centers: Centers of the step.
        normalize: Whether the margin normalizes.
        k: Number of centers per class.
    """
    batch, width = unit_embeddings.shape
    if centers.num_rows == 0:
        zeros = unit_embeddings.new_zeros(batch)
        return PositiveLogits(column, column, zeros, torch.ones_like(zeros))
    here = column >= 0
    rows = column.clamp_min(0)[:, None] * k + torch.arange(k, device=column.device)  # [B, k]
    own = centers.read_rows(rows.view(-1))  # [B k, D]
    norm = norms_of(own) if normalize else own.new_ones(batch * k)
    own = (own / norm[:, None]).view(batch, k, width)
    similarity = torch.einsum("bd,bkd->bk", unit_embeddings, own)
    bias = centers.read_bias_rows(rows.view(-1))
    if bias is not None:
        similarity = similarity + bias.view(batch, k)
    similarity, best = similarity.max(dim=1, keepdim=True)
    return PositiveLogits(
        column=column,
        row=torch.where(here, rows.gather(1, best).squeeze(1), -1),
        similarity=torch.where(here, similarity.squeeze(1), 0.0),
        norm=norm.view(batch, k).gather(1, best).squeeze(1),
    )
