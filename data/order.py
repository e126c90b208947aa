"""The order of training: which image when, on which rank, flipped or not.

All functions are pure functions of (seed, epoch); nothing is materialized and nothing has a state.
A keyed permutation of range(n) is evaluated at the positions asked for. So starting at any step of
any epoch costs the same, for ten images or for forty-two million, and the order does not depend on
ranks or workers.
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
    """Applies splitmix64's finalizer (Steele, Lea, Flood 2014) to a Python integer below 2**64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_key(*parts: int) -> int:
    """Derives one 64-bit key from several integers; every part and its position matter."""
    key = 0
    for part in parts:
        key = _mix(((key ^ (part & _MASK)) + _GOLDEN) & _MASK)
    return key


def hash_indices(indices: np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Computes a keyed 64-bit hash per index, by the same finalizer, vectorized.

    Args:
        indices: Integers of any shape.
        key: One key for all, or uint64 keys of the same shape.

    Returns:
        uint64 of the shape of `indices`.
    """
    keys = np.uint64(key) if isinstance(key, int) else key
    x = np.asarray(indices).astype(np.uint64) ^ keys
    x = x * np.uint64(_GOLDEN) + (keys >> np.uint64(32))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled_indices(positions: np.ndarray, num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Computes the images at some positions of an epoch's order, a permutation of all images.

    It is a Feistel network on pairs (left, right) of a rectangle just larger than num_images. A
    value that falls outside is permuted again until it falls inside (cycle walking), which keeps
    the map a permutation.

    Args:
        positions: [k] int64, each in [0, num_images).
        num_images: Number of images.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        [k] int64 images in [0, num_images).

    Raises:
        ValueError: There is no image, or a position is outside.
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
    """Computes for each i one element of a permutation of range(sizes[i]) with the key keys[i].

    It serves many small orders at once: blocks, classes, passes through a set.

    Args:
        positions: [k] int64, each in [0, sizes[i]).
        sizes: [k] int64, 1 or more.
        keys: [k] uint64.

    Returns:
        [k] int64.
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
    """Permutes range(height * width): uint64 [k] to uint64 [k].

    The hash is reduced before it is added. So no sum wraps around 2**64 and each round stays a
    rotation, which makes it invertible.
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
    """Draws from [0, 1) per index, float64 of its shape, as a function of index and key only."""
    return (hash_indices(indices, derive_key(*key)) >> np.uint64(11)) * 2.0**-53


def flip_mask(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Returns which images are mirrored in this epoch: about half of them.

    It is a function of the image, not of its position, so it stays the same with any other order or
    number of ranks.

    Args:
        indices: Image numbers of any shape.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Boolean of the shape of `indices`.
    """
    return (hash_indices(indices, derive_key(_FLIP, seed, epoch)) >> np.uint64(63)).astype(bool)


def steps_per_epoch(num_images: int, global_batch: int, drop_last: bool = True) -> int:
    """Returns the number of global batches in an epoch.

    Args:
        num_images: Images of an epoch.
        global_batch: Images of a global batch.
        drop_last: Whether images that do not fill a batch are dropped; else they make a smaller
            last batch.
    """
    return num_images // global_batch if drop_last else -(-num_images // global_batch)


def batch_positions(
    step: int, rank: int, world_size: int, batch_size: int, num_images: int
) -> np.ndarray:
    """Returns the positions of one rank's rows of global batch `step`, int64 [batch_size].

    Global batch g holds the positions from g * B to (g + 1) * B, with B = batch_size * world_size;
    rank r takes rows from r * batch_size on. A smaller last batch is divided evenly: if it has
    fewer images than there are ranks, some ranks get none.

    Args:
        step: Number of the global batch in the epoch.
        rank: This rank.
        world_size: Number of ranks.
        batch_size: Images per rank.
        num_images: Images of an epoch.
    """
    begin = step * batch_size * world_size
    rows = max(0, min(batch_size * world_size, num_images - begin))
    return np.arange(
        begin + rows * rank // world_size, begin + rows * (rank + 1) // world_size, dtype=np.int64
    )
