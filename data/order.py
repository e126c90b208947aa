"""The order of training: which image when, on which rank, flipped or not.

Pure functions of (seed, epoch); nothing is materialized, nothing has a state. A keyed permutation
of range(n) is evaluated at the positions asked for, so starting at any step of any epoch costs the
same, for ten images or for forty-two million, and the order knows nothing about ranks or workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8  # 4 already pass the tests of uniformity at small n; twice that is still cheap
# Different purposes draw from different streams of one seed.
_SHUFFLE, _FLIP = 1, 2


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), on a Python integer below 2**64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; every part and its position matter."""
    key = 0
    for part in parts:
        key = _mix(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return key


def hash_indices(indices: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """A keyed 64-bit hash per index: the same finalizer, vectorized. uint64, shape of `indices`.

    key: one for all, or uint64 of the same shape.
    """
    keys = np.uint64(key) if isinstance(key, int) else key
    x = np.asarray(indices).astype(np.uint64) ^ keys
    x = x * np.uint64(_GOLDEN) + (keys >> np.uint64(32))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled_indices(positions: np.ndarray, num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The images at these positions of an epoch's order: a permutation of range(num_images).

    positions: int64 [k], each in [0, num_images). Returns int64 [k]. A Feistel network on pairs
    (left, right) of a rectangle just larger than num_images; a value that falls outside goes
    round again until it falls inside (cycle walking), which keeps it a permutation.
    """
    positions = np.asarray(positions, dtype=np.int64)
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: there is nothing to order; give 1 or more")
    if positions.size and not (positions.min() >= 0 and positions.max() < num_images):
        raise ValueError(
            f"positions reach from {positions.min()} to {positions.max()}, allowed are 0 to "
            f"{num_images - 1}: positions count the images of one epoch"
        )
    height = math.isqrt(num_images - 1) + 1
    width = -(-num_images // height)
    keys: list[int | np.ndarray] = [
        derive_key(_SHUFFLE, seed, epoch, round_) for round_ in range(_ROUNDS)
    ]
    images = _permute(positions.astype(np.uint64), height, width, keys)
    outside = np.flatnonzero(images >= num_images)
    while len(outside):
        images[outside] = _permute(images[outside], height, width, keys)
        outside = outside[images[outside] >= num_images]
    return images.astype(np.int64)


def shuffled_within(positions: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Element i of a permutation of range(sizes[i]) that belongs to keys[i]; one per element.

    positions: int64 [k], in [0, sizes); sizes: int64 [k], 1 or more; keys: uint64 [k].
    Returns int64 [k]. For many small orders at once: blocks, classes, passes through a set.
    """
    sizes = np.asarray(sizes, np.int64)
    height = np.maximum(np.ceil(np.sqrt(sizes)).astype(np.int64), 1)
    width = -(-sizes // height)
    rounds = [hash_indices(keys, derive_key(_SHUFFLE, round_)) for round_ in range(_ROUNDS)]
    x = np.asarray(positions, np.int64).astype(np.uint64)
    limit, rows, columns = (v.astype(np.uint64) for v in (sizes, height, width))
    todo = np.arange(len(x))
    while len(todo):
        part: list[int | np.ndarray] = [each[todo] for each in rounds]
        x[todo] = _permute(x[todo], rows[todo], columns[todo], part)
        todo = todo[x[todo] >= limit[todo]]
    return x.astype(np.int64)


def _permute(
    x: np.ndarray,
    height: int | np.ndarray,
    width: int | np.ndarray,
    keys: Sequence[int | np.ndarray],
) -> np.ndarray:
    """A permutation of range(height * width): uint64 [k] to uint64 [k].

    The hash is reduced before it is added, so no sum wraps around 2**64 and each round stays a
    rotation, which is what makes it invertible.
    """
    rows, columns = np.uint64(height), np.uint64(width)
    left: np.ndarray = x // columns
    right: np.ndarray = x % columns
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + hash_indices(right, key) % rows) % rows
        else:
            right = (right + hash_indices(left, key) % columns) % columns
    return left * columns + right


def uniform(indices: np.ndarray, *key: int) -> np.ndarray:
    """A draw in [0, 1) per index, float64 of its shape: a function of index and key only."""
    return (hash_indices(indices, derive_key(*key)) >> np.uint64(11)) * 2.0**-53


def flip_mask(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Which images are mirrored in this epoch: bool, shape of `indices`, true for half of them.

    A function of the image, not of its position, so it survives any other order or rank count.
    """
    return (hash_indices(indices, derive_key(_FLIP, seed, epoch)) >> np.uint64(63)).astype(bool)


def steps_per_epoch(num_images: int, global_batch: int, drop_last: bool = True) -> int:
    """Global batches in an epoch; what does not fill one is dropped, or is a smaller last one."""
    return num_images // global_batch if drop_last else -(-num_images // global_batch)


def batch_positions(
    step: int, rank: int, world_size: int, batch_size: int, num_images: int
) -> np.ndarray:
    """Positions of one rank's rows of global batch `step`: int64 [batch_size].

    Global batch g holds the positions from g * B to (g + 1) * B, with B = batch_size * world_size;
    rank r takes rows r * batch_size onwards. A smaller last batch is shared out evenly, so that
    with fewer images than ranks in it some ranks get none.
    """
    begin = step * batch_size * world_size
    rows = max(0, min(batch_size * world_size, num_images - begin))
    return np.arange(
        begin + rows * rank // world_size, begin + rows * (rank + 1) // world_size, dtype=np.int64
    )
