"""Finds the records of a set that are images: `.idx` file, header record, `property` file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.cache import Cached, open_or_build, stamp_of
from data.recordio import (
    PART_HEADER,
    RecordError,
    RecordHeader,
    RecordReader,
    TruncatedError,
    range_of,
    unpack_record,
    unreadable,
)

log = logging.getLogger(__name__)

_CHUNK_BYTES = 16 * 1024 * 1024
_CHECKED_AT_ONCE = 1 << 20  # lines
_PROGRESS_FROM_BYTES = 64 * 1024 * 1024
CACHE_FROM_BYTES = 1024 * 1024  # a smaller index is parsed in milliseconds
_MAX_DIGITS = 18  # 10**18 fits int64
_EXACT_FLOAT32 = 2**24
_TAB, _NEWLINE, _ZERO, _NINE = 9, 10, 48, 57


class RecordIndex(NamedTuple):
    """Keys and places of records, in the order of the index's lines.

    Attributes:
        keys: [records] int64.
        offsets: [records] int64, in bytes.
    """

    keys: np.ndarray
    offsets: np.ndarray


class Property(NamedTuple):
    """Content of a `property` file.

    Attributes:
        num_classes: Number of classes.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
    """

    num_classes: int
    height: int
    width: int


class ImageIndex:
    """Key and place of every image of a set, in the order of the index; shared and read-only.

    A large index is opened from a cache beside the files (data/cache.py). All ranks of a host then
    map the same memory, 8 bytes per image (16 if the keys are not consecutive).

    Args:
        found: Arrays "offsets", and "keys" if they are not consecutive; the facts "first_key", and
            whether offsets are "increasing".

    Raises:
        RecordError: The arrays do not fit each other.
    """

    def __init__(self, found: Cached) -> None:
        facts, arrays = found
        self._offsets = arrays["offsets"]  # int64 [images + 1]: the last is where the images end
        self._keys = arrays.get("keys")  # int64 [images], or None: consecutive from first_key
        self._first_key, self._increasing = int(facts["first_key"]), bool(facts["increasing"])
        if not len(self._offsets) or (
            self._keys is not None and len(self._keys) != len(self._offsets) - 1
        ):
            raise RecordError("a cached index of no use; delete the .cache file beside the .idx")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def offsets(self) -> np.ndarray:
        """Byte offset of every image's record, int64 [images]."""
        return self._offsets[:-1]

    @property
    def keys(self) -> np.ndarray:
        """Key of every image's record, int64 [images]; computed here if they are consecutive."""
        if self._keys is not None:
            return self._keys
        return np.arange(self._first_key, self._first_key + len(self), dtype=np.int64)

    def key(self, image: int) -> int:
        """Returns the key of the record of image `image`."""
        return self._first_key + image if self._keys is None else int(self._keys[image])

    def span(self, begin: int, end: int) -> tuple[int, int]:
        """Returns the bytes (first, end) within which the records of images begin..end-1 lie."""
        places = self._offsets[begin : end + (1 if self._increasing else 0)]
        return int(places.min()), int(places.max())

    def find(self, key: int) -> int | None:
        """Returns the image whose record has this key, or None."""
        if self._keys is None:
            image = key - self._first_key
            return image if 0 <= image < len(self) else None
        found = np.flatnonzero(self._keys == key)
        return int(found[0]) if len(found) else None

    def place(self, image: int) -> tuple[int, int | None]:
        """Returns the byte offset of an image's record, and the offset of the next record.

        The second is None if the offsets of the index do not increase.

        Raises:
            RecordError: The cached offsets are not in order.
        """
        offset = int(self._offsets[image])
        if not self._increasing:
            return offset, None
        end = int(self._offsets[image + 1])
        if offset >= end or (image and offset <= self._offsets[image - 1]):
            raise RecordError(
                f"record with key {self.key(image)} at byte {offset}: the cached index is damaged; "
                "delete the .cache file beside the .idx"
            )
        return offset, end


def open_index(path_idx: str | os.PathLike[str], reader: RecordReader) -> ImageIndex:
    """Finds the images of a `.rec` by its index, from a cache if the index is large.

    Args:
        path_idx: Path of the `.idx` file.
        reader: Reader of the `.rec` file.

    Raises:
        RecordError: A file is damaged or cannot be read.
    """
    path = Path(path_idx)
    try:
        if path.stat().st_size < CACHE_FROM_BYTES:
            return ImageIndex(_index_images(path, reader))
        stamp = {"of": "images", **stamp_of(path, reader.path)}
        found = open_or_build(path, ".cache", stamp, lambda: _index_images(path, reader))
    except OSError as error:
        raise unreadable(path, error) from error
    return ImageIndex(found)


def _index_images(path: Path, reader: RecordReader) -> Cached:
    index = read_index(path, reader.size)
    _check_end(path, index, reader)

    lines = image_lines(index, reader)
    keys, offsets = index.keys[lines], index.offsets[lines]
    end = reader.size
    if isinstance(lines, slice) and lines.stop < len(index.offsets):
        end = int(index.offsets[lines.stop])
    increasing = end > offsets[-1] and _increases(offsets) if len(offsets) else True
    arrays = {"offsets": np.append(offsets, end)}
    if not len(keys) or keys[-1] - keys[0] != len(keys) - 1 or not _increases(keys):
        arrays["keys"] = keys
    facts = {"first_key": int(keys[0]) if len(keys) else 0, "increasing": bool(increasing)}
    return Cached(facts, arrays)


def _check_end(path: Path, index: RecordIndex, reader: RecordReader) -> None:
    """Finds by its last record that a file was truncated, already when it is opened.

    Any other damage of that record is only logged: it is an error, or skipped, when it is read.

    Raises:
        TruncatedError: The last record reaches past the end of the file.
    """
    last = int(index.offsets.argmax())
    offset, key = int(index.offsets[last]), int(index.keys[last])
    try:
        end = reader.end_of(offset, key)
    except TruncatedError:
        raise
    except RecordError as error:
        log.warning("%s", error)
        return
    if end != reader.size:
        log.warning(
            "%s: ends with key %d, but %s goes on for %d bytes. If it was cut off, copy it again "
            "or rebuild it: python scripts/doctor.py --rebuild-index",
            path,
            key,
            reader.path.name,
            reader.size - end,
        )


def _increases(values: np.ndarray) -> bool:
    """Returns whether every value is larger than the one before, looking at one piece at a time."""
    piece = 1 << 20
    return all(
        bool((np.diff(values[begin : begin + piece + 1]) > 0).all())
        for begin in range(0, len(values), piece)
    )


def read_index(path_idx: str | os.PathLike[str], rec_size: int) -> RecordIndex:
    """Parses and checks an `.idx` file of lines `key<tab>offset`.

    Offsets must be multiples of 4 inside the `.rec` file. Keys and offsets must be distinct;
    neither has to be sorted.

    Args:
        path_idx: Path of the file.
        rec_size: Size of the `.rec` file in bytes.

    Raises:
        RecordError: The file cannot be read, or a line is wrong; the message names it.
    """
    path = Path(path_idx)
    try:
        keys, offsets = _read_lines(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not len(keys):
        raise RecordError(f"{path}: the index is empty. Copy it again, or pack the set anew.")
    for begin in range(0, len(offsets), _CHECKED_AT_ONCE):
        part = offsets[begin : begin + _CHECKED_AT_ONCE]
        wrong = (part % 4 != 0) | (part > rec_size - PART_HEADER.size)
        if wrong.any():
            line = begin + int(wrong.argmax())
            raise RecordError(
                f"{path}, line {line + 1}: key {keys[line]} is said to start at byte "
                f"{offsets[line]}; allowed are multiples of 4 below the {rec_size} bytes of the "
                ".rec. The .rec was cut off, or this index belongs to another file; copy both "
                "again."
            )
    for values, name in ((keys, "key"), (offsets, "byte offset")):
        if _increases(values):
            continue
        order = np.argsort(values, kind="stable")
        twice = np.flatnonzero(np.diff(values[order]) == 0)
        if len(twice):
            line = int(order[twice[0] + 1])
            raise RecordError(
                f"{path}, line {line + 1}: {name} {values[line]} appears a second time; keys and "
                "offsets must be distinct. Pack the set anew."
            )
    return RecordIndex(keys, offsets)


def _read_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads keys and offsets, int64 [lines] each, one chunk of the file at a time.

    Raises:
        RecordError: A line is wrong.
        OSError: The file cannot be read.
    """
    lines, rest = 0, b""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at_once = max(1, min(_CHUNK_BYTES, size))
        with tqdm(
            total=size,
            desc=f"reading {path.name}",
            unit="B",
            unit_scale=True,
            disable=True if size < _PROGRESS_FROM_BYTES else None,
        ) as bar:
            num_lines = 0
            while chunk := file.read(at_once):
                num_lines += chunk.count(b"\n")
            file.seek(0)
            keys, offsets = np.empty(num_lines + 1, np.int64), np.empty(num_lines + 1, np.int64)

            def keep(text: bytes) -> int:
                pairs = _parse_lines(text, path, lines)
                keys[lines : lines + len(pairs)] = pairs[:, 0]
                offsets[lines : lines + len(pairs)] = pairs[:, 1]
                return len(pairs)

            while chunk := file.read(at_once):
                text, newline, rest = (rest + chunk).rpartition(b"\n")
                if not newline and len(rest) > _CHUNK_BYTES:
                    raise RecordError(
                        f"{path}, line {lines + 1}: longer than {_CHUNK_BYTES} bytes; expected "
                        "'key<tab>offset'. This is not an index; give the .idx that belongs to "
                        "the .rec"
                    )
                if text:
                    lines += keep(text + newline)
                bar.update(len(chunk))
    if rest.strip():
        lines += keep(rest + b"\n")
    return keys[:lines], offsets[:lines]


def _parse_lines(text: bytes, path: Path, lines_before: int) -> np.ndarray:
    """Parses whole lines to int64 [lines, 2]: the usual form vectorized, other lines one by one."""
    raw = np.frombuffer(text, np.uint8)
    separators = np.flatnonzero((raw < _ZERO) | (raw > _NINE))
    kinds = raw[separators]
    lengths = np.diff(separators, prepend=-1) - 1
    usual = (
        len(kinds) % 2 == 0
        and bool((kinds[0::2] == _TAB).all())
        and bool((kinds[1::2] == _NEWLINE).all())
        and bool(((lengths > 0) & (lengths <= _MAX_DIGITS)).all())
    )
    if usual:
        return np.fromstring(text.decode("ascii"), dtype=np.int64, sep=" ").reshape(-1, 2)
    rows: list[tuple[int, int]] = []
    for number, line in enumerate(text.rstrip().split(b"\n"), lines_before + 1):
        fields = line.split()
        good = len(fields) == 2 and all(f.isdigit() and len(f) <= _MAX_DIGITS for f in fields)
        if not good:
            raise RecordError(
                f"{path}, line {number}: expected 'key<tab>offset', two whole numbers, got "
                f"{line[:60]!r}. The index is damaged; copy it again or pack the set anew."
            )
        rows.append((int(fields[0]), int(fields[1])))
    return np.array(rows, np.int64).reshape(-1, 2)


def is_header_record(header: RecordHeader, payload_length: int) -> bool:
    """Returns whether a record only describes others: it has two labels and no image after them.

    A set with two labels per image (im2rec) also has flag 2 at key 0, but an image follows.

    Args:
        header: Header of the record.
        payload_length: Length of its payload in bytes.
    """
    return header.flag == 2 and payload_length == 24 + 8


def image_lines(index: RecordIndex, reader: RecordReader) -> np.ndarray | slice:
    """Finds the lines of the index that are images.

    In InsightFace style the record with key 0 is a header record with labels (n, m): images are the
    keys 1..n-1, and keys n..m-1 describe identities. In any other set every line is an image.

    Args:
        index: All lines of the index.
        reader: Reader of the `.rec` file.

    Returns:
        A slice if the lines are neighbors, else their positions.

    Raises:
        RecordError: The header record is damaged, or the index lacks some of the keys that it
            promises.
    """
    keys, offsets = index
    zero = np.flatnonzero(keys == 0)
    if not len(zero):
        return slice(0, len(keys))
    offset = int(offsets[zero[0]])
    try:
        header = reader.read_header(offset, 0)
    except RecordError as error:
        if _is_header_record_at(index, reader, int(keys.argmax())) is not False:
            raise
        # No records of identities, so it was no header record: an image like the others.
        log.warning("%s", error)
        return slice(0, len(keys))
    if header.flag != 2:
        return slice(0, len(keys))
    later = offsets[zero[0] + 1 :][:1]  # where the next record starts, if they are in order
    payload = reader.read_at(offset, 0, int(later[0]) if (later > offset).any() else None)
    if not is_header_record(header, len(payload)):
        return slice(0, len(keys))
    first, last = range_of(unpack_record(payload)[0])
    if not (1 <= first <= last < 2**40 and first == int(first)):
        raise RecordError(
            f"{reader.where(offset, 0)}: a header record with labels ({first:g}, {last:g}); "
            "expected (n, m) with 1 <= n <= m. The file is damaged; copy it again."
        )
    exact = isinstance(first, int) or first <= _EXACT_FLOAT32
    num_keys = int(first) if exact else _exact_end(index, reader, int(first))
    _check_boundary(index, reader, num_keys)
    is_image = (keys >= 1) & (keys < num_keys)
    found = int(is_image.sum())
    if found != num_keys - 1:
        raise RecordError(
            f"{reader.path}: the header record promises the images 1 to {num_keys - 1}, but the "
            f"index lists {found} of them. It is cut off or belongs to another file; copy it again."
        )
    lines = np.flatnonzero(is_image)
    if found and lines[-1] - lines[0] == found - 1:
        return slice(int(lines[0]), int(lines[-1]) + 1)
    return lines


def _check_boundary(index: RecordIndex, reader: RecordReader, num_keys: int) -> None:
    """Checks that images end and identities begin where the header record says.

    A damaged count must not make the set silently smaller.

    Raises:
        RecordError: The records at the boundary contradict the header record.
    """
    for key, is_image in ((num_keys - 1, True), (num_keys, False)):
        lines = np.flatnonzero(index.keys == key)
        if key and len(lines) and _is_header_record_at(index, reader, int(lines[0])) is is_image:
            raise RecordError(
                f"{reader.where(int(index.offsets[lines[0]]), key)}: the header record (key 0) "
                f"says that images end before key {num_keys}, but this record is "
                f"{'none' if is_image else 'one'}. The file is damaged; copy it again."
            )


def _is_header_record_at(index: RecordIndex, reader: RecordReader, line: int) -> bool | None:
    """Returns whether the record of a line has two labels and no image, None if unreadable."""
    offset, key = int(index.offsets[line]), int(index.keys[line])
    try:
        return is_header_record(reader.read_header(offset, key), len(reader.read_at(offset, key)))
    except RecordError:
        return None  # whoever uses that record gets the error


def _exact_end(index: RecordIndex, reader: RecordReader, stated: int) -> int:
    """Returns the first key that is not an image.

    `stated` comes from a float32: beyond 2**24 it may be off by one or two (Glint360K has
    17,091,657 images), so the records around it decide.
    """
    near = np.flatnonzero((np.abs(index.keys - stated) <= 4) & (index.keys > 0))
    for line in near[np.argsort(index.keys[near])]:
        key, offset = int(index.keys[line]), int(index.offsets[line])
        if is_header_record(reader.read_header(offset, key), len(reader.read_at(offset, key))):
            return key
    return stated


def read_property(path: str | os.PathLike[str]) -> Property:
    """Parses a `property` file, one line `num_classes,height,width`.

    Raises:
        RecordError: The file cannot be read or has another form.
    """
    try:
        with open(path, "rb") as file:
            line = file.read(200).split(b"\n")[0].strip()
    except OSError as error:
        raise unreadable(Path(path), error) from error
    fields = [field.strip() for field in line.split(b",")]
    valid = len(fields) == 3 and all(f.isdigit() and 0 < len(f) <= 12 for f in fields)
    if not valid or int(fields[0]) < 1:
        raise RecordError(
            f"{path}: expected one line 'num_classes,height,width' of whole numbers, such as "
            f"'85742,112,112', got {line[:60]!r}. Correct or delete the file: without it the "
            "labels are counted."
        )
    num_classes, height, width = (int(field) for field in fields)
    return Property(num_classes, height, width)
