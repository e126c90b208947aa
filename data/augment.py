"""Turns decoded images into what the network sees: host augmentation, then normalization.

`draw` decides for a whole batch at once which image is changed and how, per (seed, epoch, image).
The draws are plain numbers, and both loaders obey the same ones: `apply` with OpenCV, data/dali.py
with DALI's operators.

The order is: crop, resize or low_res, blur, colors (hsv, photometric, gray: one affine map of RGB),
erase, flip. Sources: the published DALI pipeline (`dali_aug` of arcface_torch); AdaFace (Kim, Jain,
Liu 2022) for crop, low_res and photometric; Random Erasing (Zhong et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import cv2
import numpy as np
import torch

from data.datasets import DataError
from data.order import flip_mask, uniform

# Default probability of each augmentation named by itself.
DEFAULTS = {
    "crop": 0.2,
    "resize": 0.1,
    "low_res": 0.2,
    "blur": 0.2,
    "hsv": 0.2,
    "gray": 0.1,
    "photometric": 0.2,
    "erase": 0.25,
}
PRESETS = {
    "dali_aug": {"resize": 0.1, "blur": 0.2, "hsv": 0.2, "gray": 0.1},
    "adaface": {"crop": 0.2, "low_res": 0.2, "photometric": 0.2},
}
NEAREST, LINEAR, CUBIC = 0, 1, 2
_OPENCV_INTERPOLATION = {
    NEAREST: cv2.INTER_NEAREST_EXACT,
    LINEAR: cv2.INTER_LINEAR,
    CUBIC: cv2.INTER_CUBIC,
}
ERASED = 127  # the gray that normalization takes to zero
_AUGMENT = 9  # this file's stream of draws; data/order.py and data/sampling.py have 1 to 8
_LUMA = np.array([0.299, 0.587, 0.114])
# Luma and two color differences (NTSC's YIQ), in which hue is an angle and saturation a length.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_IDENTITY = np.eye(3, 4, dtype=np.float32)


@dataclass(frozen=True)
class Augmentation:
    """Probability of each change, per image and epoch.

    Attributes:
        flip: Left and right are exchanged.
        crop: A box of 20 to 100 % of the area and an aspect ratio of 3/4 to 4/3 stays; the rest
            becomes black.
        resize: The image is scaled down to 50 to 80 % of the side and up again, linearly.
        low_res: The same as resize from 20 to 100 %, each way nearest, linear or cubic.
        blur: Gaussian blur with a window of 3 or 5 pixels.
        hsv: The hue is rotated by 0 to 20 degrees, the saturation multiplied by 1 to 1.2.
        gray: All channels become the luma.
        photometric: Brightness, contrast (about 127.5) and saturation are each multiplied by 0.5 to
            1.5.
        erase: A box of 2 to 33 % of the area and an aspect ratio of 0.3 to 3.3 becomes gray.
    """

    flip: float = 0.5
    crop: float = 0.0
    resize: float = 0.0
    low_res: float = 0.0
    blur: float = 0.0
    hsv: float = 0.0
    gray: float = 0.0
    photometric: float = 0.0
    erase: float = 0.0

    @property
    def only_flips(self) -> bool:
        """Whether flips are the only possible change."""
        return self == Augmentation(flip=self.flip)

    @property
    def changes_colors(self) -> bool:
        """Whether `Draws.color` can differ from the identity."""
        return max(self.hsv, self.gray, self.photometric) > 0


def parse_augmentation(words: Sequence[str], flip: bool = True) -> Augmentation:
    """Makes an Augmentation from the words of a config.

    Args:
        words: Names ("blur"), names with a probability ("erase=0.3") and presets ("adaface").
        flip: Whether half of the images are mirrored.

    Raises:
        DataError: A word is unknown, or its probability is outside [0, 1].
    """
    chosen = Augmentation(flip=0.5 if flip else 0.0)
    for word in words:
        name, equals, number = word.partition("=")
        try:
            probability = float(number) if equals else None
            if probability is not None and not 0 <= probability <= 1:
                raise ValueError
            if name in PRESETS and probability is None:
                chosen = replace(chosen, **PRESETS[name])
                continue
            if name not in DEFAULTS:
                raise ValueError
            chosen = replace(
                chosen, **{name: DEFAULTS[name] if probability is None else probability}
            )
        except ValueError:
            raise DataError(
                f"augment: {word!r}; allowed are {', '.join(PRESETS)}, {', '.join(DEFAULTS)}, each "
                "but the first two also with a probability, such as 'erase=0.3'"
            ) from None
    return chosen


@dataclass
class Draws:
    """The changes of each of b images of `size` x `size` pixels.

    A box is (top, left, height, width).

    Attributes:
        flip: [b] boolean.
        crop: [b, 4] int32 box that stays; the whole image means no crop.
        side: [b] int32 pixels to scale down to; `size` means no scaling.
        down: [b] int32 interpolation on the way down: NEAREST, LINEAR or CUBIC.
        up: [b] int32 interpolation on the way up.
        blur: [b] int32 window in pixels; 1 means no blur.
        color: [b, 3, 4] float32 affine map of (R, G, B, 1).
        erase: [b, 4] int32 box; an empty one means no erasing.
    """

    flip: np.ndarray
    crop: np.ndarray
    side: np.ndarray
    down: np.ndarray
    up: np.ndarray
    blur: np.ndarray
    color: np.ndarray
    erase: np.ndarray


def draw(
    augmentation: Augmentation, indices: np.ndarray, seed: int, epoch: int, size: int
) -> Draws:
    """Draws the changes of some images in an epoch, as a function of the arguments only.

    Args:
        augmentation: Probability of each change.
        indices: [b] int64 image numbers.
        seed: Seed of the run.
        epoch: Number of the epoch.
        size: Side of the images in pixels.
    """
    count = len(indices)
    names = [field.name for field in fields(Augmentation)]

    def chance(name: str, number: int = 0) -> np.ndarray:
        return uniform(indices, _AUGMENT, names.index(name), number, seed, epoch)

    def happens(name: str) -> np.ndarray:
        probability = getattr(augmentation, name)
        return chance(name) < probability if probability else np.zeros(count, bool)

    def between(name: str, number: int, low: float, high: float) -> np.ndarray:
        return low + (high - low) * chance(name, number)

    if augmentation.flip == 0.5:
        flip = flip_mask(indices, seed, epoch)
    else:
        flip = happens("flip")
    whole = np.tile(np.array([0, 0, size, size], np.int32), (count, 1))
    draws = Draws(
        flip=flip,
        crop=whole,
        side=np.full(count, size, np.int32),
        down=np.full(count, LINEAR, np.int32),
        up=np.full(count, LINEAR, np.int32),
        blur=np.ones(count, np.int32),
        color=np.tile(_IDENTITY, (count, 1, 1)),
        erase=np.zeros((count, 4), np.int32),
    )
    if augmentation.only_flips:
        return draws

    def boxes(name: str, areas: tuple[float, float], ratios: tuple[float, float]) -> np.ndarray:
        area = between(name, 1, *areas) * size * size
        ratio = np.exp(between(name, 2, math.log(ratios[0]), math.log(ratios[1])))
        height = np.clip(np.rint(np.sqrt(area * ratio)), 1, size)
        width = np.clip(np.rint(np.sqrt(area / ratio)), 1, size)
        top = np.floor(chance(name, 3) * (size - height + 1))
        left = np.floor(chance(name, 4) * (size - width + 1))
        return np.stack([top, left, height, width], axis=1).astype(np.int32)

    on = happens("crop")
    draws.crop[on] = boxes("crop", (0.2, 1.0), (3 / 4, 4 / 3))[on]
    on = happens("resize")
    draws.side[on] = np.floor(between("resize", 1, 0.5 * size, 0.8 * size))[on]
    on = happens("low_res")
    draws.side[on] = np.maximum(np.floor(between("low_res", 1, 0.2, 1.0) * size), 1)[on]
    draws.down[on] = np.floor(3 * chance("low_res", 2))[on]
    draws.up[on] = np.floor(3 * chance("low_res", 3))[on]
    on = happens("blur")
    draws.blur[on] = (3 + 2 * np.floor(2 * chance("blur", 1)))[on]
    on = happens("erase")
    draws.erase[on] = boxes("erase", (0.02, 0.33), (0.3, 3.3))[on]
    if augmentation.changes_colors:
        _draw_colors(draws, happens, between)
    return draws


def _draw_colors(
    draws: Draws,
    happens: Callable[[str], np.ndarray],
    between: Callable[[str, int, float, float], np.ndarray],
) -> None:
    rows = np.flatnonzero(happens("hsv"))
    angle, length = np.radians(between("hsv", 1, 0, 20))[rows], between("hsv", 2, 1, 1.2)[rows]
    turned = np.tile(np.eye(3), (len(rows), 1, 1))
    turned[:, 1, 1] = turned[:, 2, 2] = length * np.cos(angle)
    turned[:, 2, 1] = length * np.sin(angle)
    turned[:, 1, 2] = -turned[:, 2, 1]
    _then(draws.color, rows, _FROM_YIQ @ turned @ _TO_YIQ)
    rows = np.flatnonzero(happens("photometric"))
    brightness, contrast, vividness = (
        between("photometric", number, 0.5, 1.5)[rows] for number in (1, 2, 3)
    )
    _then(draws.color, rows, brightness[:, None, None] * np.eye(3))
    _then(draws.color, rows, contrast[:, None, None] * np.eye(3), 127.5 * (1 - contrast))
    _then(draws.color, rows, _saturated(vividness))
    rows = np.flatnonzero(happens("gray"))
    _then(draws.color, rows, _saturated(np.zeros(len(rows))))


def _saturated(factor: np.ndarray) -> np.ndarray:
    """Moves RGB away from its luma by factors [k], [k, 3, 3]: 0 gives gray, 1 changes nothing."""
    each = factor[:, None, None]
    return each * np.eye(3) + (1 - each) * np.tile(_LUMA, (3, 1))


def _then(
    color: np.ndarray, rows: np.ndarray, matrix: np.ndarray, shift: np.ndarray | float = 0.0
) -> None:
    """Composes the map x -> matrix x + shift onto the maps in rows [k] of `color`, in place."""
    after = matrix @ color[rows]
    after[:, :, 3] += np.reshape(shift, (-1, 1))
    color[rows] = after


def blur_sigma(window: np.ndarray) -> np.ndarray:
    """Returns the standard deviation, in pixels, of the Gaussian of a window (OpenCV's rule)."""
    return 0.3 * ((window - 1) * 0.5 - 1) + 0.8


def apply(draws: Draws, row: int, image: np.ndarray) -> None:
    """Changes one image in place.

    Args:
        draws: Changes of a batch.
        row: Row of the batch that the image is.
        image: uint8 [size, size, 3].
    """
    size = len(image)
    top, left, height, width = draws.crop[row].tolist()
    if height * width < size * size:
        image[:top], image[top + height :] = 0, 0
        image[:, :left], image[:, left + width :] = 0, 0
    side = int(draws.side[row])
    if side != size:
        down, up = (_OPENCV_INTERPOLATION[int(each[row])] for each in (draws.down, draws.up))
        small = cv2.resize(image, (side, side), interpolation=down)
        cv2.resize(small, (size, size), dst=image, interpolation=up)
    window = int(draws.blur[row])
    if window > 1:
        image[...] = cv2.GaussianBlur(image, (window, window), float(blur_sigma(draws.blur[row])))
    color = draws.color[row]
    if (color != _IDENTITY).any():
        image[...] = cv2.transform(image, color)
    top, left, height, width = draws.erase[row].tolist()
    if height:
        image[top : top + height, left : left + width] = ERASED
    if draws.flip[row]:
        mirror(image)


def mirror(image: np.ndarray) -> None:
    """Exchanges left and right of uint8 [H, W, 3] in place, while it is still in the cache."""
    cv2.flip(image, 1, dst=image)  # it swaps pairs of pixels, so source and target may be one


def normalize_images(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Computes (x - 127.5) / 127.5 on the device and in the memory layout of `images`.

    Every uint8 value less 127.5 is exact in bfloat16 and float16 too, so the only rounding is that
    of the result.

    Args:
        images: [B, 3, H, W] uint8.
        dtype: Floating dtype of the result.
    """
    return images.to(dtype).sub_(127.5).div_(127.5)
