"""Brings images of any size to the size that a network takes, as is usual for ImageNet.

During training a box of random area and shape is cut out and resized (Szegedy et al. 2015, "Going
Deeper with Convolutions"). For scoring the short side is resized and the center cut out. Both
resize bilinearly with a filter as wide as the shrinking asks for. Pillow and torchvision do the
same, so published weights see the pixels that they were trained on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from data.datasets import DataError, FolderDataset, ImageDataset
from data.decode import decode_image
from data.order import uniform

ATTEMPTS = 10  # boxes tried before the center is taken
_CROP = 10  # this file's stream of draws; data/augment.py has 9
_RESIZED, _CUT = 256, 224  # the usual sides in pixels; other sizes keep their ratio


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of each image, a function of (seed, epoch, image) only.

    Attributes:
        area: Bounds of the box's share of the image's area, drawn uniformly.
        ratio: Bounds of width / height, drawn log-uniformly.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(
        self, index: int, seed: int, epoch: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Returns top, left, height and width of the box of an image, in pixels.

        The box is the first of ATTEMPTS draws that fits. If none does, it is the largest centered
        box whose shape is allowed.

        Args:
            index: Number of the image.
            seed: Seed of the run.
            epoch: Number of the epoch.
            height: Height of the image.
            width: Width of the image.
        """
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for attempt in range(ATTEMPTS):
            draws = uniform(np.arange(4), _CROP, attempt, index, seed, epoch)
            area, ratio, top, left = draws.tolist()
            pixels = height * width * (self.area[0] + area * (self.area[1] - self.area[0]))
            shape = math.exp(low + ratio * (high - low))
            box_height = round(math.sqrt(pixels / shape))
            box_width = round(math.sqrt(pixels * shape))
            if 0 < box_height <= height and 0 < box_width <= width:
                return (
                    int(top * (height - box_height + 1)),
                    int(left * (width - box_width + 1)),
                    box_height,
                    box_width,
                )
        box_height = min(height, max(1, round(width / self.ratio[0])))
        box_width = min(width, max(1, round(height * self.ratio[1])))
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

    def read_into(
        self, source: ImageDataset, index: int, out: np.ndarray, seed: int, epoch: int
    ) -> int:
        """Decodes an image, crops and resizes it, and returns its label.

        Args:
            source: The data set.
            index: Number of the image.
            out: uint8 [size, size, 3], which receives the pixels.
            seed: Seed of the run.
            epoch: Number of the epoch.

        Raises:
            DataError: The label does not fit.
            RecordError: The record is damaged.
            ImageError: The image cannot be decoded.
        """
        encoded, label = source.read_encoded(index)
        picture = decode_image(encoded, source.describe(index))
        top, left, height, width = self.box(index, seed, epoch, *picture.shape[:2])
        cut = picture[top : top + height, left : left + width]
        out[...] = resize(cut, *out.shape[:2])
        return label


def short_side_for(input_size: int) -> int:
    """Returns the usual short side before the center is cut out: 256 for 224."""
    return round(input_size * _RESIZED / _CUT)


def center_crop(picture: np.ndarray, input_size: int, short_side: int | None = None) -> np.ndarray:
    """Cuts the center out of a resized image.

    Args:
        picture: uint8 [H, W, 3].
        input_size: Height and width of the result in pixels.
        short_side: The short side is resized to this first, in pixels, at least input_size; None
            means the usual one.

    Returns:
        uint8 [input_size, input_size, 3].
    """
    short = short_side_for(input_size) if short_side is None else short_side
    height, width = picture.shape[:2]
    if height < width:
        height, width = short, max(short, int(short * width / height))
    else:
        height, width = max(short, int(short * height / width)), short
    resized = resize(picture, height, width)
    top, left = round((height - input_size) / 2), round((width - input_size) / 2)
    return resized[top : top + input_size, left : left + input_size]


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to [height, width, 3], bilinear, low-pass filtered if it shrinks."""
    if picture.shape[:2] == (height, width):
        return picture
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


class ImageFolder:
    """The images of `root/<class>/<image>` with their labels, to be scored.

    Args:
        root: Folder of the class folders.
        input_size: Height and width that the network takes.
        class_names: Class names whose order gives the labels, such as the training set's; None
            means the folders' own order.
        short_side: See `center_crop`.

    Attributes:
        name: Name of the set, for logs.
        labels: [images] int64.
        num_classes: Number of `class_names`; the labels are below it.

    Raises:
        DataError: A class folder is not among `class_names`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        input_size: int,
        class_names: Sequence[str] | None = None,
        short_side: int | None = None,
    ) -> None:
        self.source = FolderDataset(root, input_size=input_size)
        self.name, self.input_size = self.source.root.name, input_size
        self.short_side = short_side
        names = self.source.class_names if class_names is None else list(class_names)
        self.num_classes = len(names)
        places = {name: place for place, name in enumerate(names)}
        unknown = [name for name in self.source.class_names if name not in places]
        if unknown:
            raise DataError(
                f"{root}: {len(unknown)} of its class folders are not among the {len(names)} "
                f"classes of the training set: {', '.join(unknown[:4])}"
                f"{', ...' if len(unknown) > 4 else ''}. Remove or rename them; a class is its "
                "folder's name"
            )
        of_folder = np.array([places[name] for name in self.source.class_names])
        self.labels: np.ndarray = of_folder[self.source.labels()]

    def __len__(self) -> int:
        return len(self.source)

    def encoded(self, index: int) -> bytes:
        """Reads the file of an image.

        Raises:
            ImageError: The file cannot be read.
        """
        return bytes(self.source.read_encoded(index)[0])

    def pixels(self, index: int, encoded: bytes) -> np.ndarray:
        """Decodes what the network sees of an image: uint8 [input_size, input_size, 3], RGB.

        Args:
            index: Number of the image, for errors.
            encoded: Content of its file.

        Raises:
            ImageError: The image cannot be decoded.
        """
        picture = decode_image(encoded, self.source.describe(index))
        return center_crop(picture, self.input_size, self.short_side)
