"""The classes that take part in a step (PartialFC, An et al. 2022, arXiv:2203.15565).

A sample holds all positives of the batch, and random negatives fill it up to S. The negatives are a
prefix of a keyed pseudorandom permutation of the shard's classes: distinct by construction, O(S) in
time and memory, with no random number and no sort per class. The key is a hash of (seed, rank,
step), so a step's sample can be drawn again from three numbers.

Everything stays on the device of the labels. Shapes depend on (C, r, B) only, so on CUDA there is
no wait for the device, except where r x C_local is smaller than the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcshard.random import hash_key

ROUNDS = 8  # rounds of the Feistel network; 4 suffice in theory, small domains need a few more


def columns_of(classes: Tensor, local_labels: Tensor) -> Tensor:
    """Finds the column of each local label in a sample.

    Args:
        classes: [S] int64, ascending local classes.
        local_labels: [B] int64 in [0, C_local), or -1 for labels of other ranks.

    Returns:
        [B] int64, -1 for labels of other ranks and for labels that are not in the sample.
    """
    if len(classes) == 0:
        return torch.full_like(local_labels, -1)
    position = torch.searchsorted(classes, local_labels.clamp_min(0))
    position = position.clamp_max(len(classes) - 1)
    found = (local_labels >= 0) & (classes[position] == local_labels)
    return torch.where(found, position, -1)


def sample_size(num_classes_local: int, sample_rate: float) -> int:
    """Returns round(r x C_local), halves up: the size of a sample unless it has more positives."""
    return min(num_classes_local, math.floor(sample_rate * num_classes_local + 0.5))


def draw_sample(
    local_labels: Tensor,
    num_classes_local: int,
    sample_rate: float,
    seed: int,
    rank: int,
    step: int,
) -> Tensor:
    """Draws all positives plus random negatives, S = max(#positives, round(r x C_local)) classes.

    Args:
        local_labels: [B] int64 labels of the global batch in this rank's numbering; -1 where
            another rank owns the class.
        num_classes_local: C_local, the number of classes that this rank owns.
        sample_rate: r in [0, 1].
        seed: Seed of the run.
        rank: This rank.
        step: Number of the draw. The same seed, rank and step give the same permutation.

    Returns:
        [S] int64, ascending local classes.
    """
    device = local_labels.device
    size = sample_size(num_classes_local, sample_rate)
    if num_classes_local == 0:
        return torch.empty(0, dtype=torch.int64, device=device)

    # Positives, ascending, each once; labels of other ranks are pushed past the end.
    positives = torch.where(local_labels >= 0, local_labels, num_classes_local).sort().values
    is_first = torch.ones_like(positives, dtype=torch.bool)
    is_first[1:] = positives[1:] != positives[:-1]
    is_first &= positives < num_classes_local
    most_positives = min(len(positives), num_classes_local)
    if size < most_positives:
        # The only wait for the device; on the meta device there are no labels to count.
        size = most_positives if positives.is_meta else max(size, int(is_first.sum()))

    candidates = permutation_prefix(
        num_classes_local, size, key=hash_key(seed, rank, step), device=device
    )
    usable = candidates < num_classes_local
    if len(positives):
        nearest = torch.searchsorted(positives, candidates).clamp_max(len(positives) - 1)
        usable &= positives[nearest] != candidates
    pool = torch.cat([positives, candidates])
    # Stable: positives first, then negatives in the permutation's order, leftovers last.
    unusable = ~torch.cat([is_first, usable])
    order = torch.argsort(unusable.to(torch.uint8), stable=True)
    return pool[order[:size]].sort().values


def permutation_prefix(
    domain: int, length: int, *, key: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Computes the first elements of a pseudorandom permutation of range(domain), in O(length).

    It is a Feistel network on pairs (left, right) with left < a, right < b, a b >= domain. Fewer
    than a values of the product lie past the domain. The prefix is longer by that many, so at least
    `length` of its elements are below `domain`.

    Args:
        domain: Number of elements of the permutation, at least 1.
        length: Number of elements needed.
        key: Key of the permutation.
        device: Device of the result.

    Returns:
        [length + fewer than sqrt(domain) + 1] int64, distinct. The caller skips values >= domain.
    """
    a = max(1, math.isqrt(domain - 1) + 1)
    b = -(-domain // a)
    count = min(length + (a * b - domain), a * b)
    position = torch.arange(count, dtype=torch.int64, device=device)
    left, right = position // b, position % b
    for round_index in range(ROUNDS):
        round_key = hash_key(key, round_index)
        if round_index % 2 == 0:
            left = (left + _mix(right, round_key)) % a
        else:
            right = (right + _mix(left, round_key)) % b
    return left * b + right


def _mix(values: Tensor, key: int) -> Tensor:
    """Hashes whole numbers into [0, 2^31); int64 arithmetic wraps around, which is intended."""
    state = (values ^ (key & 0x7FFFFFFF)) * 0x2545F4914F6CDD1D + (key >> 31)
    state = (state ^ ((state >> 32) & 0xFFFFFFFF)) * 0x369DEA0F31A53F85
    return (state >> 33) & 0x7FFFFFFF
