"""Gives the tools the records of a set: payloads, classes and images of any size.

Training reads through data/datasets.py, which decodes and insists on one size. Tools that copy,
shuffle, relabel or check a set need the records themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.datasets import MissingDataError, check_label
from data.decode import image_size
from data.index import (
    Property,
    RecordIndex,
    image_lines,
    is_header_record,
    read_index,
    read_property,
)
from data.recordio import (
    MAX_EXACT_LABEL,
    RecordReader,
    class_of,
    pack_record,
    unpack_header,
    unpack_record,
)
from data.tools.record_writer import IM2REC, INSIGHTFACE

_CHUNK = 1 << 16  # records whose classes are read at once


class ImageRecord(NamedTuple):
    """One record that is an image.

    Attributes:
        key: Key of the record.
        class_id: Class of the image.
        payload: Payload of the record.
        image: View of the encoded image in `payload`.
    """

    key: int
    class_id: int
    payload: bytes
    image: memoryview


class ImageRecords:
    """The images of a record set by position.

    Args:
        root: Folder with train.rec and train.idx, or a .rec file.

    Attributes:
        keys: [n] int64 in the order of the file, which is the fastest to read.
        offsets: [n] int64 in bytes.
        style: "insightface" if key 0 is a header record, else "im2rec".

    Raises:
        MissingDataError: A file does not exist.
        RecordError: A file is damaged.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.path_rec = rec_path(root)
        path_idx = self.path_rec.with_suffix(".idx")
        for wanted in (self.path_rec, path_idx):
            if not wanted.is_file():
                raise MissingDataError(
                    f"{wanted} does not exist. A record set is {self.path_rec.name} and "
                    f"{path_idx.name} in one folder; a lost index is rebuilt by: python "
                    f"scripts/doctor.py {self.path_rec.parent} --rebuild-index"
                )
        self.reader = RecordReader(self.path_rec)
        index = read_index(path_idx, self.reader.size)
        lines = image_lines(index, self.reader)
        order = np.argsort(index.offsets[lines], kind="stable")
        self.keys = np.asarray(index.keys[lines])[order]
        self.offsets = np.asarray(index.offsets[lines])[order]
        self._ends = np.append(self.offsets[1:], self.reader.size)
        self.style = INSIGHTFACE if has_header_record(index, self.reader) else IM2REC

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> ImageRecord:
        """Reads the record at a position of the file.

        Raises:
            RecordError: The record is damaged.
            DataError: The label is not a class.
        """
        key, offset = int(self.keys[position]), int(self.offsets[position])
        # Other records may lie between two images, so the end is a bound, not the length.
        payload = self.reader.read_at(offset, key, int(self._ends[position]))
        where = self.reader.where(offset, key)
        header, image = unpack_record(payload, where)
        class_id = check_label(class_of(header), None, lambda: where)
        return ImageRecord(key, class_id, payload, image)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.read, range(len(self)))

    def stated(self) -> Property:
        """Returns what the `property` file states.

        Without the file it returns 0 classes and the size of the first image.

        Raises:
            RecordError: The file or the first record is damaged.
            ImageError: The first image's header is damaged.
        """
        path = self.path_rec.with_name("property")
        if path.is_file():
            return read_property(path)
        first = self.read(0)
        return Property(0, *image_size(first.image, self.reader.where(int(self.offsets[0]))))

    def classes(self, progress: Callable[[int], object] = lambda count: None) -> np.ndarray:
        """Reads the class of every image from its header alone, int64 [n].

        Args:
            progress: Is called with the number of images done since the last call.

        Raises:
            RecordError: A record is damaged.
            DataError: A label is not a class.
        """
        found = np.empty(len(self), np.int64)
        for begin in range(0, len(self), _CHUNK):
            chunk = slice(begin, begin + _CHUNK)
            found[chunk], sure = self.reader.read_classes(self.offsets[chunk])
            for position in (begin + np.flatnonzero(~sure)).tolist():
                key, offset = int(self.keys[position]), int(self.offsets[position])
                label = class_of(self.reader.read_header(offset, key))
                where = partial(self.reader.where, offset, key)
                found[position] = check_label(label, None, where)
            progress(len(sure))
        return found


def rec_path(root: str | os.PathLike[str]) -> Path:
    """Returns the path of the .rec of a set given as its folder or as the file itself."""
    path = Path(root)
    return path if path.suffix == ".rec" else path / "train.rec"


def has_header_record(index: RecordIndex, reader: RecordReader) -> bool:
    """Returns whether the record with key 0 only describes others.

    Raises:
        RecordError: The record is damaged.
    """
    zero = np.flatnonzero(index.keys == 0)
    if not len(zero):
        return False
    payload = reader.read_at(int(index.offsets[zero[0]]), 0)
    header = unpack_header(payload, len(payload), reader.where(int(index.offsets[zero[0]]), 0))
    return is_header_record(header, len(payload))


def relabeled(payload: bytes, class_id: int) -> bytes:
    """Returns the payload with another class; ids, further labels and the image stay."""
    header, image = unpack_record(payload)
    wide = class_of(header) > MAX_EXACT_LABEL  # then id2 is its exact copy
    record_id2 = 0 if wide else header.id2
    label = class_id if header.flag == 0 else [class_id, *header.labels[1:].tolist()]
    return pack_record(bytes(image), label, header.id, record_id2)
