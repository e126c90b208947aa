"""Makes one rank's batches as a function of (epoch, step): choose, read, augment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from data.augment import Augmentation, Draws, apply, draw, mirror
from data.crop import RandomResizedCrop
from data.datasets import DataError, ImageDataset
from data.decode import empty_pixels
from data.order import batch_positions, steps_per_epoch
from data.sampling import Sampler
from utils.errors import UserError

ON_BAD_RECORD = ("error", "skip")


class LoadedBatch(NamedTuple):
    """A batch of images on the host.

    Attributes:
        images: [b, H, W, 3] uint8, RGB.
        labels: [b] int64.
        skipped: Why each bad image was replaced.
    """

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[str]


class BatchLoader:
    """Makes the batch of this rank when called with (epoch, step), from any thread.

    Args:
        source: The data set.
        order: Which image stands at which position of an epoch.
        batch_size: Images per rank and step.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the augmentation.
        augmentation: Probability of each change; None means flips of half of the images.
        drop_last: Whether the images that do not fill a global batch are left out.
        on_bad_record: "error" raises. "skip" replaces an image that cannot be read by the next good
            one of the same batch, with its label, so that batches keep their size and ranks stay in
            step. A batch without any good image is an error in either case.
        pin_memory: Whether batches lie in page-locked memory.
        crop: Random crop of images of any size; None if all images have the network's size.

    Raises:
        DataError: An argument is not allowed, or no global batch fits into an epoch.
    """

    def __init__(
        self,
        source: ImageDataset,
        order: Sampler,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 2048,
        augmentation: Augmentation | None = None,
        drop_last: bool = True,
        on_bad_record: str = "error",
        pin_memory: bool = False,
        crop: RandomResizedCrop | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batch_size={batch_size}, rank={rank}, world_size={world_size}: allowed are "
                "batch_size of 1 or more, rank from 0 to world_size - 1"
            )
        if on_bad_record not in ON_BAD_RECORD:
            raise DataError(f"on_bad_record={on_bad_record!r}: allowed are 'error' and 'skip'")
        if pin_memory and not torch.cuda.is_available():
            raise DataError(
                "pin_memory=True is for copies to a CUDA device, and PyTorch sees none here: "
                "set pin_memory=False"
            )
        self.source, self.order, self.batch_size = source, order, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.augmentation = Augmentation() if augmentation is None else augmentation
        self.crop = crop
        self.skips_bad_records, self.pin_memory = on_bad_record == "skip", pin_memory
        self.global_batch = batch_size * world_size
        self.num_steps = steps_per_epoch(len(order), self.global_batch, drop_last)
        if not self.num_steps:
            raise DataError(
                f"a global batch of {self.global_batch} ({batch_size} per rank x {world_size} "
                f"ranks) is more than the {len(order)} images of the set: no step fits. Use a "
                "smaller batch_size or fewer ranks."
            )

    def indices(self, epoch: int, step: int) -> np.ndarray:
        """Returns the images of this rank's batch, in order: int64 [b]."""
        positions = batch_positions(
            step, self.rank, self.world_size, self.batch_size, len(self.order)
        )
        return self.order(positions, epoch)

    def draws(self, epoch: int, indices: np.ndarray) -> Draws:
        """Draws the changes of these images (int64 [b]) in this epoch."""
        return draw(self.augmentation, indices, self.seed, epoch, self.source.input_size)

    def __call__(self, epoch: int, step: int) -> LoadedBatch:
        """Reads and decodes one batch.

        Raises:
            UserError: An image cannot be used, or with "skip" none of the batch.
        """
        self.fetch_ahead(epoch, step)
        indices = self.indices(epoch, step)
        draws = self.draws(epoch, indices)
        size = self.source.input_size
        images = empty_pixels(len(indices), size, size, 3)
        labels = np.empty(len(indices), np.int64)
        bad: dict[int, Exception] = {}
        only_flips, flips = self.augmentation.only_flips, draws.flip.tolist()
        for row, index in enumerate(indices.tolist()):
            image = images[row]
            try:
                labels[row] = self._read_into(index, image, epoch)
            except UserError as error:
                if not self.skips_bad_records:
                    raise
                bad[row] = error
                continue
            if not only_flips:
                apply(draws, row, image)
            elif flips[row]:
                mirror(image)
        for row, other in replacements(bad, len(indices)).items():
            images[row], labels[row] = images[other], labels[other]
        return self.loaded(torch.from_numpy(images), labels, bad)

    def _read_into(self, index: int, out: np.ndarray, epoch: int) -> int:
        if self.crop is None:
            return self.source.read_into(index, out)
        return self.crop.read_into(self.source, index, out, self.seed, epoch)

    def loaded(
        self, images: torch.Tensor, labels: np.ndarray, bad: dict[int, Exception]
    ) -> LoadedBatch:
        """Joins the parts of a batch, in page-locked memory with `pin_memory`."""
        classes = torch.from_numpy(labels)
        if self.pin_memory:
            images, classes = images.pin_memory(), classes.pin_memory()
        return LoadedBatch(images, classes, [str(error) for error in bad.values()])

    def fetch_ahead(self, epoch: int, step: int, first: bool = False) -> None:
        """Lets the data set fetch what the next window of a block-wise order needs.

        It does so whenever a batch enters a new window.

        Args:
            epoch: Number of the epoch.
            step: Number of the batch in the epoch.
            first: Whether the iteration starts here; then the window of this batch itself is
                fetched.
        """
        window = self.order.window_size
        if not window:
            return
        begin = step * self.global_batch
        if first or begin // window != (begin - self.global_batch) // window:
            position = min(begin if first else begin + window, len(self.order) - 1)
            for low, high in self.order.window(position, epoch):
                self.source.will_need(low, high)


def replacements(bad: dict[int, Exception], count: int) -> dict[int, int]:
    """Returns which good row of a batch takes the place of each bad one.

    Args:
        bad: Error of each bad row.
        count: Number of rows.

    Raises:
        UserError: All rows are bad; the type is that of the first error.
    """
    if bad and len(bad) == count:
        first = next(iter(bad.values()))
        raise type(first)(f"none of the {count} images of a batch can be used; the first: {first}")
    found: dict[int, int] = {}
    for row in bad:
        other = (row + 1) % count
        while other in bad:
            other = (other + 1) % count
        found[row] = other
    return found
