"""Blocks, shares and classes: orders without a state, complete and as random as they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import derive_key, hash_indices, shuffled_within
from data.sampling import (
    BlockShuffleSampler,
    ClassBalancedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedSampler,
)

LABELS = np.repeat(np.arange(12), [3, 5, 8, 0, 1, 40, 9, 2, 30, 4, 8, 6])
LABELS = LABELS[np.random.default_rng(0).permutation(len(LABELS))]
ORDERS: dict[str, Sampler] = {
    "in order": SequentialSampler(97),
    "shuffled": RandomSampler(97, 5),
    "blocks": BlockShuffleSampler(97, 5, 4, 3),
    "shares": WeightedSampler([60, 37], [1, 2], 5),
    "classes": ClassBalancedSampler(LABELS, 4, 5),
}


def whole(order: Sampler, epoch: int) -> np.ndarray:
    return order(np.arange(len(order)), epoch)


@pytest.mark.parametrize("name", ORDERS)
def test_any_positions_of_any_epoch_give_the_same_images(name: str) -> None:
    order = ORDERS[name]
    for epoch in (0, 1, 7):
        some = np.array([len(order) - 1, 0, 17, 17, 50])
        assert np.array_equal(order(some, epoch), whole(order, epoch)[some])
        assert order(some, epoch).dtype == np.int64
        assert len(order(some[:0], epoch)) == 0


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "in order"])
def test_orders_change_with_the_epoch(name: str) -> None:
    order = ORDERS[name]
    assert (whole(order, 0) == whole(order, 1)).mean() < 0.3


@settings(max_examples=80)
@given(
    n=st.integers(1, 300),
    block=st.integers(1, 40),
    windows=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_blocks_show_every_image_once_and_windows_know_where_from(
    n: int, block: int, windows: int, epoch: int
) -> None:
    order = BlockShuffleSampler(n, 1, block, windows)
    images = whole(order, epoch)
    assert np.array_equal(np.sort(images), np.arange(n))
    whole_blocks = n // min(block, n) * min(block, n)
    windows_begin = [*range(0, whole_blocks, order.window_size), whole_blocks, n]
    for begin, end in itertools.pairwise(windows_begin):
        for position in {begin, end - 1} if begin < end else ():
            ranges = order.window(position, epoch)
            known = np.concatenate([np.arange(low, high) for low, high in ranges])
            assert np.array_equal(np.sort(images[begin:end]), np.sort(known))


def test_a_window_of_blocks_is_few_places_and_well_mixed_inside() -> None:
    order = BlockShuffleSampler(100_000, 3, 100, 10)
    images = order(np.arange(3000, 4000), 2)  # one window
    assert len(order.window(3000, 2)) <= 11
    assert len(np.unique((images - order._shift(2)) // 100 % 1000)) == 10
    places = np.argsort(np.argsort(images))
    assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.1


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data())
def test_shares_are_exact_and_no_image_comes_again_before_all_have_come(
    sizes: list[int], data: st.DataObject
) -> None:
    weights = [data.draw(st.floats(0.05, 10)) for _ in sizes]
    order = WeightedSampler(sizes, weights, 9)
    total = sum(sizes)
    assert len(order) == total == order.shares.sum()
    exact = np.array(weights) / sum(weights) * total
    assert (np.abs(order.shares - exact) < 1).all()
    counts = np.zeros(total, int)
    ends = np.cumsum(sizes)
    for epoch in range(4):
        images = whole(order, epoch)
        which = np.searchsorted(ends, images, side="right")
        assert np.array_equal(np.bincount(which, minlength=len(sizes)), order.shares)
        counts += np.bincount(images, minlength=total)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            assert counts[begin:end].max() - counts[begin:end].min() <= 1


def test_equal_shares_of_equal_sets_show_every_image_once() -> None:
    order = WeightedSampler([50, 50], [3, 3], 1)
    assert np.array_equal(np.sort(whole(order, 4)), np.arange(100))


@pytest.mark.parametrize("per_class", [1, 2, 4, 7])
def test_classes_come_equally_often_in_groups_of_one_class(per_class: int) -> None:
    order = ClassBalancedSampler(LABELS, per_class, 2)
    seen = np.zeros(len(LABELS), int)
    for epoch in range(6):
        images = whole(order, epoch)
        seen += np.bincount(images, minlength=len(LABELS))
        groups = LABELS[images].reshape(-1, per_class)
        assert (groups == groups[:, :1]).all()
        counts = np.bincount(groups[:, 0], minlength=12)
        assert set(counts.tolist()) == {0, len(groups) // 11}  # class 3 has no image
        for group in images.reshape(-1, per_class):
            size = (LABELS[group[0]] == LABELS).sum()
            assert len(set(group.tolist())) == min(per_class, size)
    small = LABELS == 1  # 5 images: every one of them is used, about equally often
    assert seen[small].min() > 0


def test_an_epoch_of_classes_is_about_as_long_as_the_set() -> None:
    labels = np.repeat(np.arange(50), 20)
    assert len(ClassBalancedSampler(labels, 4, 0)) == 1000
    assert len(ClassBalancedSampler(np.arange(10), 4, 0)) == 40  # at least one group of each class


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_many_permutations_at_once_are_permutations(seed: int, sizes: list[int]) -> None:
    owner = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    keys = hash_indices(owner, derive_key(seed))
    images = shuffled_within(positions, np.array(sizes)[owner], keys)
    for i, size in enumerate(sizes):
        assert np.array_equal(np.sort(images[owner == i]), np.arange(size))


@pytest.mark.parametrize("n", [2, 5, 12])
def test_in_many_permutations_every_image_is_as_likely_everywhere(n: int) -> None:
    draws = 3000
    keys = hash_indices(np.repeat(np.arange(draws), n), derive_key(1))
    images = shuffled_within(np.tile(np.arange(n), draws), np.full(draws * n, n), keys)
    counts = np.zeros((n, n))
    np.add.at(counts, (np.tile(np.arange(n), draws), images), 1)
    expected = draws / n
    freedom = (n - 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_forty_two_million_images_cost_no_list() -> None:
    n = 42_474_557
    shares = WeightedSampler([n // 2, n - n // 2], [1, 3], 1)
    for order in (RandomSampler(n, 1), BlockShuffleSampler(n, 1, 1024), shares):
        images = order(np.arange(n - 256, n), 17)
        assert len(np.unique(images)) == 256
        assert images.min() >= 0
        assert images.max() < n
