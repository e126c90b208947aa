"""Data sets of images by index: records, class folders, a generator.

Threads share a data set: after construction it only reads. It never resizes, relabels or skips.
What does not fit is an error that names the file, the record and the remedy.
"""

from __future__ import annotations

import bisect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cache import Cached, open_or_build, stamp_of
from data.decode import ImageError, ImageSizeError, decode_into, empty_pixels, read_image_file
from data.fingerprint import Sample, sample_bytes, sample_file
from data.index import Property, open_index, read_property
from data.order import derive_key, hash_indices
from data.recordio import (
    MAX_EXACT_LABEL,
    RECORD_HEADER,
    RecordHeader,
    RecordReader,
    class_of,
    unpack_record,
)
from utils.errors import UserError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_OF_IMAGE, _OF_CLASS = derive_key(1), derive_key(2)
_KEEP_LABELS_FROM = 100_000  # images; fewer are read again in a second
_LABELS_AT_ONCE = 1 << 16
_PROGRESS_FROM = 200_000  # records from which counting labels takes long enough to show a bar


class DataError(UserError):
    """The data set cannot be trained on as it is; the message says what to change."""


class MissingDataError(DataError, FileNotFoundError):
    """A file or folder of a data set does not exist."""


class ImageDataset(ABC):
    """Numbered images with labels, as the loaders need them. Threads share one: it only reads.

    Attributes:
        num_classes: Number of classes; labels are in [0, num_classes).
        input_size: Height and width of the images in pixels.
    """

    num_classes: int
    input_size: int  # height and width in pixels

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of images."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Says where image `index` comes from, as errors name it."""

    @abstractmethod
    def read_into(self, index: int, out: np.ndarray) -> int:
        """Decodes image `index` as RGB and returns its label in [0, num_classes).

        Args:
            index: Number of the image.
            out: uint8 [input_size, input_size, 3], which receives the pixels.
        """

    @abstractmethod
    def labels(self) -> np.ndarray:
        """Returns the label of every image, int32 or int64 [images], read-only.

        The first call may take long.
        """

    def read_encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """Reads the encoded bytes of image `index` and its label in [0, num_classes)."""
        raise NotImplementedError(f"{self.describe(index)} has no encoded bytes")

    def read(self, index: int) -> tuple[np.ndarray, int]:
        """Reads image `index` as RGB uint8 [input_size, input_size, 3], and its label."""
        image = empty_pixels(self.input_size, self.input_size, 3)
        return image, self.read_into(index, image)

    def samples(self) -> list[Sample]:
        """Returns what tells this set from others, reading little (data/fingerprint.py)."""
        return [sample_bytes(type(self).__name__, f"{len(self)} {self.num_classes}".encode())]

    def find(self, name: str) -> int:
        """Returns the number of the image that an exclusion list calls `name`.

        Raises:
            DataError: The set has no such image.
        """
        raise DataError(f"image {name!r}: these images have no names")

    def find_class(self, name: str) -> int:
        """Returns the label that an exclusion list calls `name`; here a name is a number.

        Raises:
            DataError: The set has no such class.
        """
        if not (name.isdigit() and int(name) < self.num_classes):
            raise DataError(f"class {name!r}: allowed are 0 to {self.num_classes - 1}")
        return int(name)

    def will_need(self, begin: int, end: int) -> None:  # noqa: B027 - nothing to do is right
        """Announces that images begin..end-1 are wanted soon, so that they may be fetched."""


class RecordDataset(ImageDataset):
    """Images of `train.rec` with `train.idx` and, if it exists, `property`.

    The class of a record with several labels is the first label.

    Args:
        root: Folder that holds the files, or the path of a `.rec` file with its `.idx` beside it.
        num_classes: Number of classes against which labels are checked, record by record. None
            takes it from `property` or, without one, from the largest label, which reads every
            record's header.
        input_size: Height and width in pixels that every image, and `property`, must have.

    Raises:
        DataError: The set is empty or does not fit the arguments.
        MissingDataError: A file does not exist.
        RecordError: A file is damaged.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes: int | None = None,
        input_size: int = 112,
    ) -> None:
        path = Path(root)
        self.path_rec = path if path.suffix == ".rec" else path / "train.rec"
        self.path_idx = self.path_rec.with_suffix(".idx")
        self.input_size = input_size
        for wanted in (self.path_rec, self.path_idx):
            if not wanted.is_file():
                raise MissingDataError(
                    f"{wanted} does not exist. A record set is {self.path_rec.name} and "
                    f"{self.path_idx.name} in one folder; check the path (`rec` in the config), or "
                    "make them from class folders: python scripts/pack.py FOLDER OUT. A lost .idx "
                    "is rebuilt from the .rec by python scripts/doctor.py --rebuild-index"
                )
        self.reader = RecordReader(self.path_rec)
        self.index = open_index(self.path_idx, self.reader)
        if not len(self.index):
            raise DataError(f"{self.path_rec}: holds no image. Pack the set anew.")
        self.num_classes = self._resolve_num_classes(num_classes)

    def _resolve_num_classes(self, wanted: int | None) -> int:
        path_property = self.path_rec.with_name("property")
        stated: Property | None = None
        if path_property.is_file():
            stated = read_property(path_property)
            self._check_stated_size(stated, path_property)
        if wanted is None:
            return stated.num_classes if stated else self._count_classes()
        if stated:
            check_num_classes(wanted, stated.num_classes, str(path_property))
        return wanted

    def _check_stated_size(self, stated: Property, path: Path) -> None:
        if (stated.height, stated.width) == (self.input_size, self.input_size):
            return
        if stated.height == stated.width:
            remedy = f"Set input_size={stated.height}, or pack"
        else:
            remedy = "Pack"
        raise DataError(
            f"{path}: says its images are {stated.height} x {stated.width} pixels; the network "
            f"takes {self.input_size} x {self.input_size}. {remedy} the set again: "
            f"python scripts/pack.py FOLDER OUT --size {self.input_size}"
        )

    def _count_classes(self) -> int:
        self.num_classes = 2**63  # until it is known, every label is allowed
        return int(self.labels().max()) + 1

    @property
    def keys(self) -> np.ndarray:
        """Keys of the images' records, int64 [images]."""
        return self.index.keys

    @property
    def offsets(self) -> np.ndarray:
        """Byte offsets of the images' records, int64 [images]."""
        return self.index.offsets

    def labels(self) -> np.ndarray:
        """Reads the labels from every record's header once and caches them; see ImageDataset."""
        if len(self) < _KEEP_LABELS_FROM:
            return self._read_labels()
        stamp = {"of": "labels", **stamp_of(self.path_rec, self.path_idx)}

        def build() -> Cached:
            return Cached({}, {"labels": self._read_labels()})

        labels = open_or_build(self.path_rec, ".labels.cache", stamp, build).arrays["labels"]
        largest = int(labels.max(initial=-1))
        if len(labels) != len(self) or largest >= self.num_classes:
            self._label(self._header(int(labels.argmax())), int(labels.argmax()), self.num_classes)
        return labels

    def _read_labels(self) -> np.ndarray:
        labels = np.empty(len(self), np.int64)
        hidden = True if len(self) < _PROGRESS_FROM else None  # None: shown on a terminal
        with tqdm(total=len(self), desc="reading labels", unit=" records", disable=hidden) as bar:
            for begin in range(0, len(self), _LABELS_AT_ONCE):
                offsets = self.index.offsets[begin : begin + _LABELS_AT_ONCE]
                found, sure = self.reader.read_classes(offsets)
                sure &= found < self.num_classes
                for row in np.flatnonzero(~sure).tolist():
                    index = begin + row
                    found[row] = self._label(self._header(index), index, self.num_classes)
                labels[begin : begin + len(found)] = found
                bar.update(len(found))
        return labels if labels.max() >= 2**31 else labels.astype(np.int32)

    def _header(self, index: int) -> RecordHeader:
        return self.reader.read_header(self.index.place(index)[0], self.index.key(index))

    def __len__(self) -> int:
        return len(self.index)

    def samples(self) -> list[Sample]:
        """Samples the beginning and end of each file; see ImageDataset."""
        files = (self.path_rec, self.path_idx, self.path_rec.with_name("property"))
        return [sample_file(path) for path in files if path.is_file()]

    def describe(self, index: int) -> str:
        """Returns file, key and byte offset of image `index`."""
        return self.reader.where(int(self.index.offsets[index]), self.index.key(index))

    def find(self, name: str) -> int:
        """Finds an image by the key of its record; see ImageDataset."""
        index = self.index.find(int(name)) if name.isdigit() else None
        if index is None:
            raise DataError(f"image {name!r}: no image has this key in {self.path_idx}")
        return index

    def read_encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """See ImageDataset.

        Raises:
            RecordError: The record is damaged.
            DataError: The label does not fit.
        """
        offset, end = self.index.place(index)
        key = self.index.key(index)
        payload = self.reader.read_at(offset, key, end)
        if len(payload) >= RECORD_HEADER.size:
            flag, label, _, _ = RECORD_HEADER.unpack_from(payload)
            if flag == 0 and 0 <= label < min(self.num_classes, MAX_EXACT_LABEL):
                usual = int(label)
                if usual == label:  # nearly every record; the code below handles the others
                    return memoryview(payload)[RECORD_HEADER.size :], usual
        header, encoded = unpack_record(payload, self.reader.where(offset, key))
        return encoded, self._label(header, index, self.num_classes)

    def read_into(self, index: int, out: np.ndarray) -> int:
        """See ImageDataset.

        Raises:
            RecordError: The record is damaged.
            ImageError: The image cannot be decoded.
            DataError: The label or the size of the image does not fit.
        """
        encoded, label = self.read_encoded(index)
        _decode(encoded, out, self, index)
        return label

    def will_need(self, begin: int, end: int) -> None:
        """Lets the kernel read these records ahead in one request; see ImageDataset."""
        self.reader.will_need(*self.index.span(begin, end))

    def _label(self, header: RecordHeader, index: int, num_classes: int | None) -> int:
        return check_label(class_of(header), num_classes, lambda: self.describe(index))


class FolderDataset(ImageDataset):
    """Images of `root/<class>/<image>`: the class folders in sorted order get the labels 0, 1, ...

    Hidden files are ignored. Other files that are not images are counted in a warning. The class is
    meant for up to some millions of images; pack larger sets (scripts/pack.py).

    Args:
        root: Folder of the class folders.
        num_classes: Number of classes, at least the number of folders; None means that number.
        input_size: Height and width in pixels that every image must have.

    Attributes:
        class_names: Folder name of each label.
        files: File name of each image.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes: int | None = None,
        input_size: int = 112,
    ) -> None:
        self.root = Path(root)
        self.input_size = input_size
        self.class_names, self.files, self._labels = list_class_folders(self.root)
        found = len(self.class_names)
        if num_classes is not None:
            check_num_classes(num_classes, found, str(self.root))
        self.num_classes = found if num_classes is None else num_classes

    def __len__(self) -> int:
        return len(self.files)

    def samples(self) -> list[Sample]:
        """Hashes all names of classes and files, and which belong together; see ImageDataset."""
        names = "\n".join((*self.class_names, *self.files)).encode(errors="surrogateescape")
        return [sample_bytes("class folders", names + self._labels.tobytes())]

    def describe(self, index: int) -> str:
        """Returns the path of image `index`."""
        return str(self.path(index))

    def path(self, index: int) -> Path:
        """Returns the path of image `index`."""
        return self.root / self.class_names[self._labels[index]] / self.files[index]

    def labels(self) -> np.ndarray:
        """See ImageDataset."""
        return self._labels

    def find(self, name: str) -> int:
        """Finds an image by <class folder>/<file>; see ImageDataset."""
        folder, _, file = name.partition("/")
        label = self.find_class(folder)
        begin, end = np.searchsorted(self._labels, (label, label + 1))
        at = bisect.bisect_left(self.files, file, int(begin), int(end))
        if at == end or self.files[at] != file:
            raise DataError(f"image {name!r}: there is no such file below {self.root}")
        return at

    def find_class(self, name: str) -> int:
        """Finds a class by the name of its folder; see ImageDataset."""
        at = bisect.bisect_left(self.class_names, name)
        if at == len(self.class_names) or self.class_names[at] != name:
            raise DataError(f"class {name!r}: there is no such folder in {self.root}")
        return at

    def read_encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """See ImageDataset.

        Raises:
            ImageError: The file cannot be read.
        """
        return read_image_file(self.path(index)), int(self._labels[index])

    def read_into(self, index: int, out: np.ndarray) -> int:
        """See ImageDataset.

        Raises:
            ImageError: The image cannot be read or decoded.
            DataError: The size of the image does not fit.
        """
        encoded, label = self.read_encoded(index)
        _decode(encoded, out, self, index)
        return label


class SyntheticDataset(ImageDataset):
    """Images made of noise, for benchmarks and smoke runs.

    Image and label depend on the index only. Half of each image is its class's own pattern, so that
    a network can learn it.

    Args:
        num_classes: Number of classes.
        num_images: Number of images.
        input_size: Height and width of the images in pixels.
    """

    def __init__(self, num_classes: int, num_images: int, input_size: int = 112) -> None:
        self.num_classes, self.num_images, self.input_size = num_classes, num_images, input_size
        self._pixels = input_size * input_size * 3
        # One block of noise; every image is a mixture of two slices of it.
        self._num_places = 1 << 18
        rng = np.random.default_rng(0)
        self._noise = rng.integers(0, 256, self._num_places + self._pixels, dtype=np.uint8)

    def __len__(self) -> int:
        return self.num_images

    def describe(self, index: int) -> str:
        """Names the number of the image, since there is no file."""
        return f"synthetic image {index}"

    def labels(self) -> np.ndarray:
        """See ImageDataset."""
        draws = hash_indices(np.arange(self.num_images), _OF_IMAGE)
        return (draws % np.uint64(self.num_classes)).astype(np.int64)

    def read_into(self, index: int, out: np.ndarray) -> int:
        """See ImageDataset."""
        draws = hash_indices(np.array([index]), _OF_IMAGE)
        label = int(draws[0] % np.uint64(self.num_classes))
        of_class = hash_indices(np.array([label]), _OF_CLASS)
        image = self._slice(int(draws[0] >> np.uint64(40)))
        pattern = self._slice(int(of_class[0] >> np.uint64(40)))
        out[...] = ((image >> 1) + (pattern >> 1)).reshape(out.shape)
        return label

    def samples(self) -> list[Sample]:
        """See ImageDataset. The name is this class's first name, because checkpoints hold it."""
        return [sample_bytes("SyntheticSource", f"{len(self)} {self.num_classes}".encode())]

    def _slice(self, place: int) -> np.ndarray:
        place %= self._num_places
        return self._noise[place : place + self._pixels]


def list_class_names(root: Path, include: tuple[str, ...] = ("*",)) -> list[str]:
    """Returns the names of the class folders that match a pattern, sorted.

    Args:
        root: Folder of the class folders.
        include: Shell patterns; a folder has to match one of them.

    Raises:
        MissingDataError: `root` is not a folder.
        DataError: No class folder matches, or the folder cannot be listed.
    """
    if not root.is_dir():
        raise MissingDataError(
            f"{root} is not a folder. Expected FOLDER/<class>/<image>, one folder per identity, or "
            "a folder that holds train.rec and train.idx; check the path (`rec` in the config)"
        )
    names = sorted(
        entry.name
        for entry in _visible_entries(root)
        if entry.is_dir() and any(fnmatchcase(entry.name, pattern) for pattern in include)
    )
    if not names:
        raise DataError(
            f"{root}: no class folder in it. Expected FOLDER/<class>/<image>, one folder per "
            "identity, or train.rec and train.idx"
        )
    return names


def list_class_folders(
    root: Path, include: tuple[str, ...] = ("*",)
) -> tuple[list[str], list[str], np.ndarray]:
    """Lists the class folders that match a pattern, and their images, both in sorted order.

    Args:
        root: Folder of the class folders.
        include: Shell patterns; a folder has to match one of them.

    Returns:
        The names of the classes, the file name of every image, and the label of every image
        (int64).

    Raises:
        MissingDataError: `root` is not a folder.
        DataError: No class folder matches, one has no image, or a folder cannot be listed.
    """
    names = list_class_names(root, include)
    files: list[str] = []
    counts: list[int] = []
    ignored = 0
    for name in names:
        entries = _visible_entries(root / name)
        images = sorted(entry.name for entry in entries if _is_image(entry))
        ignored += len(entries) - len(images)
        if not images:
            raise DataError(
                f"{root / name}: no image in this class folder (looked for "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; subfolders are not searched). Remove the "
                "folder or put its images directly into it."
            )
        files += images
        counts.append(len(images))
    if ignored:
        log.warning("%s: %d entries in class folders are no images and are left out", root, ignored)
    return names, files, np.repeat(np.arange(len(names), dtype=np.int64), counts)


def _visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be listed ({error.strerror or error}). Make the folder readable or "
            "remove it."
        ) from error


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Judges by the file's name, unless it is a folder, a pipe or the like.

    An entry that cannot be examined counts as an image: reading it gives the error that says why.
    """
    if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
        return False
    try:
        return entry.is_file() or not os.path.exists(entry.path)
    except OSError:
        return True


def check_label(label: float, num_classes: int | None, describe: Callable[[], str]) -> int:
    """Converts a record's class to an int in [0, num_classes), exact beyond 2**24 too.

    Args:
        label: Class from `class_of`.
        num_classes: Number of classes; None allows any whole number from 0 on.
        describe: Names the record in errors.

    Raises:
        DataError: The label is not a class in that range.
    """
    wide = isinstance(label, float) and MAX_EXACT_LABEL < label < 2.0**63
    limit = 2**63 if num_classes is None else num_classes
    if not wide and 0 <= label < limit and label == int(label):
        return int(label)
    if wide:
        allowed = (
            f"float32 labels are exact only up to {MAX_EXACT_LABEL}, and this record does not "
            "keep its class as id2 too"
        )
        remedy = "pack the set anew with scripts/pack.py"
    else:
        allowed = "allowed are whole numbers " + (
            "from 0" if num_classes is None else f"from 0 to {num_classes - 1}"
        )
        remedy = "set num_classes to more than the largest label, or pack the set anew"
    shown = str(label) if isinstance(label, int) else f"{label:g}"
    raise DataError(f"{describe()}: label {shown}; {allowed}. To go on: {remedy}.")


def check_num_classes(wanted: int, needed: int, where: str) -> None:
    """Refuses fewer classes than a set has. More are allowed, for padding to a round number.

    Args:
        wanted: Number of classes in the config.
        needed: Number of classes of the set.
        where: Name of the set in the error.

    Raises:
        DataError: `wanted` is less than `needed`.
    """
    if wanted < needed:
        raise DataError(
            f"num_classes={wanted}, but {where} has {needed} classes. Set num_classes={needed} "
            "(or more), or num_classes='auto'."
        )


def _decode(encoded: bytes | memoryview, out: np.ndarray, source: ImageDataset, index: int) -> None:
    try:
        decode_into(encoded, out, "")
    except ImageError:
        try:  # again, for an error that names the image: naming every image would cost time
            decode_into(encoded, out, source.describe(index))
        except ImageSizeError as error:
            raise DataError(str(error)) from error
