"""Initial class centers as a function of (seed, class index) only.

The same run on 1 or 8 ranks starts with the same centers. Centers are drawn in blocks of a fixed
size, each block from its own seed and always on the CPU, so neither the sharding nor the device
changes a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcshard.random import hash_key

CLASSES_PER_BLOCK = 256
STANDARD_DEVIATION = 0.01  # as the published head; only the direction matters to the loss


def init_centers(
    weight: Tensor, first_class: int, seed: int, columns: range | None = None, width: int = 0
) -> None:
    """Writes initial centers of classes first_class, first_class + 1, ... into `weight`.

    Args:
        weight: [num_classes_local, D], any floating dtype and device; written in place. On the meta
            device nothing is drawn.
        first_class: Global index of row 0.
        seed: Seed of the run.
        columns: Features that `weight` holds, where it does not hold all of them.
        width: Number of all features; 0 means the columns of `weight`.
    """
    if weight.is_meta:
        return
    columns = range(weight.shape[1]) if columns is None else columns
    width = width or weight.shape[1]
    generator = torch.Generator()
    end = first_class + weight.shape[0]
    for block in range(first_class // CLASSES_PER_BLOCK, -(-end // CLASSES_PER_BLOCK)):
        generator.manual_seed(hash_key(seed, block))
        rows = torch.randn(CLASSES_PER_BLOCK, width, generator=generator)
        rows = rows[:, columns.start : columns.stop]
        start = block * CLASSES_PER_BLOCK
        low, high = max(start, first_class), min(start + CLASSES_PER_BLOCK, end)
        with torch.no_grad():
            weight[low - first_class : high - first_class].copy_(
                rows[low - start : high - start] * STANDARD_DEVIATION
            )
