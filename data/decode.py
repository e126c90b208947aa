"""Decodes images to RGB pixels and refuses those that are damaged or unreasonably large."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from utils.errors import UserError

# 40 million pixels are 120 MB decoded: more than any photograph of a set, few enough for memory.
MAX_PIXELS = 40_000_000
_FORMATS = "JPEG, PNG, BMP or WebP"


class ImageError(UserError):
    """The bytes are no image that we decode; the message begins with where they came from."""


class ImageSizeError(ImageError):
    """An undamaged image has another size than the network takes."""


def read_image_file(path: Path, where: str | None = None) -> bytes:
    """Reads the bytes of an image file.

    Args:
        path: Path of the file.
        where: Beginning of the error message; None means the path.

    Raises:
        ImageError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(
            f"{where or path}: cannot be read ({error.strerror or error}). Make it readable or "
            "remove it."
        ) from error


def empty_pixels(*shape: int) -> np.ndarray:
    """Allocates uint8 memory of `shape` for decoded pixels, not initialized.

    It begins 8 bytes past a multiple of 16. libjpeg-turbo writes rows that begin at a multiple of
    32 bytes (16 without AVX2) past the cache into memory: every second row of a 112 x 112 image in
    an ordinary array. Here no row of an image whose width is a multiple of 16 begins there.
    Decoding such a face took 79 us instead of 110, a flip after it 3 us instead of 12; larger
    images take as long as before.
    """
    size = math.prod(shape)
    memory = np.empty(size + 16, np.uint8)
    begin = (8 - memory.ctypes.data) % 16
    return memory[begin : begin + size].reshape(shape)


def decode_image(encoded: bytes | bytearray | memoryview | np.ndarray, where: str) -> np.ndarray:
    """Decodes JPEG, PNG, BMP or WebP to RGB.

    Gray becomes three equal channels, CMYK is converted, transparency is dropped. JPEG is decoded
    strictly by libjpeg-turbo, which releases the GIL: a truncated image is an error, not a gray
    lower half.

    Args:
        encoded: Content of the file.
        where: Name of the image in errors (file, record).

    Returns:
        uint8 [H, W, 3], freshly allocated, contiguous.

    Raises:
        ImageError: The image is damaged, of another format, or has more than MAX_PIXELS.
    """
    data = memoryview(encoded).cast("B")
    height, width = image_size(data, where)
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise ImageError(
            f"{where}: an image of {width} x {height} pixels; allowed are 1 to {MAX_PIXELS:,} "
            "pixels. Remove it or make it smaller."
        )
    if _is_jpeg(data):
        try:
            if _is_cmyk(data):
                return _rgb_of_cmyk(simplejpeg.decode_jpeg(data, "CMYK", strict=True))
            room = empty_pixels(height, width, 3)
            return simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=room)
        except ValueError as error:
            raise _damaged_jpeg(data, error, where) from error
    if data[:4] == b"\x89PNG" and b"IEND" not in bytes(data[-16:]):
        raise ImageError(f"{where}: a PNG of {len(data)} bytes without its end. Replace it.")
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{where}: OpenCV cannot decode it ({error}). Replace it.") from error
    if image is None or image.shape != (height, width, 3):
        raise ImageError(f"{where}: a damaged image of {len(data)} bytes. Replace or remove it.")
    return image


def decode_into(
    encoded: bytes | bytearray | memoryview | np.ndarray, out: np.ndarray, where: str
) -> None:
    """Decodes an image into an array. A JPEG is written there without a copy.

    Args:
        encoded: Content of the file.
        out: uint8 [H, W, 3], contiguous.
        where: Name of the image in errors.

    Raises:
        ImageError: The image cannot be decoded.
        ImageSizeError: The image has another size than `out`.
    """
    data = memoryview(encoded).cast("B")
    if not _is_jpeg(data):
        image = decode_image(data, where)
        _check_shape(image.shape[:2], out, where)
        out[...] = image
        return
    try:
        found = simplejpeg.decode_jpeg(data, "RGB", strict=True, buffer=out)
    except ValueError as error:  # also when the image is larger than `out`
        _check_shape(image_size(data, where), out, where)
        raise _damaged_jpeg(data, error, where) from error
    _check_shape(found.shape, out, where)


def _damaged_jpeg(data: memoryview, error: Exception, where: str) -> ImageError:
    return ImageError(
        f"{where}: a damaged JPEG of {len(data)} bytes ({error}). Replace or remove it."
    )


def _check_shape(found: tuple[int, ...], out: np.ndarray, where: str) -> None:
    if found[:2] != out.shape[:2]:
        raise ImageSizeError(
            f"{where}: an image of {found[1]} x {found[0]} pixels; the network takes "
            f"{out.shape[1]} x {out.shape[0]}. Resize the set once with: "
            f"python scripts/pack.py FOLDER OUT --size {out.shape[1]}"
        )


def image_size(data: memoryview, where: str) -> tuple[int, int]:
    """Reads height and width in pixels from the header alone.

    Args:
        data: Content of the file.
        where: Name of the image in errors.

    Raises:
        ImageError: The header is damaged or of another format.
    """
    head = bytes(data[:32])
    try:
        if _is_jpeg(data):
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=True)
            return int(height), int(width)
        if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", head, 16)
            return height, width
        if head[:2] == b"BM" and struct.unpack_from("<I", head, 14)[0] >= 40:
            width, height = struct.unpack_from("<ii", head, 18)
            return abs(height), width  # a negative height: rows from the top
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp_size(head)
    except (ValueError, struct.error) as error:
        raise ImageError(
            f"{where}: the header of its image is damaged ({error}). Replace or remove it."
        ) from error
    kind = "is empty" if not head else f"begins with {head[:8].hex(' ')}"
    raise ImageError(
        f"{where}: no image we can decode ({len(data)} bytes, {kind}); allowed: {_FORMATS}. "
        "Convert or remove it."
    )


def _is_cmyk(data: memoryview) -> bool:
    return str(simplejpeg.decode_jpeg_header(data, strict=True)[2]).upper() in ("CMYK", "YCCK")


def _rgb_of_cmyk(inks: np.ndarray) -> np.ndarray:
    """Converts uint8 [H, W, 4] CMYK of a JPEG to RGB without a color profile.

    255 means no ink (Adobe's convention). A channel is what its own ink and black leave of the
    light.
    """
    black = inks[:, :, 3:].astype(np.uint16)
    return ((inks[:, :, :3] * black + 127) // 255).astype(np.uint8)


def _is_jpeg(data: memoryview) -> bool:
    return bytes(data[:2]) == b"\xff\xd8"


def _webp_size(head: bytes) -> tuple[int, int]:
    """Reads height and width of the three kinds of WebP. Source: RFC 9649, sections 2.5 to 2.7."""
    kind = head[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        return (
            int.from_bytes(head[27:30], "little") + 1,
            int.from_bytes(head[24:27], "little") + 1,
        )
    raise ValueError(f"unknown WebP chunk {kind!r}")
