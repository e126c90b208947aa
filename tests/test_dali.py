"""DALI gives our order, our labels and our draws, and names what it cannot decode."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from data.dali import dali_is_installed
from tests.record_helpers import (
    NUM_IMAGES,
    collect_error,
    contents,
    jpeg,
    loader,
    write_set,
)

pytestmark = pytest.mark.skipif(not dali_is_installed(), reason="NVIDIA DALI is not installed")


def both(root: Path | str, batch_size: int, **options) -> tuple[list, list]:
    """The batches of two epochs from our loader and from DALI."""
    results = []
    for dali in (False, True):
        each = loader(root, batch_size, dali=dali, num_workers=1, **options)
        batches = []
        for epoch in (0, 1):
            each.set_epoch(epoch)
            batches += list(each)
        results.append(batches)
    return results[0], results[1]


@pytest.mark.parametrize("flip", [False, True])
def test_dali_gives_the_same_images_in_the_same_order(records: Path, flip: bool) -> None:
    ours, dalis = both(records, 8, flip=flip)
    assert len(ours) == len(dalis) == 10
    for a, b in zip(ours, dalis, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert b.labels.dtype == torch.int64
        assert torch.equal(a.images, b.images)  # both decode with libjpeg-turbo
        assert b.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("crop", 0),
        ("resize", 4),
        ("low_res", 64),
        ("blur", 1),
        ("hsv", 1),
        ("gray", 1),
        ("photometric", 1),
        ("erase", 0),
    ],
)
def test_dali_obeys_the_same_draws(records: Path, name: str, tolerance: int) -> None:
    ours, dalis = both(records, 9, augment=[f"{name}=1"])
    plain, _ = both(records, 9)
    for a, b, c in zip(ours, dalis, plain, strict=True):
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.max() <= tolerance
        assert difference.float().mean() < 2
        assert (a.images != c.images).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_have_equal_counts_and_no_image_comes_twice(records: Path, world_size: int) -> None:
    ranks = [
        loader(records, 4, rank=r, world_size=world_size, dali=True, flip=False, num_workers=1)
        for r in range(world_size)
    ]
    for epoch in range(2):
        seen: collections.Counter = collections.Counter()
        counts = set()
        for each in ranks:
            each.set_epoch(epoch)
            batches = contents(each)
            counts.add(len(batches))
            seen.update(batches)
        assert len(counts) == 1
        assert max(seen.values()) == 1
        assert len(seen) == NUM_IMAGES // (4 * world_size) * 4 * world_size


def test_an_epoch_can_start_anywhere_and_be_left_early(records: Path) -> None:
    each = loader(records, 4, dali=True)
    each.set_epoch(3)
    whole = contents(each)
    for _ in each:
        break
    each.set_epoch(3, start_step=5)
    assert contents(each) == whole[20:]


def test_a_ragged_last_batch_and_an_empty_one_pass(records: Path) -> None:
    ranks = [
        loader(records, 11, rank=r, world_size=4, drop_last=False, flip=False, dali=True)
        for r in range(4)
    ]
    assert len({content for each in ranks for content in contents(each)}) == NUM_IMAGES


@pytest.mark.parametrize("bad", ["truncated", "cut near its end", "garbage", "size", "label"])
@pytest.mark.parametrize("at", [0, 25, 39])
def test_a_bad_image_is_named_in_its_place_or_skipped(tmp_path: Path, bad: str, at: int) -> None:
    images = [(jpeg(i), float(i % 3)) for i in range(40)]
    content, label = images[at]
    images[at] = {
        "truncated": (content[:200], label),
        "cut near its end": (content[:-60] + bytes(60), label),
        "garbage": (b"no image at all", label),
        "size": (jpeg(1, 32), label),
        "label": (content, 7.0),
    }[bad]
    root = write_set(tmp_path, images, "3,24,24\n")
    error, seen = collect_error(loader(root, dali=True, shuffle=False))
    assert f"train.rec: record with key {at} at byte" in str(error)
    assert seen == at // 4
    each = loader(root, dali=True, shuffle=False, flip=False, on_bad_record="skip")
    batches = list(each)
    assert [len(batch.labels) for batch in batches] == [4] * 10
    assert each.num_skipped == 1
    row, step = at % 4, at // 4
    batch = batches[step]
    assert torch.equal(batch.images[row], batch.images[(row + 1) % 4])
    assert batch.labels[row] == batch.labels[(row + 1) % 4] == images[step * 4 + (row + 1) % 4][1]


def test_skipping_with_dali_is_skipping_without(tmp_path: Path) -> None:
    images = [(jpeg(i)[: None if i % 7 else 150], float(i)) for i in range(40)]
    root = write_set(tmp_path, images)
    ours, dalis = both(root, 5, on_bad_record="skip", augment=["crop=0.5"])
    for a, b in zip(ours, dalis, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_synthetic_input_needs_no_decoding_and_ignores_dali() -> None:
    options = {"num_classes": 10, "num_images": 40}
    assert contents(loader("synthetic", dali=True, **options)) == contents(
        loader("synthetic", **options)
    )


def test_labels_beyond_float32_arrive_exactly(tmp_path: Path) -> None:
    wide = 2**24 + 1
    root = write_set(tmp_path, [(jpeg(0), wide), (jpeg(1), wide + 1)], f"{wide + 2},24,24\n")
    batch = next(iter(loader(root, 2, dali=True, shuffle=False)))
    assert np.array_equal(batch.labels.numpy(), [wide, wide + 1])
