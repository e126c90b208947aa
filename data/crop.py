"""Pictures of any size to the size a network takes, as ImageNet's users know it.

While training a box of random area and shape is cut out and resized (Szegedy et al. 2015, "Going
Deeper with Convolutions"); for scoring the short side is resized and the middle cut out. Both
resize bilinearly with a filter as wide as the shrinking asks for, which is what Pillow and
torchvision do: published weights see the pixels they were trained on.
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

ATTEMPTS = 10  # boxes tried before the middle is taken
_CROP = 10  # this file's stream of draws; data/augment.py has 9
_RESIZED, _CUT = 256, 224  # the usual sides in pixels; other sizes keep their ratio


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random box of each picture, a function of (seed, epoch, image) only.

    Attributes:
        area: share of the picture's area, uniform in these bounds.
        ratio: width / height, log-uniform in these bounds.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(
        self, index: int, seed: int, epoch: int, height: int, width: int
    ) -> tuple[int, int, int, int]:
        """Top, left, height, width of the box of image `index`, in a picture of this size.

        The first of ATTEMPTS draws that fits; if none does, the largest box in the middle whose
        shape is allowed.
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
        """Decode picture `index`, cut and resize it into `out`, uint8 [size, size, 3]; its label.

        Raises DataError, ImageError.
        """
        encoded, label = source.read_encoded(index)
        picture = decode_image(encoded, source.describe(index))
        top, left, height, width = self.box(index, seed, epoch, *picture.shape[:2])
        cut = picture[top : top + height, left : left + width]
        out[...] = resize(cut, *out.shape[:2])
        return label


def short_side_for(input_size: int) -> int:
    """The usual side before the middle is cut out: 256 for 224."""
    return round(input_size * _RESIZED / _CUT)


def center_crop(picture: np.ndarray, input_size: int, short_side: int | None = None) -> np.ndarray:
    """The middle of a picture, uint8 [input_size, input_size, 3].

    Args:
        picture: uint8 [H, W, 3].
        short_side: it is resized to this first, in pixels, at least input_size; None: the usual.
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
    """uint8 [H, W, 3] to uint8 [height, width, 3], bilinear, low-pass filtered where it shrinks."""
    if picture.shape[:2] == (height, width):
        return picture
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


class ImageFolder:
    """The pictures of `root/<class>/<picture>` with their labels, to be scored.

    Args:
        root: the class folders.
        class_names: whose order gives the labels, as the training folder's; None: the folders' own.
        input_size: height and width that the network takes. short_side: see `center_crop`.

    Attributes:
        name: of the set, for logs. labels: int64 [pictures]. num_classes: the labels' range.

    Raises:
        DataError: a class folder that is not among `class_names`; names it.
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
        """The file. Raises ImageError."""
        return bytes(self.source.read_encoded(index)[0])

    def pixels(self, index: int, encoded: bytes) -> np.ndarray:
        """What the network sees of picture `index`: uint8 [input_size, input_size, 3], RGB."""
        picture = decode_image(encoded, self.source.describe(index))
        return center_crop(picture, self.input_size, self.short_side)
