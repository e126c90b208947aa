"""Orders of an epoch: which image stands at which position.

An order is a function of (seed, epoch, position) that needs no state and no list, so any position
of any epoch costs the same. It does not depend on ranks, batches or workers; `batch_positions` in
data/order.py divides the positions among ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from data.order import derive_key, hash_indices, shuffled_indices, shuffled_within

# Different purposes draw from different streams of one seed; data/order.py has 1 and 2.
_BLOCKS, _SHIFT, _IN_WINDOW, _SHARE, _CLASS, _GROUPS = 3, 4, 5, 6, 7, 8


class Sampler(ABC):
    """Gives the images at positions of an epoch when called; `len` is the positions of one epoch.

    Attributes:
        num_positions: Number of positions of an epoch.
        window_size: Number of positions that share a window, 0 without windows.
    """

    window_size = 0

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions

    def __len__(self) -> int:
        return self.num_positions

    @abstractmethod
    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """Returns the image numbers at some positions.

        Args:
            positions: [k] int64 in [0, len(order)).
            epoch: Number of the epoch.

        Returns:
            [k] int64.
        """

    def window(self, position: int, epoch: int) -> list[tuple[int, int]]:
        """Returns the ranges of images (begin, end) that make up the window of `position`."""
        return []


class SequentialSampler(Sampler):
    """The images in the order of the set."""

    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """See Sampler."""
        return positions


class RandomSampler(Sampler):
    """Every image once per epoch, in a random order of the whole set."""

    def __init__(self, num_images: int, seed: int) -> None:
        super().__init__(num_images)
        self._seed = seed

    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """See Sampler."""
        return shuffled_indices(positions, self.num_positions, self._seed, epoch)


class BlockShuffleSampler(Sampler):
    """Every image once per epoch, read in blocks of neighbors: for spinning or network disks.

    The set is a ring, cut at a random place per epoch into blocks. The blocks come in random order,
    and images are shuffled within windows of several blocks. So a window's images are read from
    that many places. Two images that are close in the file share a window far more often than by
    chance (always, within a block). If the classes of a set lie together in the file, shuffle it on
    disk once (scripts/shuffle_rec.py).

    Args:
        num_images: Number of images.
        seed: Seed of the run.
        block: Images per block.
        window_blocks: Blocks per window.
    """

    def __init__(self, num_images: int, seed: int, block: int, window_blocks: int = 64) -> None:
        super().__init__(num_images)
        self._seed, self._block = seed, min(block, num_images)
        self._blocks = num_images // self._block  # whole blocks; the rest makes the last window
        self.window_size = self._block * min(window_blocks, self._blocks)

    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """See Sampler."""
        positions = np.asarray(positions, np.int64)
        begin, size = self._window_of(positions)
        key = derive_key(_IN_WINDOW, self._seed, epoch)
        within = begin + shuffled_within(positions - begin, size, hash_indices(begin, key))
        place = within // self._block
        whole = place < self._blocks
        blocks = np.where(whole, place, 0)
        order = shuffled_indices(blocks, self._blocks, derive_key(_BLOCKS, self._seed), epoch)
        images = np.where(whole, order * self._block + within % self._block, within)
        return (images + self._shift(epoch)) % self.num_positions

    def window(self, position: int, epoch: int) -> list[tuple[int, int]]:
        """Returns the blocks of the window of `position`; see Sampler."""
        begins, sizes = self._window_of(np.array([position]))
        begin, end = int(begins[0]), int(begins[0] + sizes[0])
        shift, ranges = self._shift(epoch), []
        key = derive_key(_BLOCKS, self._seed)
        for first in range(begin, end, self._block):
            at = first
            if first // self._block < self._blocks:
                place = np.array([first // self._block])
                at = int(shuffled_indices(place, self._blocks, key, epoch)[0]) * self._block
            length = min(self._block, end - first)
            at = (at + shift) % self.num_positions
            ranges.append((at, min(at + length, self.num_positions)))
            if at + length > self.num_positions:  # the block wraps around the ring
                ranges.append((0, at + length - self.num_positions))
        return ranges

    def _window_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        window = self.window_size
        whole = self._blocks * self._block
        begin = positions // window * window
        begin = np.where(positions >= whole, whole, begin)
        end = np.where(positions >= whole, self.num_positions, np.minimum(begin + window, whole))
        return begin, end - begin

    def _shift(self, epoch: int) -> int:
        return derive_key(_SHIFT, self._seed, epoch) % self.num_positions


class WeightedSampler(Sampler):
    """Several sets, each with its share of the epoch; an epoch is as long as the sets together.

    A set continues in the next epoch where it stopped in this one: every image of it comes once
    before any comes again, in a new random order for each pass.

    Args:
        sizes: Images of each set, numbered one set after the other.
        weights: Relative shares.
        seed: Seed of the run.

    Attributes:
        shares: [sets] int64, images of each set per epoch.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        total = sum(sizes)
        super().__init__(total)
        self._seed = seed
        exact = np.asarray(weights, np.float64) / sum(weights) * total
        shares = np.floor(exact).astype(np.int64)
        largest_rest = np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]
        shares[largest_rest] += 1
        self.shares = shares
        self._sizes = np.asarray(sizes, np.int64)
        self._first_image = np.cumsum(self._sizes) - self._sizes
        self._ends = np.cumsum(shares)

    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """See Sampler."""
        draws = shuffled_indices(positions, self.num_positions, self._seed, epoch)
        which = np.searchsorted(self._ends, draws, side="right")
        shares, sizes = self.shares[which], self._sizes[which]
        stream = epoch * shares + draws - (self._ends[which] - shares)
        rounds, place = stream // sizes, stream % sizes
        key = derive_key(_SHARE, self._seed)
        keys = hash_indices(rounds, hash_indices(which, key))
        return self._first_image[which] + shuffled_within(place, sizes, keys)


class ClassBalancedSampler(Sampler):
    """Every class equally often, in groups of `samples_per_class` images of one class.

    A batch of P * samples_per_class images therefore holds P groups. Every class has the same
    number of groups in an epoch, as many as make it about as long as the set, at least one. A class
    goes through its images in a new random order for each pass. A group contains an image twice
    only if its class has fewer than `samples_per_class`, and then it contains all of them.

    Args:
        labels: [images] integers; classes without an image are left out.
        samples_per_class: Images per group.
        seed: Seed of the run.
    """

    def __init__(self, labels: np.ndarray, samples_per_class: int, seed: int) -> None:
        kind = np.int32 if len(labels) < 2**31 else np.int64
        self._members = np.argsort(labels, kind="stable").astype(kind)  # images, class by class
        counts = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
        present = np.flatnonzero(counts)
        self._counts = counts[present]
        self._first = np.cumsum(self._counts) - self._counts
        self._per_group, self._seed = samples_per_class, seed
        group_row = len(present) * samples_per_class
        self._groups_per_class = max(1, len(labels) // max(group_row, 1))
        super().__init__(self._groups_per_class * group_row)

    def __call__(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        """See Sampler."""
        positions = np.asarray(positions, np.int64)
        group, member = positions // self._per_group, positions % self._per_group
        num_groups = self.num_positions // self._per_group
        key = derive_key(_GROUPS, self._seed)
        drawn = shuffled_indices(group, num_groups, key, epoch)
        num_classes = len(self._counts)
        cls, nth = drawn % num_classes, drawn // num_classes
        counts = self._counts[cls]
        # A round of a class is as many whole groups as its images fill, at least one; the images
        # left over come in another round, so no group sees two rounds.
        groups_per_round = np.maximum(counts // self._per_group, 1)
        nth_ever = epoch * self._groups_per_class + nth
        rounds = nth_ever // groups_per_round
        place = (nth_ever % groups_per_round * self._per_group + member) % counts
        keys = hash_indices(rounds, hash_indices(cls, derive_key(_CLASS, self._seed)))
        return self._members[self._first[cls] + shuffled_within(place, counts, keys)].astype(
            np.int64
        )
