"""Which records of a set are images: the `.idx` file, the header record, the `property` file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.recordio import (
    PART_HEADER,
    RecordError,
    RecordHeader,
    RecordReader,
    range_of,
    unpack_record,
    unreadable,
)

_CHUNK_BYTES = 16 * 1024 * 1024
_MAX_DIGITS = 18  # 10**18 fits int64 with room to spare
_EXACT_FLOAT32 = 2**24
_TAB, _NEWLINE, _ZERO, _NINE = 9, 10, 48, 57


class RecordIndex(NamedTuple):
    """keys, offsets (bytes): int64 [number of records], in the order of the lines."""

    keys: np.ndarray
    offsets: np.ndarray


class Property(NamedTuple):
    """What a `property` file states; height and width in pixels."""

    num_classes: int
    height: int
    width: int


def read_index(path_idx: str | os.PathLike[str], rec_size: int) -> RecordIndex:
    """Parse and check an `.idx` file: lines `key<tab>offset` for a `.rec` of `rec_size` bytes.

    Offsets must be multiples of 4 inside the file and keys must be distinct; neither has to be
    sorted. Raises RecordError naming the line.
    """
    path = Path(path_idx)
    try:
        table = _read_lines(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not len(table):
        raise RecordError(f"{path}: the index is empty. Copy it again, or pack the set anew.")
    keys, offsets = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])
    wrong = (offsets % 4 != 0) | (offsets > rec_size - PART_HEADER.size)
    if wrong.any():
        line = int(wrong.argmax())
        raise RecordError(
            f"{path}, line {line + 1}: key {keys[line]} is said to start at byte {offsets[line]}; "
            f"allowed are multiples of 4 below the {rec_size} bytes of the .rec. The .rec was cut "
            "off, or this index belongs to another file; copy both again."
        )
    if not (np.diff(keys) > 0).all():
        order = np.argsort(keys, kind="stable")
        twice = np.flatnonzero(np.diff(keys[order]) == 0)
        if len(twice):
            line = int(order[twice[0] + 1])
            raise RecordError(
                f"{path}, line {line + 1}: key {keys[line]} appears a second time; keys must be "
                "distinct. Pack the set anew."
            )
    return RecordIndex(keys, offsets)


def _read_lines(path: Path) -> np.ndarray:
    """int64 [lines, 2], a chunk of the file at a time. Raises RecordError, OSError."""
    pairs: list[np.ndarray] = []
    lines_read = 0
    rest = b""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            text, newline, rest = (rest + chunk).rpartition(b"\n")
            if not newline and len(rest) > _CHUNK_BYTES:
                raise RecordError(
                    f"{path}, line {lines_read + 1}: longer than {_CHUNK_BYTES} bytes; expected "
                    "'key<tab>offset'. This is not an index; give the .idx that belongs to the .rec"
                )
            if text:
                pairs.append(_parse_lines(text + newline, path, lines_read))
                lines_read += len(pairs[-1])
    if rest.strip():
        pairs.append(_parse_lines(rest + b"\n", path, lines_read))
    return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)


def _parse_lines(text: bytes, path: Path, lines_before: int) -> np.ndarray:
    """int64 [lines, 2] from whole lines. The usual form vectorised, any other line by line."""
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
    """Whether a record only describes others: two labels and no image after them.

    A set with two labels per image (im2rec) also has flag 2 at key 0, but an image follows.
    """
    return header.flag == 2 and payload_length == 24 + 8


def image_lines(index: RecordIndex, reader: RecordReader) -> np.ndarray | slice:
    """Which lines of the index are images: a slice where they are neighbours, else positions.

    InsightFace style (the record with key 0 is a header record with labels (n, m)): images are
    the keys 1..n-1, and keys n..m-1 describe identities. Any other set: every line is an image.
    Raises RecordError when the index lacks some of the keys that the header record promises.
    """
    keys, offsets = index
    zero = np.flatnonzero(keys == 0)
    if not len(zero):
        return slice(0, len(keys))
    offset = int(offsets[zero[0]])
    header = reader.read_header(offset, 0)
    if header.flag != 2:
        return slice(0, len(keys))
    payload = reader.read_at(offset, 0)
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


def _exact_end(index: RecordIndex, reader: RecordReader, stated: int) -> int:
    """The first key that is no image. `stated` comes from a float32: beyond 2**24 it may be off by
    one or two (Glint360K has 17,091,657 images), so the records around it decide."""
    near = np.flatnonzero((np.abs(index.keys - stated) <= 4) & (index.keys > 0))
    for line in near[np.argsort(index.keys[near])]:
        key, offset = int(index.keys[line]), int(index.offsets[line])
        if is_header_record(reader.read_header(offset, key), len(reader.read_at(offset, key))):
            return key
    return stated


def read_property(path: str | os.PathLike[str]) -> Property:
    """Parse a `property` file, one line `num_classes,height,width`. Raises RecordError."""
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
