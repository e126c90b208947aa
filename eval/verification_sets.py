"""Sets of face pairs: found before training starts, read without being trusted.

A missing target is an error before the first step, not at the first evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.decode import image_size, read_image_file
from data.pairs import read_pairs
from eval.safe_pickle import PickledArray, read_plain_pickle
from utils.errors import UserError

MIN_PAIRS = 10
"""The 10-fold protocol needs a pair per fold."""


@dataclass(frozen=True)
class VerificationSet:
    """N pairs of faces, held as they were stored: about 10 kB per image instead of 150.

    Attributes:
        name: Name of the set.
        images: 2N images, 2i and 2i + 1 being pair i: encoded files, as bytes or as uint8 arrays
            [length], or uint8 RGB pixels [H, W, 3].
        issame: [N] booleans.
        image_names: 2N names if the images are files, else None.
    """

    name: str
    images: list[bytes | NDArray[np.uint8]]
    issame: NDArray[np.bool_]
    image_names: list[str] | None = None

    def describe(self, index: int) -> str:
        """Returns how errors name image `index`."""
        name = "" if self.image_names is None else f" ({self.image_names[index]})"
        return f"verification set {self.name}, image {index}{name}"

    @property
    def num_pairs(self) -> int:
        """Number of pairs."""
        return len(self.issame)


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------


def find_verification_sets(val_dir: str | Path, targets: Iterable[str]) -> list[Path]:
    """Returns paths of the `.bin` files of `targets`, in their order.

    Args:
        val_dir: Folder of the files.
        targets: Names such as "lfw" or "lfw.bin".

    Raises:
        UserError: A target is missing or named twice. The message names every missing
            target, the folder that was searched and the sets in it.
    """
    directory = Path(val_dir)
    names = [target.removesuffix(".bin") for target in targets]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"verification targets named twice: {', '.join(repeated)}")
    paths = [directory / f"{name}.bin" for name in names]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing:
        if directory.is_dir():
            there = ", ".join(sorted(path.stem for path in directory.glob("*.bin"))) or "none"
            found = f"sets there: {there}"
        else:
            found = "no such directory"
        raise UserError(
            f"verification targets not found: {', '.join(missing)} (searched {directory} for "
            f"<target>.bin; {found}). Put the files there, point val_dir at them, or shorten "
            "val_targets"
        )
    return paths


def load_verification_set(
    path: str | Path, name: str | None = None, input_size: int | None = None
) -> VerificationSet:
    """Reads a `.bin` set: a pickle of (2N images, N labels).

    It reads what InsightFace ships (Python 2 pickles included) and what `scripts/pack.py --pairs`
    writes. The pickle may hold lists, tuples, bytes, booleans, 0 and 1, and numpy arrays of plain
    integers; nothing in it is ever executed.

    Args:
        path: Path of the file.
        name: Name of the set; None means the file's stem.
        input_size: Pixels. If given, every image's header is read too, so that a set of another
            size is an error now and not at the first evaluation.

    Raises:
        UserError: The file has other content or another structure; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a .bin set")
    content = read_plain_pickle(path)
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise UserError(
            f"{path}: holds {_kind(content)}; a set is a pair (list of 2N images, list of N labels)"
        )
    issame = _read_labels(path, content[1])
    images = _read_images(path, content[0])
    if len(images) != 2 * len(issame):
        raise UserError(
            f"{path}: {len(images)} images for {len(issame)} labels; "
            "there must be two images per label"
        )
    if len(issame) < MIN_PAIRS:
        raise UserError(
            f"{path}: {len(issame)} pairs; the 10-fold protocol needs at least {MIN_PAIRS}"
        )
    if input_size is not None:
        _check_sizes(path, images, input_size)
    return VerificationSet(name or path.stem, images, issame)


def load_pairs(pairs_file: str | Path, folder: str | Path) -> VerificationSet:
    """Reads a set from a pairs file and the folder of its images, for the layouts of `data.pairs`.

    Args:
        pairs_file: Path of the pairs file.
        folder: Folder of the images.

    Raises:
        UserError: A pair cannot be read; the message names file and line.
    """
    pairs_file, folder = Path(pairs_file), Path(folder)
    images: list[bytes | NDArray[np.uint8]] = []
    names: list[str] = []
    pairs = read_pairs(pairs_file)
    read: dict[str, bytes] = {}  # an image may be in many pairs
    for pair in pairs:
        for name in pair.paths:
            if name not in read:
                where = f"{pairs_file}, line {pair.line}: {folder / name}"
                read[name] = read_image_file(folder / name, where)
            images.append(read[name])
            names.append(name)
    if len(pairs) < MIN_PAIRS:
        raise UserError(
            f"{pairs_file}: {len(pairs)} pairs; the 10-fold protocol needs at least {MIN_PAIRS}"
        )
    same = np.array([pair.same for pair in pairs], dtype=np.bool_)
    return VerificationSet(pairs_file.stem, images, same, names)


def _check_sizes(path: Path, images: list[bytes | NDArray[np.uint8]], input_size: int) -> None:
    for index, image in enumerate(images):
        where = f"{path}, image {index}"
        if isinstance(image, bytes) or image.ndim == 1:
            height, width = image_size(memoryview(image), where)
        else:
            height, width = image.shape[:2]
        if (height, width) != (input_size, input_size):
            raise UserError(
                f"{where}: {height} x {width} pixels; the model takes {input_size} x {input_size}. "
                "Pack the set again at that size"
            )


def _read_labels(path: Path, labels: Any) -> NDArray[np.bool_]:
    if isinstance(labels, PickledArray):
        if labels.array.ndim == 1 and np.isin(labels.array, (0, 1)).all():
            return labels.array.astype(np.bool_)
        labels = labels.array
    if not isinstance(labels, (list, tuple)):
        raise UserError(f"{path}: labels are {_kind(labels)}; allowed is a list")
    for index, label in enumerate(labels):
        if not (isinstance(label, (bool, int)) and label in (0, 1)):
            raise UserError(f"{path}: label {index} is {_kind(label)}; allowed are True and False")
    return np.array(labels, dtype=np.bool_)


def _read_images(path: Path, images: Any) -> list[bytes | NDArray[np.uint8]]:
    if isinstance(images, PickledArray) and images.array.ndim == 4:  # [2N, H, W, 3]
        images = list(images.array)
    if not isinstance(images, (list, tuple)):
        raise UserError(f"{path}: images are {_kind(images)}; allowed is a list")
    return [_read_image(path, index, image) for index, image in enumerate(images)]


def _read_image(path: Path, index: int, image: Any) -> bytes | NDArray[np.uint8]:
    if isinstance(image, PickledArray):
        image = image.array
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 3 and image.shape[2] == 3 and image.size:
            return image
        if image.ndim == 1 and image.size:
            return image
    elif isinstance(image, bytes) and image:
        return image
    elif isinstance(image, bytearray) and image:
        return np.frombuffer(image, np.uint8)  # a view: a file may name one object a million times
    raise UserError(
        f"{path}: image {index} is {_kind(image)}; allowed are the bytes of an image file and "
        "uint8 arrays [height, width, 3]"
    )


def _kind(value: Any) -> str:
    """Describes a value of a hostile file in a few words, without printing its content."""
    if isinstance(value, PickledArray):
        value = value.array
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    if isinstance(value, int):
        return f"the integer {value}" if -(10**6) < value < 10**6 else "a large integer"
    length = f" of length {len(value)}" if hasattr(value, "__len__") else ""
    return f"a {type(value).__name__}{length}"
