"""Manifest of a record set: one hash per record, so that later damage can be located.

The record format has no checksum. A byte flipped inside an image that still decodes, a label that
became another valid one, and a record lengthened into its padding look right to any reader. `pack`
therefore writes `train.manifest` beside `train.rec`:

    # arcshard manifest 1: key, class, bytes of the payload, sha1 of the payload
    1<tab>0<tab>5231<tab>3f63e3ad5e025d50f85bff1e2d39429edc5653d1
    ...
    # end 490623 sha1-of-all-lines-above

The payload is the record without its framing: header, labels and image. Class `-` marks records
that are not images. A manifest takes about 60 bytes per record, 1 % of a set of faces. Its last
line shows whether the manifest itself is damaged or truncated, which would otherwise appear as a
list of false alarms.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.index import RecordIndex
from data.prefetch import OrderedPrefetch
from data.recordio import RecordError, RecordReader, class_of, unpack_record, unreadable

MANIFEST_SUFFIX = ".manifest"
_FIRST_LINE = b"# arcshard manifest 1: key, class, bytes of the payload, sha1 of the payload\n"
_LINE = re.compile(rb"(\d{1,18})\t(\d{1,18}|-)\t(\d{1,18})\t([0-9a-f]{40})\n")
_LAST_LINE = re.compile(rb"# end (\d{1,18}) ([0-9a-f]{40})\n")
_LONGEST_LINE = 128  # bytes
_CHUNK_RECORDS = 256


class Entry(NamedTuple):
    """One record in a manifest.

    Attributes:
        key: Key of the record.
        class_id: Class of the image, None for header and identity records.
        length: Length of the payload in bytes.
        sha1: Hash of the payload, 20 bytes.
    """

    key: int
    class_id: int | None
    length: int
    sha1: bytes


def entry_of(key: int, class_id: int | None, payload: bytes) -> Entry:
    """Makes the entry of a record with this payload."""
    return Entry(key, class_id, len(payload), hashlib.sha1(payload).digest())


class ManifestLines:
    """Turns entries into the lines of a manifest, first and last line included.

    Attributes:
        count: Number of lines of records so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sha1 = hashlib.sha1(_FIRST_LINE)

    def first(self) -> bytes:
        """Returns the line that opens the file."""
        return _FIRST_LINE

    def line(self, entry: Entry) -> bytes:
        """Returns the line of one record."""
        name = b"-" if entry.class_id is None else b"%d" % entry.class_id
        line = b"%d\t%s\t%d\t%s\n" % (entry.key, name, entry.length, entry.sha1.hex().encode())
        self.count += 1
        self._sha1.update(line)
        return line

    def last(self) -> bytes:
        """Returns the line that closes the file."""
        return b"# end %d %s\n" % (self.count, self._sha1.hexdigest().encode())


def read_manifest(path: Path, *, unfinished_bytes: int | None = None) -> Iterator[Entry]:
    """Yields the entries of a manifest in the order of the file.

    Args:
        path: Path of the manifest.
        unfinished_bytes: Number of bytes to read, with no last line expected (the manifest of an
            interrupted packing); None reads a complete manifest.

    Raises:
        RecordError: A line is wrong, or at the end the last line does not confirm the entries.
    """
    sha1 = hashlib.sha1()
    count = 0
    try:
        with open(path, "rb") as file:
            first = file.readline(_LONGEST_LINE)
            sha1.update(first)
            if first != _FIRST_LINE:
                raise RecordError(f"{path}, line 1: not a manifest of ours: {first[:60]!r}")
            for number, line in enumerate(_lines(file, unfinished_bytes), 2):
                found = _LINE.fullmatch(line)
                if found:
                    key, class_id, length, digest = found.groups()
                    count += 1
                    sha1.update(line)
                    yield Entry(
                        int(key),
                        None if class_id == b"-" else int(class_id),
                        int(length),
                        bytes.fromhex(digest.decode()),
                    )
                    continue
                end = _LAST_LINE.fullmatch(line)
                wrong = not end or int(end[1]) != count or end[2].decode() != sha1.hexdigest()
                if wrong or file.read(1):
                    raise _damaged(path, number, line)
                return
    except OSError as error:
        raise unreadable(path, error) from error
    if unfinished_bytes is None:
        raise _damaged(path, count + 2, b"")


def _lines(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    while limit is None or file.tell() < limit:
        line = file.readline(_LONGEST_LINE)
        if not line:
            return
        yield line


def _damaged(path: Path, number: int, line: bytes) -> RecordError:
    return RecordError(
        f"{path}, line {number}: the manifest itself is damaged or was cut off ({line[:60]!r}). "
        "Copy it again; without it, contents cannot be verified."
    )


class Mismatch(NamedTuple):
    """A record that is not what the manifest says.

    Attributes:
        key: Key of the record.
        what: What differs.
    """

    key: int
    what: str


def verify_records(
    reader: RecordReader,
    index: RecordIndex,
    manifest: Path,
    *,
    num_threads: int = 2,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[Mismatch]:
    """Yields every record that no longer matches the manifest, and those missing or added.

    It reads the whole file once. Its memory is the index and two arrays of that size (25 bytes per
    record).

    Args:
        reader: Reader of the `.rec` file.
        index: All lines of the index.
        manifest: Path of the manifest.
        num_threads: Number of threads that read and hash.
        progress: Is called with the number of records done since the last call.

    Raises:
        RecordError: The manifest is damaged.
    """
    order = np.argsort(index.keys, kind="stable")
    keys, offsets = index.keys[order], index.offsets[order]
    ends = _ends(offsets, reader.size)
    seen = np.zeros(len(keys), bool)
    entries = read_manifest(manifest)

    def compare(chunk: list[Entry]) -> tuple[int, list[Mismatch], np.ndarray]:
        wanted = np.array([entry.key for entry in chunk], np.int64)
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        present = keys[places] == wanted
        found: list[Mismatch] = []
        for entry, place, there in zip(chunk, places.tolist(), present.tolist(), strict=True):
            if not there:
                found.append(Mismatch(entry.key, "missing: the index does not list it"))
                continue
            what = _difference(reader, entry, int(offsets[place]), int(ends[place]))
            if what:
                found.append(Mismatch(entry.key, what))
        return len(chunk), found, places[present]

    for count, mismatches, places in _threaded(compare, entries, num_threads):
        yield from mismatches
        seen[places] = True
        progress(count)
    for place in np.flatnonzero(~seen):
        yield Mismatch(int(keys[place]), "added: the manifest does not list it")


def _threaded(
    compare: Callable[[list[Entry]], tuple[int, list[Mismatch], np.ndarray]],
    entries: Iterable[Entry],
    num_threads: int,
) -> Iterator[tuple[int, list[Mismatch], np.ndarray]]:
    """Compares chunks of entries in threads (hashing releases the GIL) and keeps their order."""
    todo = iter(entries)
    while window := list(islice(todo, 64 * _CHUNK_RECORDS)):
        chunks = [window[i : i + _CHUNK_RECORDS] for i in range(0, len(window), _CHUNK_RECORDS)]
        threads = num_threads if len(chunks) > 1 else 0
        compare_chunk = partial(_compare_chunk, compare, chunks)
        running = OrderedPrefetch(compare_chunk, range(len(chunks)), threads)
        try:
            yield from running
        finally:
            running.close()


def _compare_chunk(
    compare: Callable[[list[Entry]], tuple[int, list[Mismatch], np.ndarray]],
    chunks: list[list[Entry]],
    number: int,
) -> tuple[int, list[Mismatch], np.ndarray]:
    return compare(chunks[number])


def _ends(offsets: np.ndarray, size: int) -> np.ndarray:
    """Returns where the next record starts, for each of `offsets`, which may be unsorted: int64."""
    ascending = np.unique(offsets)
    after = np.append(ascending[1:], size)
    return after[np.searchsorted(ascending, offsets)]


def _difference(reader: RecordReader, entry: Entry, offset: int, end: int) -> str:
    """Says what differs between a record and its entry, or returns an empty string."""
    try:
        payload = reader.read_at(offset, entry.key, end)
    except RecordError as error:
        return f"unreadable: {error}"
    if len(payload) == entry.length and hashlib.sha1(payload).digest() == entry.sha1:
        return ""
    differences = []
    if len(payload) != entry.length:
        differences.append(f"{len(payload)} bytes, packed were {entry.length}")
    if entry.class_id is not None:
        try:
            class_id: float | str = class_of(unpack_record(payload)[0])
        except RecordError as error:
            class_id = f"unreadable ({error})"
        if class_id != entry.class_id:
            differences.append(f"class {class_id}, packed was {entry.class_id}")
    what = "; ".join(differences) or "its bytes differ from what was packed"
    return f"changed: {what} ({reader.path} at byte {offset})"


class MultisetDigest:
    """A hash of a multiset of (class, image) that does not depend on the order, in 32 bytes.

    It is the sum modulo 2**256 of sha256(class, sha1 of the image) (AdHash: Bellare, Micciancio
    1997). Two record sets with equal digests and counts hold the same images under the same
    classes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0

    def add(self, class_id: int | float, image: bytes | memoryview) -> None:
        """Adds an image of a class."""
        element = b"%r\0%s" % (class_id, hashlib.sha1(image).digest())
        self._sum = (self._sum + int.from_bytes(hashlib.sha256(element).digest())) % 2**256
        self.count += 1

    def hexdigest(self) -> str:
        """Returns 64 hexadecimal digits."""
        return f"{self._sum:064x}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MultisetDigest):
            return NotImplemented
        return (self.count, self._sum) == (other.count, other._sum)

    __hash__ = None  # type: ignore[assignment]  # a digest is mutable


def manifest_path(path_rec: str | os.PathLike[str]) -> Path:
    """Returns the path of `train.manifest` for `train.rec`."""
    return Path(path_rec).with_suffix(MANIFEST_SUFFIX)
