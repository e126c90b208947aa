"""The door to the data: `get_dataloader(...)`.

Order, shards and flips are pure functions of (seed, epoch, step, rank); see data/order.py. This
file asks nobody who it is: rank and world size are arguments.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from data.augment import normalise, write_flipped
from data.decode import ImageError
from data.order import batch_positions, flip_mask, shuffled_indices, steps_per_epoch
from data.prefetch import OrderedPrefetch
from data.recordio import RecordError
from data.sources import (
    DataError,
    FolderSource,
    ImageSource,
    MissingDataError,
    RecordSource,
    SyntheticSource,
)

__all__ = [
    "DATA_ERRORS",
    "Batch",
    "DataError",
    "DataLoader",
    "MissingDataError",
    "get_dataloader",
    "normalise",
]

log = logging.getLogger(__name__)

# What a damaged or unsuitable data set raises: the message is for the user, not a traceback.
DATA_ERRORS = (DataError, RecordError, ImageError)


class Batch(NamedTuple):
    """images: uint8 [b, 3, H, W], RGB, channels_last in memory; labels: int64 [b]."""

    images: torch.Tensor
    labels: torch.Tensor


class DataLoader:
    """Iterates one rank's batches of one epoch; `set_epoch` chooses which, and where to begin.

    `len(loader)` is the number of steps in a whole epoch, the same on every rank.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 2048,
        num_workers: int = 2,
        flip: bool = True,
        shuffle: bool = True,
        drop_last: bool = True,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or num_workers < 0:
            raise DataError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}, "
                f"num_workers={num_workers}: allowed are batch_size of 1 or more, rank from 0 to "
                "world_size - 1, num_workers of 0 or more"
            )
        if pin_memory and not torch.cuda.is_available():
            raise DataError(
                "pin_memory=True is for copies to a CUDA device, and PyTorch sees none here: "
                "set pin_memory=False"
            )
        self.source, self.batch_size = source, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.num_workers, self.flip, self.shuffle = num_workers, flip, shuffle
        self.pin_memory = pin_memory
        self.num_images, self.num_classes = len(source), source.num_classes
        global_batch = batch_size * world_size
        self._steps = steps_per_epoch(self.num_images, global_batch, drop_last)
        if not self._steps:
            raise DataError(
                f"a global batch of {global_batch} ({batch_size} per rank x {world_size} ranks) is "
                f"more than the {self.num_images} images of the set: no step fits. Use a smaller "
                "batch_size or fewer ranks."
            )
        self.num_images_dropped_per_epoch = self.num_images % global_batch if drop_last else 0
        self._epoch, self._start_step = 0, 0

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from `start_step` on, in O(1)."""
        if epoch < 0 or not 0 <= start_step <= self._steps:
            raise ValueError(
                f"epoch={epoch}, start_step={start_step}: allowed are epochs from 0 and steps from "
                f"0 to {self._steps}"
            )
        self._epoch, self._start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers:
            cv2.setNumThreads(0)  # ours already are one per core; OpenCV's own would compete
        epoch = self._epoch
        steps = range(self._start_step, self._steps)
        running = OrderedPrefetch(lambda step: self.load(epoch, step), steps, self.num_workers)
        try:
            yield from running
        finally:  # also when the consumer stops early or fails
            running.close()

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Which images this rank's batch holds: int64 [b], in order."""
        positions = batch_positions(
            step, self.rank, self.world_size, self.batch_size, self.num_images
        )
        if not self.shuffle:
            return positions
        return shuffled_indices(positions, self.num_images, self.seed, epoch)

    def load(self, epoch: int, step: int) -> Batch:
        """Read and decode one batch: a pure function of its arguments, called by the workers."""
        indices = self.indices(epoch, step)
        flips = flip_mask(indices, self.seed, epoch) & self.flip
        images: np.ndarray | None = None
        labels = np.empty(len(indices), np.int64)
        for row, (index, flip) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
            image, labels[row] = self.source.read(index)
            if images is None:
                images = np.empty((len(indices), *image.shape), np.uint8)
            if flip:
                write_flipped(image, images[row])
            else:
                images[row] = image
        if images is None:  # a last batch with fewer images than ranks
            images = np.empty((0, *self.source.read(0)[0].shape), np.uint8)
        pixels, classes = torch.from_numpy(images), torch.from_numpy(labels)  # [b, H, W, 3], [b]
        if self.pin_memory:  # before permuting: pinning need not keep strides
            pixels, classes = pixels.pin_memory(), classes.pin_memory()
        return Batch(pixels.permute(0, 3, 1, 2), classes)


def get_dataloader(
    root_dir: str | os.PathLike[str],
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
) -> DataLoader:
    """The batches of one rank.

    root_dir: a folder with `train.rec` and `train.idx`, a `.rec` file, a folder of class folders,
        or "synthetic" (which needs num_classes and num_images).
    batch_size: images per rank and step. The global batch is batch_size * world_size images.
    num_workers: threads that read and decode; 0 does it in the consumer. Not part of the result.
    input_size: height and width in pixels that every image must have.
    num_classes: labels must be below it; None takes what the set has.
    num_images: "synthetic" only; for a set on disk a different number is logged, not obeyed.
    drop_last: leave out what does not fill a global batch (a different tail in each epoch);
        False makes it a smaller last batch.
    pin_memory: batches lie in page-locked memory, so that `.to(device, non_blocking=True)` does not
        wait; the workers do it. Needs CUDA.

    Raises DataError, RecordError or ImageError (together DATA_ERRORS); MissingDataError is a
    FileNotFoundError too.
    """
    source = open_source(root_dir, input_size, num_classes, num_images)
    loader = DataLoader(
        source,
        batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        num_workers=num_workers,
        flip=flip,
        shuffle=shuffle,
        drop_last=drop_last,
        pin_memory=pin_memory,
    )
    if num_images is not None and num_images != loader.num_images:
        log.warning(
            "%s has %d images, not %d as stated; the real number is used",
            root_dir, loader.num_images, num_images,
        )  # fmt: skip
    return loader


def open_source(
    root_dir: str | os.PathLike[str],
    input_size: int = 112,
    num_classes: int | None = None,
    num_images: int | None = None,
) -> RecordSource | FolderSource | SyntheticSource:
    """The source that `root_dir` names; see `get_dataloader`."""
    if os.fspath(root_dir) == "synthetic":
        if not num_classes or not num_images or num_classes < 1 or num_images < 1:
            raise DataError(
                f"'synthetic' with num_classes={num_classes} and num_images={num_images}: it needs "
                "both, 1 or more; set num_classes=... and num_image=..."
            )
        return SyntheticSource(num_classes, num_images, input_size)
    root = Path(root_dir)
    names = {"train.rec", "train.idx", "property"}
    if root.suffix == ".rec" or any((root / name).is_file() for name in names):
        return RecordSource(root, num_classes, input_size)
    return FolderSource(root, num_classes, input_size)
