"""The classes of each rank, as pure functions of (number of classes, rank, world size).

Every rank owns C // n consecutive classes and the first C % n ranks own one more, as in the
published code. (DTensor's Shard(0) splits differently: 10 rows on 3 ranks are 4, 4, 2 there and 4,
3, 3 here.)
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
    share, rest = divmod(num_classes, world_size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))


def owner(class_index: int, num_classes: int, world_size: int) -> int:
    """Returns the rank that owns a class (the inverse of `class_range`).

    Raises:
        ValueError: The class is outside [0, num_classes).
    """
    if not 0 <= class_index < num_classes:
        raise ValueError(f"class {class_index} is outside [0, {num_classes})")
    share, rest = divmod(num_classes, world_size)
    boundary = rest * (share + 1)
    if class_index < boundary:
        return class_index // (share + 1)
    return rest + (class_index - boundary) // share
