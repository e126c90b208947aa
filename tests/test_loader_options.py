"""Every loader and every order keeps ranks in step; bad records stop a run or are counted."""

from __future__ import annotations

import collections
import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from data.concat import ConcatDataset, Subset
from data.datasets import DataError, ImageDataset, RecordDataset
from data.device import prefetch_to_device
from data.recordio import pack_record
from dataset import DATA_ERRORS, Batch, DataLoader
from tests.record_helpers import (
    NUM_IMAGES,
    PER_CLASS,
    SIZE,
    RecordWriter,
    collect_error,
    contents,
    jpeg,
    loader,
    write_set,
)

LOADERS: dict[str, dict] = {
    "consumer": {"num_workers": 0},
    "threads": {"num_workers": 2},
    "blocks": {"shuffle_block": 4},
    "augmented": {"augment": ["dali_aug", "adaface", "erase"]},
}


# ---------------------------------------------------------------- ranks in step


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_ranks_have_equal_counts_and_no_image_comes_twice_in_an_epoch(
    records: Path, name: str, world_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ranks = [
        loader(records, 2, rank=rank, world_size=world_size, **LOADERS[name])
        for rank in range(world_size)
    ]
    steps = NUM_IMAGES // (2 * world_size)
    dropped = NUM_IMAGES - steps * 2 * world_size
    assert f"the last {dropped} images of each epoch's order are left out" in caplog.text
    for epoch in range(3):
        seen: collections.Counter = collections.Counter()
        for each in ranks:
            each.set_epoch(epoch)
            assert len(list(each)) == len(each) == steps
            for step in range(steps):
                seen.update(each.indices(epoch, step).tolist())
        assert max(seen.values()) == 1
        assert len(seen) == NUM_IMAGES - dropped


@pytest.mark.parametrize(
    "options",
    [{"shuffle_block": 5}, {"samples_per_class": 2}, {"weights": [1.0]}, {"augment": ["adaface"]}],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_global_batches_of_every_order_do_not_depend_on_ranks_or_workers(
    records: Path, options: dict, world_size: int
) -> None:
    whole = loader(records, 12, num_workers=3, **options)
    ranks = [
        loader(records, 12 // world_size, rank=r, world_size=world_size, **options)
        for r in range(world_size)
    ]
    for epoch in range(2):
        for each in (whole, *ranks):
            each.set_epoch(epoch, 1)
        for alone, *together in zip(whole, *ranks, strict=True):
            assert torch.equal(alone.images, torch.cat([b.images for b in together]))
            assert torch.equal(alone.labels, torch.cat([b.labels for b in together]))


def test_the_former_worker_processes_are_announced_once_and_threads_make_the_same_batches(
    records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = loader(records, 4, num_workers=2, worker_type="processes")
    assert contents(theirs) == contents(loader(records, 4, num_workers=2))
    said = "worker_type='processes' is no longer available; threads are used"
    assert caplog.messages.count(said) == 1


# ---------------------------------------------------------------- bad records


@pytest.mark.parametrize("at", [0, 13, 47])
@pytest.mark.parametrize("how", ["image", "framing", "label", "size"])
def test_a_bad_record_anywhere_stops_within_seconds_or_is_skipped(
    tmp_path: Path, at: int, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = [(jpeg(i), float(i % 3)) for i in range(48)]
    if how != "framing":
        encoded, label = images[at]
        images[at] = {
            "image": (encoded[:150], label),
            "label": (encoded, 3.0),
            "size": (jpeg(0, 32), label),
        }[how]
    root = write_set(tmp_path, images, "3,24,24\n")
    if how == "framing":
        offset = int(RecordDataset(root, input_size=SIZE).offsets[at])
        with open(root / "train.rec", "r+b") as file:
            file.seek(offset)
            file.write(b"bad!")
    begin = time.perf_counter()
    error, _ = collect_error(loader(root, num_workers=2, shuffle=False))
    assert f"record with key {at} at byte" in str(error)
    assert time.perf_counter() - begin < 10

    ranks = [
        loader(root, 4, rank=r, world_size=2, num_workers=2, on_bad_record="skip") for r in range(2)
    ]
    for epoch in range(2):
        for each in ranks:
            each.set_epoch(epoch)
            assert [len(batch.labels) for batch in each] == [4] * 6
    assert sum(each.num_skipped for each in ranks) == 2
    assert caplog.text.count(f"record with key {at} at byte") >= 2
    assert "bad record skipped (1 so far)" in caplog.text


def test_a_skipped_record_is_replaced_by_the_next_good_one_of_its_batch(tmp_path: Path) -> None:
    images = [(jpeg(i), float(i)) for i in range(8)]
    for i in (1, 2, 7):
        images[i] = (b"bad", float(i))
    root = write_set(tmp_path, images)
    each = loader(root, 4, shuffle=False, flip=False, on_bad_record="skip")
    labels = torch.cat([batch.labels for batch in each])
    assert labels.tolist() == [0, 3, 3, 3, 4, 5, 6, 4]
    batch = each.load(0, 0)
    assert torch.equal(batch.images[1], batch.images[3])


def test_a_batch_without_a_good_image_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    root = write_set(tmp_path, [(b"bad", 0.0)] * 8)
    error, seen = collect_error(loader(root, 4, on_bad_record="skip"))
    assert "none of the 4 images of a batch can be used; the first: " in str(error)
    assert seen == 0


# ---------------------------------------------------------------- several sets, exclusion


def test_joined_sets_have_joined_labels_and_all_images(folder: Path, records: Path) -> None:
    each = loader([records, folder], 5, flip=False, shuffle=False)
    assert (each.num_images, each.num_classes) == (2 * NUM_IMAGES, 10)
    both = contents(each)
    alone = contents(loader(records, 5, flip=False, shuffle=False))
    assert both == alone + [(image, label + 5) for image, label in alone]
    assert each.source.labels().tolist() == [label for _, label in both]
    shuffled = contents(loader([records, folder], 5, flip=False))
    assert collections.Counter(shuffled) == collections.Counter(both)


def test_joined_sets_name_the_file_of_an_error_and_check_the_classes(
    records: Path, tmp_path: Path
) -> None:
    bad = write_set(tmp_path, [(jpeg(0), 0.0), (b"bad", 1.0)])
    error, _ = collect_error(loader([records, bad], 2, shuffle=False, drop_last=False))
    assert f"{bad}/train.rec: record with key 1" in str(error)
    with pytest.raises(DataError, match="num_classes=6, but the joined sets has 7 classes"):
        loader([records, bad], 2, num_classes=6)
    assert loader([records, bad], 2, num_classes=8).num_classes == 8


@pytest.mark.parametrize("num_workers", [0, 2])
def test_weights_are_shares_of_an_epoch(records: Path, folder: Path, num_workers: int) -> None:
    each = loader([records, folder], 5, weights=[2, 1], num_workers=num_workers)
    counts = collections.Counter(label >= 5 for _, label in contents(each))
    assert counts == {False: 60, True: 30}


def test_classes_are_balanced_within_a_batch(tmp_path: Path) -> None:
    labels = [0] * 20 + [1] * 3 + [2] * 7
    root = write_set(tmp_path, [(jpeg(i), float(label)) for i, label in enumerate(labels)])
    each = loader(root, 6, samples_per_class=3, num_workers=2)
    counts: collections.Counter = collections.Counter()
    for batch in each:
        groups = batch.labels.reshape(2, 3)
        assert (groups == groups[:, :1]).all()
        counts.update(batch.labels.tolist())
    assert max(counts.values()) - min(counts.values()) <= 3
    assert each.images_per_epoch == 27


def test_excluded_images_and_classes_never_come(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("# overlap with a test set\nimage 3\n\nclass 1\nimage 44\nimage 45\n")
    each = loader(records, 2, exclude=path, shuffle=False, flip=False)
    left = [*range(2), *range(3, 9), *range(18, 43)]  # keys begin at 1
    assert each.num_images == len(left)
    assert each.num_classes == 5  # classes keep their numbers
    whole = contents(loader(records, 3, shuffle=False, flip=False))
    assert contents(each) == [whole[i] for i in left][: len(left) // 2 * 2]
    assert [each.source.describe(i).split(" at")[0].split()[-1] for i in (1, 2)] == ["2", "4"]


def test_exclusion_from_a_folder_goes_by_names(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("image person_2/4.jpg\nclass person_0\n")
    each = loader(folder, 1, exclude=path, shuffle=False)
    assert each.num_images == NUM_IMAGES - PER_CLASS - 1
    assert "person_2/4.jpg" not in [each.source.describe(i)[-14:] for i in range(each.num_images)]


def test_several_sets_take_one_list_each(records: Path, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("class person_0\n")
    each = loader([records, folder], 1, exclude=[None, path])
    assert each.num_images == 2 * NUM_IMAGES - PER_CLASS
    with pytest.raises(DataError, match="2 sets with 1 exclusion lists"):
        loader([records, folder], 1, exclude=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image 46\n", r"line 1: image '46': no image has this key"),
        ("\nimage x\n", "line 2: image 'x'"),
        ("class 5\n", "line 1: class '5': allowed are 0 to 4"),
        ("label 1\n", "line 1: expected 'image NAME' or 'class NAME', got 'label 1'"),
        ("image\n", "line 1: expected"),
        ("class 0\nclass 1\nclass 2\nclass 3\nclass 4\n", "leaves no image"),
    ],
)
def test_a_wrong_exclusion_list_is_named_by_line(
    records: Path, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        loader(records, exclude=path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist"):
        loader(records, exclude=tmp_path / "nothing.txt")


def test_joined_and_excluding_sources_read_ahead_what_they_own(records: Path) -> None:
    asked: list[tuple[int, int]] = []

    class Asked(RecordDataset):
        def will_need(self, begin: int, end: int) -> None:
            asked.append((begin, end))
            super().will_need(begin, end)

    a, b = Asked(records, input_size=SIZE), Asked(records, input_size=SIZE)
    ConcatDataset([a, b]).will_need(40, 50)
    assert asked == [(40, 45), (0, 5)]


def test_a_block_wise_epoch_asks_for_every_image_ahead(records: Path) -> None:
    asked: set[int] = set()

    class Asked(RecordDataset):
        def will_need(self, begin: int, end: int) -> None:
            asked.update(range(begin, end))

    each = loader(records, 3, shuffle_block=4, num_workers=0)
    each._make.source = Asked(records, input_size=SIZE)
    each._make.order.window_size = 8
    assert len(list(each)) == 15
    assert len(asked) >= NUM_IMAGES - 4


def test_labels_beyond_float32_reach_the_batch(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        for key, label in enumerate((2**24 + 1, 2**24 + 2, 2**24 + 3)):
            writer.write(key, pack_record(jpeg(key), label, key))
    each = loader(tmp_path, 3, shuffle=False)
    assert each.num_classes == 2**24 + 4
    assert next(iter(each)).labels.tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3]


# ---------------------------------------------------------------- wrong options, the device


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": ["blurr"]}, "augment: 'blurr'; allowed are"),
        ({"on_bad_record": "ignore"}, "allowed are 'error' and 'skip'"),
        ({"worker_type": "fibres"}, "worker_type='fibres'"),
        ({"weights": [1, 2]}, "for 1 sets"),
        ({"weights": [-1]}, "one number above 0"),
        ({"samples_per_class": 3}, "batch_size=4 is no multiple of samples_per_class=3"),
        ({"samples_per_class": 2, "shuffle_block": 4}, "each is an order of its own"),
        ({"shuffle": False, "weights": [1]}, "shuffle=False, weights given together"),
    ],
)
def test_wrong_options_are_explained(records: Path, options: dict, message: str) -> None:
    with pytest.raises(DATA_ERRORS, match=message):
        loader(records, **options)


def test_without_dali_its_loader_says_how_to_get_it(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match="pip install nvidia-dali-cuda120"):
        loader(records, dali=True)


def test_on_a_cpu_batches_pass_through_with_their_errors() -> None:
    def batches():
        yield Batch(torch.zeros(1), torch.ones(1))
        raise DataError("the second")

    passing = prefetch_to_device(batches(), torch.device("cpu"))
    assert next(passing).labels.tolist() == [1]
    with pytest.raises(DataError, match="the second"):
        next(passing)


class FakeStream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append("wait")


def test_prefetching_copies_one_ahead_and_delivers_before_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The order of copies, waits and errors, on pretended streams."""
    log: list[str] = []

    class Pretended:
        def __init__(self, number: int) -> None:
            self.number = number

        def __getitem__(self, _: int) -> int:
            return self.number

        def to(self, device: object, non_blocking: bool = False) -> Pretended:
            assert non_blocking
            log.append(f"copy {self.number}")
            return self

        def record_stream(self, stream: object) -> None:
            log.append("record")

    class OneTensor(NamedTuple):
        images: Pretended

    def batches():
        for number in range(3):
            yield OneTensor(Pretended(number))
        raise DataError("the fourth")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    passing = prefetch_to_device(batches(), torch.device("cuda"))
    for number in range(3):
        assert int(next(passing).images[0]) == number
        log.append(f"use {number}")
    with pytest.raises(DataError, match="the fourth"):
        next(passing)
    assert log == [
        "copy 0",
        "wait",
        "record",
        "copy 1",
        "use 0",
        "wait",
        "record",
        "copy 2",
        "use 1",
        "wait",
        "record",
        "use 2",
    ]


def test_sources_are_image_sources(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "exclude.txt"
    path.write_text("image 1\n")
    source = Subset(RecordDataset(records, input_size=SIZE), path)
    assert isinstance(source, ImageDataset)
    assert isinstance(loader(records), DataLoader)
    assert np.array_equal(source.read(0)[0], source.source.read(1)[0])
