"""Every loader gives each rank its share of one order, and names the file when data is bad."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch

from data.augment import normalize_images
from data.datasets import (
    DataError,
    FolderDataset,
    MissingDataError,
    RecordDataset,
    SyntheticDataset,
)
from data.decode import ImageError, decode_image, empty_pixels
from data.order import flip_mask
from data.prefetch import OrderedPrefetch
from data.recordio import RecordError, pack_record
from dataset import get_dataloader
from tests.record_helpers import (
    NUM_CLASSES,
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


def test_a_batch_is_uint8_channels_last_with_int64_labels(records: Path) -> None:
    images, labels = next(iter(loader(records)))
    assert images.shape == (4, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64


def test_folder_and_records_hold_the_same_images_and_labels(folder: Path, records: Path) -> None:
    from_folder = contents(loader(folder, 5, flip=False))
    assert from_folder == contents(loader(records, 5, flip=False))
    assert len(set(from_folder)) == NUM_IMAGES
    assert collections.Counter(label for _, label in from_folder) == dict.fromkeys(range(5), 9)


def test_pixels_are_those_of_the_file_in_rgb(folder: Path) -> None:
    batch = next(iter(loader(folder, 1, shuffle=False, flip=False)))
    bgr = cv2.imread(str(folder / "person_0" / "0.jpg"))
    assert bgr is not None
    difference = batch.images[0].permute(1, 2, 0).numpy().astype(int) - bgr[:, :, ::-1]
    assert abs(difference).max() <= 2  # two JPEG decoders


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_the_result_does_not_depend_on_the_number_of_workers(
    records: Path, num_workers: int
) -> None:
    assert contents(loader(records, num_workers=num_workers)) == contents(loader(records))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(
    records: Path, world_size: int
) -> None:
    whole = loader(records, 12)
    ranks = [
        loader(records, 12 // world_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    for epoch in range(3):
        for each in (whole, *ranks):
            each.set_epoch(epoch)
            assert len(each) == 3
            assert each.num_images_dropped_per_epoch == 9
        for alone, *together in zip(whole, *ranks, strict=True):
            assert torch.equal(alone.images, torch.cat([b.images for b in together]))
            assert torch.equal(alone.labels, torch.cat([b.labels for b in together]))


def test_every_image_is_seen_at_most_once_per_epoch_and_the_order_changes(records: Path) -> None:
    each = loader(records, 8, flip=False)
    epochs = []
    for epoch in range(3):
        each.set_epoch(epoch)
        epochs.append(contents(each))
        assert len(set(epochs[-1])) == len(epochs[-1]) == 40
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_drop_last_every_image_is_seen_and_ranks_stay_in_step(records: Path) -> None:
    ranks = [
        loader(records, 11, rank=r, world_size=4, drop_last=False, flip=False) for r in range(4)
    ]
    assert [len(each) for each in ranks] == [2, 2, 2, 2]
    seen = [content for each in ranks for content in contents(each)]
    assert len(set(seen)) == NUM_IMAGES == len(seen)
    assert [len(list(each)[1].labels) for each in ranks] == [0, 0, 0, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_can_start_at_any_step(records: Path, num_workers: int) -> None:
    each = loader(records, num_workers=num_workers)
    each.set_epoch(2)
    whole = contents(each)
    each.set_epoch(2, start_step=7)
    assert contents(each) == whole[7 * 4 :]
    each.set_epoch(2, start_step=len(each))
    assert contents(each) == []
    with pytest.raises(ValueError, match="start_step=12"):
        each.set_epoch(2, start_step=12)


def test_flips_are_the_mirror_images_that_the_mask_names(records: Path) -> None:
    plain, flipped = loader(records, 9, flip=False), loader(records, 9)
    plain.set_epoch(1)
    flipped.set_epoch(1)
    for step, (a, b) in enumerate(zip(plain, flipped, strict=True)):
        mask = flip_mask(flipped.indices(1, step), 3, 1)
        for row, flip in enumerate(mask):
            expected = a.images[row].flip(2) if flip else a.images[row]
            assert torch.equal(b.images[row], expected)


def test_without_shuffle_the_order_is_that_of_the_set(records: Path) -> None:
    labels = torch.cat([batch.labels for batch in loader(records, 5, shuffle=False)])
    assert torch.equal(labels, torch.arange(NUM_CLASSES).repeat_interleave(PER_CLASS))


def test_synthetic_images_are_functions_of_their_index() -> None:
    a, b = SyntheticDataset(10, 100, 32), SyntheticDataset(10, 100, 32)
    for i in (0, 7, 99):
        assert np.array_equal(a.read(i)[0], b.read(i)[0])
        assert a.read(i)[1] == b.read(i)[1]
    assert {a.read(i)[1] for i in range(100)} == set(range(10))
    assert not np.array_equal(a.read(0)[0], a.read(1)[0])
    each = loader("synthetic", num_classes=10, num_images=100)
    assert (each.num_images, each.num_classes) == (100, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalizing_rounds_only_the_result(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    images = every.contiguous(memory_format=torch.channels_last)
    exact = (images.double() - 127.5) / 127.5
    result = normalize_images(images, dtype)
    assert torch.equal(result, exact.to(dtype))
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == torch.uint8


# ---------------------------------------------------------------- what is wrong, and where


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_corrupt_image_is_an_error_in_its_place_that_names_file_and_record(
    tmp_path: Path, num_workers: int
) -> None:
    images = [(jpeg(i), 0.0) for i in range(40)]
    images[25] = (images[25][0][:200], 0.0)
    root = write_set(tmp_path, images)
    begin = time.perf_counter()
    each = loader(root, num_workers=num_workers, shuffle=False)
    error, seen = collect_error(each)
    assert isinstance(error, ImageError)
    assert "train.rec: record with key 25 at byte" in str(error)
    assert seen == 6
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_record_damaged_on_disk_is_an_error_that_names_it(
    tmp_path: Path, num_workers: int
) -> None:
    root = write_set(tmp_path, [(jpeg(i), 0.0) for i in range(20)], "1,24,24\n")
    offset = int(RecordDataset(root, input_size=SIZE).offsets[9])
    with open(root / "train.rec", "r+b") as file:
        file.seek(offset)
        file.write(b"damaged!")
    error, _ = collect_error(loader(root, num_workers=num_workers, shuffle=False))
    assert isinstance(error, RecordError)
    assert f"train.rec: record with key 9 at byte {offset}: expected the magic" in str(error)


def test_a_truncated_file_is_found_before_training(tmp_path: Path) -> None:
    root = write_set(tmp_path, [(jpeg(i), 0.0) for i in range(20)])
    size = (root / "train.rec").stat().st_size
    for cut in (size - 4, size // 2):
        with open(root / "train.rec", "r+b") as file:
            file.truncate(cut)
        with pytest.raises(RecordError, match="cut off"):
            loader(root)


def test_stopping_early_ends_the_threads(records: Path) -> None:
    before = set(threading.enumerate())
    each = loader(records, 1, num_workers=3)
    for _ in each:
        break
    started = set(threading.enumerate()) - before
    del each
    for thread in started:
        thread.join(5)
    assert set(threading.enumerate()) <= before


def test_an_interrupt_ends_a_process_that_waits_for_data() -> None:
    program = (
        "import os, signal, sys, threading\n"
        "from data.prefetch import OrderedPrefetch\n"
        "from tests.helpers import wait_until\n"
        "main, has_ended = threading.main_thread().ident, threading.Event()\n"
        "def main_waits():\n"
        "    frame = sys._current_frames()[main]\n"
        "    names = (frame.f_code.co_name, frame.f_back.f_code.co_name)\n"
        "    return names == ('wait', 'result')\n"
        "def load(step):\n"
        "    wait_until(main_waits)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    if has_ended.wait(20): print('interrupted while it waited')\n"
        "try:\n"
        "    for _ in OrderedPrefetch(load, range(2), 1): pass\n"
        "finally:\n"
        "    has_ended.set()\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=30
    )
    assert "KeyboardInterrupt" in done.stderr
    assert done.stdout == "interrupted while it waited\n"


def test_prefetching_keeps_order_and_bounds_what_is_ahead() -> None:
    """Every third result is there only after the one that is due next."""
    started: list[int] = []
    done = [threading.Event() for _ in range(40)]

    def load(step: int) -> int:
        started.append(step)
        if step % 3 == 0 and step < 39:
            assert done[step + 1].wait(20)
        done[step].set()
        return step

    ahead = []
    for result in OrderedPrefetch(load, range(40), num_workers=3, ahead=2):
        ahead.append(len(started) - result)
    assert sorted(started) == list(range(40))
    assert max(ahead) <= 6


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (7, "label 7; allowed are whole numbers from 0 to 4"),
        (-1, "label -1; allowed"),
        (1.5, "label 1.5; allowed"),
        (float("nan"), "label nan; allowed"),
        (float("inf"), "label inf; allowed"),
        (2.0**25, "exact only up to 16777216"),
    ],
)
def test_a_label_outside_the_range_names_label_and_record(
    tmp_path: Path, label: float, message: str
) -> None:
    root = write_set(tmp_path, [(jpeg(0), 0.0), (jpeg(1), label)], "5,24,24\n")
    error, _ = collect_error(loader(root, 2, num_workers=2))
    assert isinstance(error, DataError)
    assert message in str(error)
    assert "train.rec: record with key 1 at byte" in str(error)


def test_classes_are_counted_where_property_is_missing(records: Path, tmp_path: Path) -> None:
    root = write_set(tmp_path, [(jpeg(i), float(label)) for i, label in enumerate((0, 3, 6))])
    assert RecordDataset(root).num_classes == 7
    assert RecordDataset(records, input_size=SIZE).num_classes == 5
    assert RecordDataset(records / "train.rec", input_size=SIZE).num_classes == 5


def test_the_class_of_several_labels_is_the_first(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        writer.write(0, pack_record(jpeg(0), (2, 9)))
    assert RecordDataset(tmp_path, input_size=SIZE).read(0)[1] == 2


@pytest.mark.parametrize("kind", ["folder", "records"])
def test_too_few_classes_is_an_error_before_training(
    kind: str, folder: Path, records: Path
) -> None:
    root = {"folder": folder, "records": records}[kind]
    with pytest.raises(DataError, match=r"num_classes=4, but .* has 5 classes. Set num_classes=5"):
        loader(root, num_classes=4)
    assert loader(root, num_classes=8).num_classes == 8


@pytest.mark.parametrize("missing", ["train.rec", "train.idx"])
def test_a_missing_file_is_an_error_that_says_what_to_do(missing: str, tmp_path: Path) -> None:
    root = write_set(tmp_path, [(jpeg(0), 0.0)])
    (root / missing).unlink()
    with pytest.raises(MissingDataError, match=rf"{missing} does not exist.*scripts/pack\.py"):
        loader(root, 1)
    assert issubclass(MissingDataError, FileNotFoundError)


def test_a_missing_or_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="is not a folder"):
        loader(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no class folder in it"):
        loader(tmp_path)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(DataError, match="empty_class: no image in this class folder"):
        loader(tmp_path)


def test_files_that_are_no_images_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(1))
        (tmp_path / name / "notes.txt").write_text("text")
    source = FolderDataset(tmp_path, input_size=SIZE)
    assert (len(source), source.class_names) == (2, ["a", "b"])
    assert "2 entries in class folders are no images" in caplog.text


def test_an_image_of_another_size_is_an_error_that_names_it(folder: Path) -> None:
    with pytest.raises(DataError, match=r"\.jpg: an image of 24 x 24 .* takes 112 x 112.*--size"):
        next(iter(get_dataloader(folder, 2)))


@pytest.mark.parametrize(
    ("stated", "remedy"),
    [("112,112", r"Set input_size=112, or pack the set again: .*--size 24"), ("24,32", "Pack the")],
)
def test_a_property_of_another_size_is_an_error_before_training(
    tmp_path: Path, stated: str, remedy: str
) -> None:
    root = write_set(tmp_path, [(jpeg(0), 0.0)], f"1,{stated}\n")
    words = (
        rf"property: .* {stated.replace(',', ' x ')} pixels; the network takes 24 x 24\. {remedy}"
    )
    with pytest.raises(DataError, match=words):
        loader(root, 1)


def test_folders_and_pipes_named_as_images_are_left_out_when_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a" / "9.jpg").mkdir(parents=True)
    os.mkfifo(tmp_path / "a" / "8.jpg")  # to read it would wait for ever
    (tmp_path / "a" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    assert FolderDataset(tmp_path, input_size=SIZE).files == ["1.jpg", "2.jpg"]
    assert "2 entries in class folders are no images" in caplog.text
    (tmp_path / "b" / "9.jpg").mkdir(parents=True)
    with pytest.raises(DataError, match="b: no image in this class folder"):
        FolderDataset(tmp_path)


@pytest.mark.parametrize("target", ["nowhere.jpg", "2.jpg"])  # the second is a circle
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_read_is_an_error_that_names_it_and_the_reason(
    tmp_path: Path, target: str, num_workers: int
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(jpeg(1))
    (tmp_path / "a" / "2.jpg").symlink_to(target)
    error, seen = collect_error(loader(tmp_path, 1, shuffle=False, num_workers=num_workers))
    assert isinstance(error, ImageError)
    assert re.search(r"a/2\.jpg: cannot be read \((No such file|Too many levels)", str(error))
    assert seen == 1


def test_a_class_folder_that_cannot_be_listed_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"{folder}: cannot be listed \(Permission denied\)"):
        FolderDataset(folder)


def test_pinned_batches_keep_their_layout_and_are_pinned_by_the_workers(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[tuple[tuple[int, ...], str]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append((tuple(tensor.shape), threading.current_thread().name))
        return tensor.clone(memory_format=torch.contiguous_format)  # pinning need not keep strides

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    expected = list(loader(records))
    assert pinned == []
    for a, b in zip(loader(records, num_workers=1, pin_memory=True), expected, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.images.stride() == b.images.stride()
    assert {shape for shape, _ in pinned} == {(4, SIZE, SIZE, 3), (4,)}
    assert all(thread.startswith("data") for _, thread in pinned)


def test_pinning_without_cuda_is_refused(records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="PyTorch sees none here: set pin_memory=False"):
        loader(records, pin_memory=True)


def test_a_global_batch_larger_than_the_set_is_an_error(records: Path) -> None:
    with pytest.raises(DataError, match=r"global batch of 64 .* more than the 45 images"):
        loader(records, 32, rank=1, world_size=2)


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"num_images": 5}])
def test_synthetic_needs_both_counts(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="needs both"):
        loader("synthetic", **options)


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"num_workers": -1}])
def test_impossible_numbers_are_refused(records: Path, options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="allowed are batch_size of 1 or more"):
        loader(records, **options)


def test_another_number_of_images_than_stated_is_logged(
    records: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loader(records, num_images=100).num_images == NUM_IMAGES
    assert "has 45 images, not 100 as stated" in caplog.text


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_every_format_decodes_to_rgb_and_no_truncation_passes(suffix: str) -> None:
    image = np.zeros((32, 20, 3), np.uint8)
    image[:, :, 0] = 200  # red
    encoded = cv2.imencode(suffix, image[:, :, ::-1])[1].tobytes()
    decoded = decode_image(encoded, "x")
    assert decoded.shape == (32, 20, 3)
    assert abs(decoded.astype(int) - image).max() < 12
    for length in range(0, len(encoded), 1 + len(encoded) // 60):
        with pytest.raises(ImageError, match=r"^here: "):
            decode_image(encoded[:length], "here")


def test_gray_images_become_rgb() -> None:
    gray = np.full((16, 16, 1), 90, np.uint8)
    decoded = decode_image(simplejpeg.encode_jpeg(gray, colorspace="GRAY"), "gray")
    assert decoded.shape == (16, 16, 3)
    assert abs(decoded.astype(int) - 90).max() <= 1


@pytest.mark.parametrize("size", [112, 96, 128, 160, 224])
def test_no_row_of_pixels_lies_where_the_decoder_would_write_past_the_cache(size: int) -> None:
    source = SyntheticDataset(2, 4, size)
    batch = torch.from_numpy(empty_pixels(3, size, size, 3))
    for pixels in (batch.numpy(), source.read(1)[0][None], decode_image(jpeg(1, size), "x")[None]):
        assert pixels.flags.c_contiguous
        rows = pixels.ctypes.data + np.arange(len(pixels) * size) * size * 3
        assert (rows % 16 == 8).all()


def test_batches_are_decoded_into_such_rows(records: Path) -> None:
    for images, _ in get_dataloader(records, 4, input_size=SIZE, num_workers=2):
        assert images.data_ptr() % 16 == 8


def test_an_image_that_claims_to_be_huge_is_refused_unread() -> None:
    png = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    png[16:24] = (65_500).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match="65500 x 65500 pixels; allowed are 1 to 40,000,000"):
        decode_image(bytes(png), "bomb.png")
    jpg = bytearray(jpeg(1))
    at = jpg.index(b"\xff\xc0")  # start of frame: marker, length, precision, height, width
    jpg[at + 5 : at + 9] = b"\xf0\x00\xf0\x00"
    with pytest.raises(ImageError, match="61440 x 61440"):
        decode_image(bytes(jpg), "bomb.jpg")


@pytest.mark.parametrize("content", [b"", b"text", b"GIF89a" + b"\0" * 50, b"\xff\xd8\xff"])
def test_bytes_that_are_no_image_are_refused(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"^record 5: "):
        decode_image(content, "record 5")
