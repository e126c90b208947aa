"""An epoch shows every image at most once, in an order that knows no ranks and no workers."""

from __future__ import annotations

import numpy as np
import pytest

from data.order import (
    batch_positions,
    derive_key,
    flip_mask,
    hash_indices,
    shuffled_indices,
    steps_per_epoch,
)


def permutation(n: int, seed: int = 1, epoch: int = 0) -> np.ndarray:
    return shuffled_indices(np.arange(n), n, seed, epoch)


def test_the_order_is_a_permutation_for_every_size() -> None:
    for n in [*range(1, 400), 1023, 1024, 1025, 4096, 9999, 65_537]:
        assert np.array_equal(np.sort(permutation(n, seed=n, epoch=n % 5)), np.arange(n)), n


def test_the_order_differs_by_seed_and_by_epoch() -> None:
    orders = [permutation(1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).sum() < 12  # 1 is expected of independent orders


def test_any_subset_of_positions_gives_the_same_images() -> None:
    whole = permutation(12_345)
    some = np.array([12_344, 0, 7, 7, 5000])
    assert np.array_equal(shuffled_indices(some, 12_345, 1, 0), whole[some])


def test_a_place_far_into_a_huge_set_costs_no_memory_of_its_size() -> None:
    n = 42_474_557
    images = shuffled_indices(np.arange(n - 256, n), n, 2048, 19)
    assert len(np.unique(images)) == 256
    assert images.min() >= 0
    assert images.max() < n


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 3, 5, 8, 13, 30])
def test_every_image_is_as_likely_at_every_position(n: int) -> None:
    draws = 600
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), permutation(n, seed)] += 1
    # (n - 1)^2 degrees of freedom; six standard deviations above the mean.
    freedom = (n - 1) ** 2
    assert chi_squared(counts) < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [10, 100])
def test_neighbors_in_the_set_are_not_neighbors_in_the_order(n: int) -> None:
    draws = 800
    steps = np.array(
        [(permutation(n, seed)[1] - permutation(n, seed)[0]) % n for seed in range(draws)]
    )
    counts = np.bincount(steps, minlength=n)[1:]
    assert chi_squared(counts) < (n - 2) + 6 * np.sqrt(2 * (n - 2))


def test_flips_are_half_of_all_and_change_with_seed_and_epoch() -> None:
    indices = np.arange(20_000)
    masks = [flip_mask(indices, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    for i, mask in enumerate(masks):
        assert abs(mask.mean() - 0.5) < 0.02
        assert all(abs((mask == other).mean() - 0.5) < 0.02 for other in masks[:i])


def test_a_flip_depends_on_the_image_not_on_its_company() -> None:
    whole = flip_mask(np.arange(1000), 5, 3)
    some = np.array([999, 4, 500])
    assert np.array_equal(flip_mask(some, 5, 3), whole[some])


def test_flips_and_order_do_not_follow_each_other() -> None:
    order = permutation(20_000, 3, 1)
    first_half = flip_mask(order[:10_000], 3, 1).mean()
    assert abs(first_half - 0.5) < 0.03


@pytest.mark.parametrize("num_images", [7, 24, 100, 1001])
@pytest.mark.parametrize("global_batch", [1, 6, 12, 24])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    num_images: int, global_batch: int
) -> None:
    for drop_last in (True, False):
        steps = steps_per_epoch(num_images, global_batch, drop_last)
        for world_size in (w for w in range(1, 9) if global_batch % w == 0):
            per_rank = global_batch // world_size
            seen = []
            for step in range(steps):
                rows = [
                    batch_positions(step, rank, world_size, per_rank, num_images)
                    for rank in range(world_size)
                ]
                begin = step * global_batch
                whole = np.arange(begin, min(begin + global_batch, num_images))
                assert np.array_equal(np.concatenate(rows), whole)
                seen.append(whole)
            total = np.concatenate(seen) if seen else np.array([])
            expected = num_images // global_batch * global_batch if drop_last else num_images
            assert np.array_equal(total, np.arange(expected))


def test_a_full_global_batch_gives_every_rank_the_same_number_of_rows() -> None:
    for world_size in range(1, 9):
        for rank in range(world_size):
            assert len(batch_positions(3, rank, world_size, 5, 1000)) == 5


@pytest.mark.parametrize(("positions", "n"), [([5], 5), ([-1], 5), ([0], 0)])
def test_positions_outside_the_set_are_refused(positions: list[int], n: int) -> None:
    with pytest.raises(ValueError, match=r"positions|num_images"):
        shuffled_indices(np.array(positions), n, 0, 0)


def test_hashes_of_neighbors_and_of_neighboring_keys_share_no_bits() -> None:
    indices = np.arange(4096)
    for a, b in [
        (hash_indices(indices, derive_key(1)), hash_indices(indices + 1, derive_key(1))),
        (hash_indices(indices, derive_key(1)), hash_indices(indices, derive_key(2))),
    ]:
        differing = np.bitwise_count(a ^ b)
        assert abs(differing.mean() - 32) < 0.5


def test_keys_depend_on_every_part_and_on_its_place() -> None:
    parts = [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (-1, 2), (1, 2 + 2**64 - 1)]
    assert len({derive_key(*p) for p in parts}) == len(parts)
