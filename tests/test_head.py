"""Shards and samples are pure functions that hold for every size."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from arcshard.head.sampling import draw_sample, permutation_prefix, sample_size
from arcshard.random import hash_key
from arcshard.shard import class_range

sizes = st.integers(1, 10**7)
worlds = st.integers(1, 128)


@given(sizes, worlds)
def test_shards_cover_all_classes_once_in_order_as_dtensor_cuts_them(num_classes, world_size):
    ranges = [class_range(num_classes, rank, world_size) for rank in range(world_size)]
    assert ranges[0].start == 0
    assert ranges[-1].stop == num_classes
    assert all(a.stop == b.start for a, b in itertools.pairwise(ranges))
    for rank, mine in enumerate(ranges):
        size, offset = Shard.local_shard_size_and_offset(num_classes, world_size, rank)
        assert (len(mine), mine.start) == (size, offset)


@pytest.mark.parametrize("arguments", [(0, 0, 1), (5, 1, 1), (5, -1, 2), (5, 0, 0)])
def test_a_rank_outside_the_world_is_refused(arguments):
    with pytest.raises(ValueError, match="rank"):
        class_range(*arguments)


@given(st.integers(1, 3000), st.integers(0, 2**62), st.floats(0, 1))
def test_the_prefix_of_the_permutation_is_distinct_and_long_enough(domain, key, share):
    length = int(share * domain)
    prefix = permutation_prefix(domain, length, key=key)
    assert len(prefix.unique()) == len(prefix)
    assert int((prefix < domain).sum()) >= length
    assert len(prefix) <= length + domain**0.5 + 1


@given(
    st.integers(0, 500),
    st.floats(0, 1),
    st.lists(st.integers(-1, 499), max_size=40),
    st.integers(0, 100),
)
def test_a_sample_holds_all_positives_and_has_the_stated_size(classes, rate, labels, step):
    labels = torch.tensor([x if x < classes else -1 for x in labels], dtype=torch.int64)
    sample = draw_sample(labels, classes, rate, seed=1, rank=0, step=step)
    positives = labels[labels >= 0].unique()
    assert len(sample) == max(len(positives), sample_size(classes, rate))
    assert bool(torch.isin(positives, sample).all())
    assert len(sample.unique()) == len(sample)
    assert bool((sample.diff() > 0).all())
    assert len(sample) == 0 or (int(sample.min()) >= 0 and int(sample.max()) < classes)


def test_samples_are_reproducible_and_differ_by_step_rank_and_seed():
    def draw(**changes):
        numbers = {"seed": 1, "rank": 0, "step": 0, **changes}
        return draw_sample(torch.tensor([3]), 1000, 0.1, **numbers)

    assert torch.equal(draw(), draw())
    for changes in ({"step": 1}, {"rank": 1}, {"seed": 2}):
        assert not torch.equal(draw(), draw(**changes))


@pytest.mark.parametrize(("classes", "size"), [(10, 3), (37, 9), (100, 50), (1000, 100)])
def test_negatives_are_uniform(classes, size):
    """Chi-squared over classes, and over neighboring pairs of classes, with fixed seeds."""
    draws = 4000
    counts, pairs = torch.zeros(classes), torch.zeros(classes)
    for step in range(draws):
        chosen = torch.zeros(classes)
        sample = draw_sample(torch.tensor([-1]), classes, size / classes, seed=7, rank=2, step=step)
        chosen[sample] = 1
        counts += chosen
        pairs += chosen * chosen.roll(1)
    share = size / classes
    statistic = float(((counts - draws * share) ** 2).sum() / (draws * share * (1 - share)))
    statistic *= (classes - 1) / classes  # a fixed sample size takes one degree of freedom
    freedom = classes - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5
    both = share * (size - 1) / (classes - 1)
    spread = float(((pairs - draws * both) ** 2).sum() / (draws * both * (1 - both)))
    assert abs(spread - classes) < 6 * (2 * classes) ** 0.5


def test_keys_differ_for_neighboring_numbers():
    keys = {
        hash_key(seed, rank, step) for seed in range(8) for rank in range(8) for step in range(64)
    }
    assert len(keys) == 8 * 8 * 64
