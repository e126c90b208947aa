"""The classes of each rank, as a pure function of (number of classes, rank, world size).

The global weight is [C, K, D] (K centers per class), cut by classes as `Shard(0)` of
torch.distributed.tensor cuts it: ceil(C / n) consecutive classes per rank, so that the last ranks
own fewer or none. 10 classes on 4 ranks are 3, 3, 3, 1. (arcface_torch cuts 3, 3, 2, 2;
training/checkpoint/arcface_torch.py reads its files.)
"""

from __future__ import annotations


def class_range(num_classes: int, rank: int, world_size: int) -> range:
    """Returns the classes that `rank` owns, possibly none.

    Raises:
        ValueError: The rank is outside the world, or there is less than one class.
    """
    if num_classes < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"{num_classes} classes, rank {rank} of {world_size}: at least one class and a rank "
            "in [0, world size) are needed"
        )
    share = -(-num_classes // world_size)
    return range(min(rank * share, num_classes), min((rank + 1) * share, num_classes))
