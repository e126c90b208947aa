"""Scans a damaged .rec past the damage, and makes an index of what it finds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from data.index import RecordIndex, is_header_record
from data.recordio import (
    FIRST,
    LAST,
    MAGIC,
    MAX_PART_LENGTH,
    PART_HEADER,
    RECORD_HEADER,
    WHOLE,
    RecordError,
    RecordPlace,
    RecordReader,
    padded,
)
from utils.files import atomic_write

_BLOCK_BYTES = 1 << 20


class Damage(NamedTuple):
    """Bytes that are no readable record.

    Attributes:
        offset: First byte.
        end: First byte after them.
        error: Why they cannot be read.
    """

    offset: int
    end: int
    error: str


def scan_on(reader: RecordReader) -> Iterator[RecordPlace | Damage]:
    """Yields every record of the file in order, and each damage in its place.

    The magic stands at a multiple of 4 bytes only where a part starts. So reading continues at the
    next magic that starts a record.
    """
    offset = 0
    while offset < reader.size:
        try:
            for place in reader.scan(offset):
                yield place
                offset = place.end
            return
        except RecordError as error:
            found = _despite_what_follows(reader, offset)
            following = _next_start(reader, offset + 4)
            if found is not None and found.end <= following:
                yield found
                offset = found.end
                if offset == following:
                    continue
            yield Damage(offset, following, str(error))
            offset = following


def _despite_what_follows(reader: RecordReader, offset: int) -> RecordPlace | None:
    """Returns the record at `offset` if it is complete and perhaps only what follows is damaged."""
    at = offset
    with open(reader.path, "rb") as file:
        while at + PART_HEADER.size <= reader.size:
            file.seek(at)
            magic, word = PART_HEADER.unpack(file.read(PART_HEADER.size))
            if magic != MAGIC:
                return None
            at += PART_HEADER.size + padded(word & MAX_PART_LENGTH)
            if word >> 29 in (WHOLE, LAST):
                break
    try:
        return RecordPlace(offset, len(reader.read_at(offset, end=at)), at)
    except RecordError:
        return None


def _next_start(reader: RecordReader, offset: int) -> int:
    """Returns the first byte from `offset` on where a record may start, or the size of the file."""
    with open(reader.path, "rb") as file:
        file.seek(offset)
        while block := file.read(_BLOCK_BYTES):
            words = np.frombuffer(block[: len(block) & ~3], "<u4")
            for place in np.flatnonzero(words[:-1] == MAGIC).tolist():
                if words[place + 1] >> 29 in (WHOLE, FIRST):
                    return offset + 4 * place
            if len(block) < _BLOCK_BYTES:
                break
            offset += len(block) - 4  # the last word again: its flag is in the next block
            file.seek(offset)
    return reader.size


def rebuild_index(
    reader: RecordReader, progress: Callable[[int], object] = lambda count: None
) -> tuple[RecordIndex, list[Damage]]:
    """Makes an index of every record that a scan finds.

    Keys are the ids of the records if these increase from record to record, as MXNet's tools and
    ours write them, else 0, 1, 2, ... A record that only describes others gets the key after that
    of the record before it. The index takes 16 bytes of memory per record.

    Args:
        reader: Reader of the `.rec` file.
        progress: Is called with the number of bytes done since the last call.

    Returns:
        The index, and what the scan could not read.
    """
    offsets: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    damages: list[Damage] = []
    chunk: list[tuple[int, int]] = []
    before, rising = -1, True
    for place in scan_on(reader):
        progress(place.end - place.offset)
        if isinstance(place, Damage):
            damages.append(place)
            continue
        key = -1  # a record too short for a header: then ids are not used
        if place.payload_length >= RECORD_HEADER.size:
            header = reader.read_header(place.offset)
            key = before + 1 if is_header_record(header, place.payload_length) else header.id
        rising = rising and before < key < 2**62
        before = key if rising else before
        chunk.append((place.offset, key if rising else 0))
        if len(chunk) == 1 << 16:
            offsets.append(np.array([o for o, _ in chunk], np.int64))
            ids.append(np.array([k for _, k in chunk], np.int64))
            chunk = []
    offsets.append(np.array([o for o, _ in chunk], np.int64))
    ids.append(np.array([k for _, k in chunk], np.int64))
    places = np.concatenate(offsets)
    keys = np.concatenate(ids) if rising else np.arange(len(places))
    return RecordIndex(keys, places), damages


def write_index(path: str | os.PathLike[str], index: RecordIndex) -> None:
    """Writes an .idx file atomically."""
    lines = zip(index.keys.tolist(), index.offsets.tolist(), strict=True)
    with atomic_write(path) as file:
        file.writelines(b"%d\t%d\n" % line for line in lines)
