"""The entry point to the data: `get_dataloader(...)`.

Order, shards and augmentation are pure functions of (seed, epoch, step, rank); see data/order.py.
Rank and world size are arguments; nothing here asks torch.distributed for them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch

from data.augment import normalize_images, parse_augmentation
from data.collate import BatchLoader, LoadedBatch
from data.concat import ConcatDataset, Subset
from data.crop import RandomResizedCrop, center_crop
from data.datasets import (
    DataError,
    FolderDataset,
    ImageDataset,
    MissingDataError,
    RecordDataset,
    SyntheticDataset,
    check_num_classes,
)
from data.decode import decode_image
from data.device import prefetch_to_device
from data.fingerprint import join_samples
from data.prefetch import OrderedPrefetch
from data.sampling import (
    BlockShuffleSampler,
    ClassBalancedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedSampler,
)
from utils.errors import UserError
from utils.moved import moved

__all__ = [
    "DATA_ERRORS",
    "Batch",
    "DataError",
    "DataLoader",
    "MissingDataError",
    "get_dataloader",
    "normalize_images",
]

log = logging.getLogger(__name__)

__getattr__ = moved(__name__, "data.augment", {"normalise": "normalize_images"})

Root = str | os.PathLike[str]
WORKER_TYPES = ("threads", "processes")
DATA_ERRORS = (UserError,)  # what a damaged or unsuitable data set raises, as `except` takes it
_SKIPS_LOGGED = 20  # bad records that the log names one by one; all are counted


class Batch(NamedTuple):
    """One rank's batch.

    Attributes:
        images: uint8 [b, 3, H, W], RGB, channels_last in memory.
        labels: int64 [b].
    """

    images: torch.Tensor
    labels: torch.Tensor


class Workers(Protocol):
    """What makes batches: threads (here) or DALI (data/dali.py)."""

    def run(self, epoch: int, steps: range) -> Iterator[LoadedBatch]:
        """Yield the batches of these steps, in order."""
        ...


class DataLoader:
    """Iterates over one rank's batches of one epoch; `set_epoch` chooses epoch and first step.

    `len(loader)` is the number of steps in a whole epoch, the same on every rank.

    Attributes:
        num_skipped: Bad records of this rank that on_bad_record="skip" has replaced so far.
    """

    def __init__(
        self, make: BatchLoader, workers: Workers, device: torch.device | None = None
    ) -> None:
        self._make, self._workers, self._device = make, workers, device
        self.source, self.batch_size = make.source, make.batch_size
        self.rank, self.world_size, self.seed = make.rank, make.world_size, make.seed
        self.num_images, self.num_classes = len(make.source), make.source.num_classes
        self.images_per_epoch = len(make.order)
        seen = min(make.num_steps * make.global_batch, self.images_per_epoch)
        self.num_images_dropped_per_epoch = self.images_per_epoch - seen
        self.num_skipped = 0
        self._epoch, self._start_step = 0, 0

    def __len__(self) -> int:
        return self._make.num_steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Let the next iteration yield the batches of `epoch` from `start_step` on, in O(1).

        Raises:
            ValueError: `epoch` is negative, or `start_step` is not in 0..len(self).
        """
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise ValueError(
                f"epoch={epoch}, start_step={start_step}: allowed are epochs from 0 and steps from "
                f"0 to {len(self)}"
            )
        self._epoch, self._start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches(self._epoch, range(self._start_step, len(self)))
        return batches if self._device is None else prefetch_to_device(batches, self._device)

    def _batches(self, epoch: int, steps: range) -> Iterator[Batch]:
        self._make.fetch_ahead(epoch, steps.start, first=True)
        running = self._workers.run(epoch, steps)
        try:
            for loaded in running:
                self._count_skipped(loaded.skipped)
                yield Batch(loaded.images.permute(0, 3, 1, 2), loaded.labels)
        finally:  # also when the consumer stops early or fails
            close = getattr(running, "close", None)
            if close is not None:
                close()

    def _count_skipped(self, reasons: list[str]) -> None:
        for reason in reasons:
            self.num_skipped += 1
            if self.num_skipped <= _SKIPS_LOGGED:  # every rank's log shows errors
                log.error("bad record skipped (%d so far): %s", self.num_skipped, reason)
            elif self.num_skipped % 1000 == 0:
                log.error("%d bad records skipped so far", self.num_skipped)

    def fingerprint(self) -> str:
        """Return a short identifier of the data set.

        Copies of a set have the same one; a set whose sampled content differs has another one.
        """
        return join_samples(self.source.samples())

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Return the indices of the images in this rank's batch, int64 [b], in order."""
        return self._make.indices(epoch, step)

    def load(self, epoch: int, step: int) -> Batch:
        """Read and decode one batch in the calling thread: a pure function of its arguments."""
        loaded = self._make(epoch, step)
        return Batch(loaded.images.permute(0, 3, 1, 2), loaded.labels)

    @property
    def skips_bad_records(self) -> bool:
        """Whether on_bad_record is "skip"."""
        return self._make.skips_bad_records

    def plain_image(self, index: int) -> np.ndarray:
        """Read image `index` without augmentation; where images are cropped, take the center crop.

        Returns:
            uint8 [H, W, 3], RGB.

        Raises:
            DataError: The image does not fit the set.
            RecordError: Its record is damaged.
            ImageError: It cannot be decoded.
        """
        if self._make.crop is None:
            return self.source.read(index)[0]
        encoded, _ = self.source.read_encoded(index)
        picture = decode_image(encoded, self.source.describe(index))
        return center_crop(picture, self.source.input_size)


class _Threads:
    """Threads that each make whole batches; with 0 threads the consumer makes them."""

    def __init__(self, make: BatchLoader, num_workers: int) -> None:
        self._make, self._num_workers = make, num_workers

    def run(self, epoch: int, steps: range) -> Iterator[LoadedBatch]:
        if self._num_workers:
            cv2.setNumThreads(0)  # there is one thread per core; those of OpenCV would compete
        return OrderedPrefetch(lambda step: self._make(epoch, step), steps, self._num_workers)


def get_dataloader(
    root_dir: Root | Sequence[Root],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 2048,
    num_workers: int = 2,
    input_size: int = 112,
    num_classes: int | None = None,
    num_images: int | None = None,
    flip: bool = True,
    shuffle: bool = True,
    drop_last: bool = True,
    pin_memory: bool = False,
    augment: Sequence[str] = (),
    crop: RandomResizedCrop | None = None,
    weights: Sequence[float] | None = None,
    samples_per_class: int = 0,
    shuffle_block: int = 0,
    exclude: Root | Sequence[Root | None] | None = None,
    on_bad_record: str = "error",
    worker_type: str = "threads",
    dali: bool = False,
    device: torch.device | None = None,
) -> DataLoader:
    """Make the loader of one rank's batches.

    Args:
        root_dir: A folder with `train.rec` and `train.idx`, a `.rec` file, a folder of class
            folders, or "synthetic" (which needs `num_classes` and `num_images`). Several of them
            are joined: the classes of each come after those of the one before.
        batch_size: Images per rank and step. The global batch is batch_size * world_size images.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of order and augmentation.
        num_workers: Threads that read and decode; with 0 the consumer does. The number does not
            change the batches.
        input_size: Height and width in pixels that every image must have.
        num_classes: Number of classes, above every label; None takes that of the set.
        num_images: Number of images of "synthetic". For a set on disk, a number that differs from
            the real one is logged and otherwise ignored.
        flip: Whether half of the images are mirrored.
        shuffle: Whether images come in random order instead of the order of the set.
        drop_last: Whether to leave out images that do not fill a global batch (a different tail in
            each epoch). Otherwise they make a smaller last batch.
        pin_memory: Whether workers put batches in page-locked memory, so that
            `.to(device, non_blocking=True)` does not wait. Needs CUDA.
        augment: Further augmentations; see data/augment.py.
        crop: How images of any size are cropped and resized to `input_size`; None if all have that
            size. "synthetic" images have it.
        weights: Relative share of each set in an epoch; None makes it proportional to its size.
        samples_per_class: If not 0, every class comes equally often, this many images of it at a
            time.
        shuffle_block: If not 0, images per block of a block-wise shuffle, for disks that read
            neighbors faster.
        exclude: A list of images and classes to leave out; see data/concat.py. With several sets,
            one list (or None) for each.
        on_bad_record: "error", or "skip" to replace records that cannot be read; see
            data/collate.py.
        worker_type: "threads"; "processes" is accepted with a warning, and threads are used.
        dali: Whether to decode and augment with NVIDIA DALI, on `device`; see data/dali.py.
        device: Where batches are delivered, copied one ahead; None leaves them in host memory.

    Returns:
        The loader. Its iteration begins at step 0 of epoch 0.

    Raises:
        DataError: An argument is not allowed, or the set does not fit it.
        MissingDataError: The set is not there. It is a DataError and a FileNotFoundError.
        RecordError: A record file is damaged.
        ImageError: An image cannot be decoded.
    """
    if num_workers < 0 or worker_type not in WORKER_TYPES:
        raise DataError(
            f"num_workers={num_workers}, worker_type={worker_type!r}: allowed are batch_size of 1 "
            "or more, num_workers of 0 or more, worker_type 'threads' or 'processes'"
        )
    if worker_type == "processes":
        log.warning("worker_type='processes' is no longer available; threads are used")
    if crop is not None and dali:
        raise DataError("dali=True takes images of one size only: leave it out where they are cut")
    augmentation = parse_augmentation(augment, flip)
    roots = [root_dir] if isinstance(root_dir, (str, os.PathLike)) else list(root_dir)
    lists = [exclude] if exclude is None or isinstance(exclude, (str, os.PathLike)) else exclude
    source = open_datasets(roots, input_size, num_classes, num_images, lists)
    order = _choose_order(source, seed, shuffle, shuffle_block, weights, samples_per_class)
    if samples_per_class and batch_size % samples_per_class:
        raise DataError(
            f"batch_size={batch_size} is no multiple of samples_per_class={samples_per_class}; "
            "a group of one class has to fit a rank's batch"
        )
    make = BatchLoader(
        source,
        order,
        batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        augmentation=augmentation,
        drop_last=drop_last,
        on_bad_record=on_bad_record,
        pin_memory=pin_memory,
        crop=None if isinstance(source, SyntheticDataset) else crop,
    )
    loader = DataLoader(make, _workers(make, num_workers, dali, device), device)
    if num_images is not None and num_images != loader.num_images:
        log.warning(
            "%s has %d images, not %d as stated; the real number is used",
            root_dir,
            loader.num_images,
            num_images,
        )
    log.info(
        "an epoch is %d steps of %d images; the last %d images of each epoch's order are left out",
        len(loader),
        make.global_batch,
        loader.num_images_dropped_per_epoch,
    )
    return loader


def _workers(
    make: BatchLoader, num_workers: int, dali: bool, device: torch.device | None
) -> Workers:
    if dali and not isinstance(make.source, SyntheticDataset):  # which has nothing to decode
        from data.dali import DaliPool

        return DaliPool(make, max(num_workers, 1), device)
    return _Threads(make, num_workers)


def _choose_order(
    source: ImageDataset,
    seed: int,
    shuffle: bool,
    shuffle_block: int,
    weights: Sequence[float] | None,
    samples_per_class: int,
) -> Sampler:
    chosen = {
        "shuffle=False": not shuffle,
        "shuffle_block": shuffle_block,
        "weights": weights is not None,
        "samples_per_class": samples_per_class,
    }
    names = [name for name, value in chosen.items() if value]
    if len(names) > 1 or shuffle_block < 0 or samples_per_class < 0:
        raise DataError(
            f"{', '.join(names)} given together, or below 0: each is an order of its own, so "
            f"choose one (shuffle_block={shuffle_block}, samples_per_class={samples_per_class})"
        )
    if not shuffle:
        return SequentialSampler(len(source))
    if shuffle_block:
        return BlockShuffleSampler(len(source), seed, shuffle_block)
    if samples_per_class:
        return ClassBalancedSampler(source.labels(), samples_per_class, seed)
    if weights is None:
        return RandomSampler(len(source), seed)
    sizes = source.sizes if isinstance(source, ConcatDataset) else [len(source)]
    if len(weights) != len(sizes) or not all(0 < w < float("inf") for w in weights):
        raise DataError(
            f"weights={list(weights)} for {len(sizes)} sets: one number above 0 for each is needed"
        )
    order = WeightedSampler(sizes, weights, seed)
    for number, (share, size) in enumerate(zip(order.shares.tolist(), sizes, strict=True)):
        log.info("set %d: %d of its %d images per epoch", number, share, size)
    return order


def open_datasets(
    roots: Sequence[Root],
    input_size: int = 112,
    num_classes: int | None = None,
    num_images: int | None = None,
    exclude: Sequence[Root | None] = (None,),
) -> ImageDataset:
    """Open all `roots` as one source, without what the lists in `exclude` name.

    Raises:
        DataError: The number of lists does not fit that of the sets, or a set cannot be used.
    """
    if (
        not roots
        or len(exclude) not in (1, len(roots))
        or (len(roots) > 1 and len(exclude) == 1 and exclude[0] is not None)
    ):
        raise DataError(
            f"{len(roots)} sets with {len(exclude)} exclusion lists: one set or more is needed, "
            "and one list (or None) for each set"
        )
    alone = len(roots) == 1
    lists = list(exclude) if len(exclude) == len(roots) else [None] * len(roots)
    sources: list[ImageDataset] = []
    for root, path_list in zip(roots, lists, strict=True):
        source: ImageDataset = open_dataset(
            root, input_size, num_classes if alone else None, num_images if alone else None
        )
        if path_list is not None:
            source = Subset(source, Path(path_list))
            log.info("%s: %d images excluded by %s", root, source.num_excluded, path_list)
        sources.append(source)
    if alone:
        return sources[0]
    joined = ConcatDataset(sources)
    for root, offset in zip(roots, joined.label_offsets, strict=True):
        log.info("%s: its classes begin at %d", root, offset)
    if num_classes is not None:
        check_num_classes(num_classes, joined.num_classes, "the joined sets")
        joined.num_classes = num_classes
    return joined


def open_dataset(
    root_dir: Root,
    input_size: int = 112,
    num_classes: int | None = None,
    num_images: int | None = None,
) -> RecordDataset | FolderDataset | SyntheticDataset:
    """Open the source that `root_dir` names; see `get_dataloader`.

    Raises:
        DataError: "synthetic" lacks a number of classes or images, or the set cannot be used.
    """
    if os.fspath(root_dir) == "synthetic":
        if not num_classes or not num_images or num_classes < 1 or num_images < 1:
            raise DataError(
                f"'synthetic' with num_classes={num_classes} and num_images={num_images}: it needs "
                "both, 1 or more; set num_classes=... and num_image=..."
            )
        return SyntheticDataset(num_classes, num_images, input_size)
    root = Path(root_dir)
    names = {"train.rec", "train.idx", "property"}
    if root.suffix == ".rec" or any((root / name).is_file() for name in names):
        return RecordDataset(root, num_classes, input_size)
    return FolderDataset(root, num_classes, input_size)
