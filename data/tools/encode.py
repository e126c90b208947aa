"""Converts images to the JPEGs that record sets hold."""

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
    """A JPEG of the wanted size.

    Attributes:
        encoded: The JPEG file.
        reencoded: Whether the image had to be encoded again.
    """

    encoded: bytes
    reencoded: bool


def fit_image(encoded: bytes, where: str, size: int, quality: int | None) -> Fitted:
    """Converts an image to a JPEG of size x size pixels.

    A JPEG of the right size is kept byte for byte unless a quality is given. Other sizes are
    cropped to the centered square and resized. Every image is decoded once, so that a damaged one
    is found now.

    Args:
        encoded: Content of the file.
        where: Name of the image in errors.
        size: Side in pixels.
        quality: Quality of the JPEG; None means DEFAULT_QUALITY where encoding is needed.

    Raises:
        ImageError: The image cannot be decoded.
    """
    image = decode_image(encoded, where)
    if image.shape[:2] == (size, size) and quality is None and encoded[:2] == b"\xff\xd8":
        return Fitted(encoded, False)
    quality = DEFAULT_QUALITY if quality is None else quality
    return Fitted(encode_jpeg(fit_pixels(image, size), quality), True)


def fit_pixels(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the centered square of uint8 [H, W, 3] to [size, size, 3]."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(square, (size, size), interpolation=interpolation)


def encode_jpeg(image: np.ndarray, quality: int = DEFAULT_QUALITY) -> bytes:
    """Encodes RGB uint8 [H, W, 3] as JPEG, colors at full resolution."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


class FitTask(NamedTuple):
    """Image files for one worker to read and fit.

    Attributes:
        paths: Paths of the files.
        size: Side in pixels.
        quality: See `fit_image`.
    """

    paths: Sequence[str]
    size: int
    quality: int | None


def fit_files(task: FitTask) -> list[Fitted | str]:
    """Applies `fit_image` to every file, in a worker; a string says why a file cannot be used."""
    results: list[Fitted | str] = []
    for path in task.paths:
        try:
            results.append(fit_image(read_image_file(Path(path)), path, task.size, task.quality))
        except ImageError as error:
            results.append(str(error))
    return results
