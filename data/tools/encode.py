"""Images to the JPEGs that record sets hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from data.decode import ImageError, decode_image, read_image_file

DEFAULT_QUALITY = 95


class Fitted(NamedTuple):
    """A JPEG of the size asked for, and whether it had to be encoded anew."""

    encoded: bytes
    reencoded: bool


def fit_image(encoded: bytes, where: str, size: int, quality: int | None) -> Fitted:
    """The image as a JPEG of size x size pixels.

    A JPEG of the right size is kept byte for byte unless a quality is asked for. Other sizes are
    cropped to the centerd square and resized. Every image is decoded once, so that a damaged one
    is found now. Raises ImageError.
    """
    image = decode_image(encoded, where)
    if image.shape[:2] == (size, size) and quality is None and encoded[:2] == b"\xff\xd8":
        return Fitted(encoded, False)
    quality = DEFAULT_QUALITY if quality is None else quality
    return Fitted(encode_jpeg(fit_pixels(image, size), quality), True)


def fit_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """The centerd square of uint8 [H, W, 3], resized to [size, size, 3]."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(square, (size, size), interpolation=interpolation)


def encode_jpeg(image: np.ndarray, quality: int = DEFAULT_QUALITY) -> bytes:
    """RGB uint8 [H, W, 3] as JPEG, colors at full resolution."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


class FitTask(NamedTuple):
    """Image files for one worker to read and fit."""

    paths: Sequence[str]
    size: int
    quality: int | None


def fit_files(task: FitTask) -> list[Fitted | str]:
    """`fit_image` of every file; a string says why one cannot be used. Run by workers."""
    results: list[Fitted | str] = []
    for path in task.paths:
        try:
            results.append(fit_image(read_image_file(Path(path)), path, task.size, task.quality))
        except ImageError as error:
            results.append(str(error))
    return results
