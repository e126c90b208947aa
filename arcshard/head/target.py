"""The logits of the rows' own classes: O(B D), beside the loop over all other classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.head.block import inverse_norms
from arcshard.head.centers import ClassCenters


@dataclass
class PositiveLogits:
    """What this rank knows of the rows' own classes.

    Attributes:
        column: [B] int64 place of the class among this rank's classes of the step, -1 where another
            rank has the class.
        row: [B] int64 row of the best center of the class; without meaning where another rank has
            it.
        similarity: [B] similarity with that center, 0 where another rank has the class.
        unit_center: [B, D] that center, divided by its norm if the margin normalizes.
        inverse_norm: [B] 1 / norm of that center, 1 if the margin does not normalize.
    """

    column: Tensor
    row: Tensor
    similarity: Tensor
    unit_center: Tensor
    inverse_norm: Tensor

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
        return PositiveLogits(
            column, column.clamp_min(0), zeros, torch.zeros_like(unit_embeddings), zeros
        )
    rows = column.clamp_min(0)[:, None] * k + torch.arange(k, device=column.device)  # [B, k]
    own = centers.read_rows(rows.view(-1))  # [B k, D]
    inverse = inverse_norms(own) if normalize else own.new_ones(batch * k)
    own = (own * inverse[:, None]).view(batch, k, width)
    similarity = torch.einsum("bd,bkd->bk", unit_embeddings, own)
    bias = centers.read_bias_rows(rows.view(-1))
    if bias is not None:
        similarity = similarity + bias.view(batch, k)
    similarity, best = similarity.max(dim=1, keepdim=True)
    return PositiveLogits(
        column=column,
        row=rows.gather(1, best).squeeze(1),
        similarity=torch.where(column >= 0, similarity.squeeze(1), 0.0),
        unit_center=own.gather(1, best[:, :, None].expand(-1, 1, width)).squeeze(1),
        inverse_norm=inverse.view(batch, k).gather(1, best).squeeze(1),
    )


class PositiveLogitsGradient:
    """The target's part of the centers' gradient, one entry per class.

    Rows of one class are summed first, in a fixed order. The entries that are scattered into the
    blocks have no duplicates, so an accelerator computes the same sums each time.

    Args:
        target: What this rank knows of the rows' own classes.
        coefficient: [B] gradient with respect to the target's similarity, 0 where another rank has
            the class.
        unit_embeddings: [B, D] embeddings, divided by their norms if the margin normalizes.
        num_rows: Number of rows of the step.
    """

    def __init__(
        self, target: PositiveLogits, coefficient: Tensor, unit_embeddings: Tensor, num_rows: int
    ) -> None:
        row = torch.where(target.here, target.row, num_rows)  # other ranks' rows sort to the end
        row, order = torch.sort(row, stable=True)
        is_first = torch.ones_like(row, dtype=torch.bool)
        is_first[1:] = row[1:] != row[:-1]
        entry = (torch.cumsum(is_first, 0) - 1,)
        coefficient = coefficient[order]
        per_row = (coefficient * target.inverse_norm[order])[:, None] * unit_embeddings[order]
        self.rows = torch.full_like(row, num_rows).scatter_(0, entry[0], row)  # [B], ascending
        # [B, D], already divided by |w| once, as the numerators of a block are
        self.gradient = torch.zeros_like(per_row).index_put_(entry, per_row, accumulate=True)
        self.bias = torch.zeros_like(coefficient).index_put_(entry, coefficient, accumulate=True)

    def add_to(self, start: int, gradient: Tensor, bias_gradient: Tensor | None) -> None:
        """Adds the entries of rows start, start + 1, ... to the gradients of a block.

        Args:
            start: First row of the block.
            gradient: [rows, D], written in place.
            bias_gradient: [rows], written in place, or None.
        """
        stop = start + gradient.shape[0]
        if gradient.device.type == "cpu":
            low, high = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
            if low == high:
                return
            place = self.rows[low:high] - start
            _add(gradient, place, self.gradient[low:high])
            if bias_gradient is not None:
                _add(bias_gradient, place, self.bias[low:high])
            return
        # Without waiting for the device: entries are distinct rows in order, so those in the
        # block lie side by side and are at most as many as it has rows. The others add zero.
        low = torch.searchsorted(self.rows, start)
        count = min(len(self.rows), stop - start)
        entry = low + torch.arange(count, device=gradient.device)
        inside = entry < len(self.rows)
        entry = entry.clamp_max(len(self.rows) - 1)
        inside &= self.rows[entry] < stop
        place = (self.rows[entry] - start).clamp(0, stop - start - 1)
        gradient.index_add_(0, place, torch.where(inside[:, None], self.gradient[entry], 0.0))
        if bias_gradient is not None:
            bias_gradient.index_add_(0, place, torch.where(inside, self.bias[entry], 0.0))


def _add(into: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds values to distinct rows; index_add_ costs far more for a few of them (CPU)."""
    into.index_copy_(0, rows, into.index_select(0, rows).add_(values))
