"""Images and records that several test modules use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from hypothesis import strategies as st

from data.recordio import MAGIC_BYTES, frame_record, pack_record
from data.tools.record_writer import RecordSetWriter
from dataset import DATA_ERRORS, Batch, DataLoader, get_dataloader

SIZE = 24
NUM_CLASSES = 5
PER_CLASS = 9
NUM_IMAGES = NUM_CLASSES * PER_CLASS
"""Of the fixtures `folder` and `records` (tests/conftest.py)."""

PAYLOADS = st.lists(
    st.one_of(st.binary(max_size=9), st.just(MAGIC_BYTES), st.just(MAGIC_BYTES[:3])), max_size=12
).map(b"".join)
"""Payloads made from pieces that contain the magic, whole and in parts, at any place."""

OLD = ("bea", "carl", "dora", "emil", "gina", "hugo", "ines")
NEW = ("anna", "carl", "dora", "fritz", "gina", "ines", "zoe")
"""Names of identities before and after a change of the training set."""

FACES: dict[str, Any] = {"num_classes": "auto", "num_image": "auto", "max_steps": 3}
"""Settings of a run on such a set, besides `rec`."""


def jpeg(number: int, size: int = SIZE) -> bytes:
    """An encoded image of its own for each number."""
    rng = np.random.default_rng(number)
    image = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (size, size))
    return simplejpeg.encode_jpeg(image, quality=90)


def loader(root: Path | str | list[Path], batch_size: int = 4, **options) -> DataLoader:
    """A loader of images of SIZE that reads in the calling thread."""
    options = {"input_size": SIZE, "seed": 3, "num_workers": 0} | options
    return get_dataloader(root, batch_size, **options)


class RecordWriter:
    """Writes a `.rec` and its `.idx` with any payloads and keys, at the end of the `with` block.

    RecordSetWriter in data/tools/ writes record sets as they should be.
    """

    def __init__(self, path_rec: Path, path_idx: Path) -> None:
        self._path_rec, self._path_idx = path_rec, path_idx
        self._records, self._lines = bytearray(), ""

    def write(self, key: int, payload: bytes) -> int:
        """Append a record and return its byte offset."""
        offset = len(self._records)
        self._records += frame_record(payload)
        self._lines += f"{key}\t{offset}\n"
        return offset

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._path_rec.write_bytes(self._records)
        self._path_idx.write_text(self._lines)


def write_set(out: Path, images: list[tuple[bytes, float]], property_line: str = "") -> Path:
    """Records of (encoded image, label) in the folder, with keys from 0."""
    with RecordWriter(out / "train.rec", out / "train.idx") as writer:
        for key, (encoded, label) in enumerate(images):
            writer.write(key, pack_record(encoded, label))
    if property_line:
        (out / "property").write_text(property_line)
    return out


def contents(batches: Iterable[Batch]) -> list[tuple[bytes, int]]:
    """(hash of the pixels, label) of every image, in order."""
    return [
        (hashlib.sha1(image.numpy().tobytes()).digest(), int(label))
        for batch in batches
        for image, label in zip(*batch, strict=True)
    ]


def collect_error(each: DataLoader) -> tuple[Exception, int]:
    """The error of an epoch and how many batches came before it; fails if there is none."""
    seen = 0
    try:
        for _ in each:
            seen += 1
    except DATA_ERRORS as error:
        return error, seen
    raise AssertionError("no error")


def write_faces(folder: Path, names: Sequence[str], images: int = 5) -> Path:
    """Class folders; an image depends on its class's name and its number only."""
    for name in names:
        (folder / name).mkdir(parents=True)
        random = np.random.default_rng(list(name.encode()))
        for number in range(images):
            image = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / name / f"{number}.png"), image)
    return folder


def write_records(folder: Path, names: Sequence[str], images: int = 5) -> Path:
    """The same faces as records, their labels in the order of `names`."""
    source = write_faces(folder.with_name(folder.name + "_faces"), names, images)
    with RecordSetWriter(folder, 32) as writer:
        for label, name in enumerate(names):
            for number in range(images):
                writer.add((source / name / f"{number}.png").read_bytes(), label)
        writer.finish(list(names))
    return folder
