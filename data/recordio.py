"""RecordIO as MXNet writes it: the framing of records, their header, a reader and a writer.

A file is a row of parts, each starting at a multiple of 4 bytes:

    u32 magic 0xced7230a | u32 (continue flag << 29 | length) | payload | zeros up to 4 bytes

Continue flag 0 is a whole record. A record whose payload contains the magic at a multiple of 4
bytes is cut there into parts with the flags 1 (first), 2 (middle), 3 (last), and the magic itself
is left out: joining the parts puts it back. So the magic never appears at a multiple of 4 bytes
except at the start of a part, and a whole record is followed by the start of another one or by the
end of the file. The reader insists on that, and on zeros in the padding, and so notices a damaged
length. Only a length that grows into its own padding looks valid. (A whole record that ends where
the index starts the next one is not searched for the magic.)

A record's payload is the struct `<IfQQ` (flag, label, id, id2), then, if flag > 0, flag float32
labels that replace the scalar one, then the bytes of the image.

Float32 holds every whole number only up to 2**24. A class beyond it is kept twice: rounded as the
label, which readers of labels see, and exactly as `id2`. It is read from id2, and only if that
rounds to the label. Records of two labels and no image (the header record, the records of
identities) keep both numbers exactly as id and id2 in the same case.

Sources: dmlc-core `recordio.h`, `recordio.cc`; MXNet 1.9.1 `python/mxnet/recordio.py`.
"""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3
MAX_PART_LENGTH = (1 << 29) - 1
MAX_EXACT_LABEL = 2**24  # float32 holds every whole number up to here
PART_HEADER = struct.Struct("<II")
RECORD_HEADER = struct.Struct("<IfQQ")
# One pread of this size covers nearly every 112 x 112 face together with the header that follows.
_WINDOW_BYTES = 16 * 1024
_WHOLE_BYTES = 256 * 1024  # a record that is smaller by the index is read in one exact pread


class RecordError(UserError):
    """A record or index file is not as the format says; the message names file and place."""


class TruncatedError(RecordError):
    """A record reaches past the end of its file."""


class RecordHeader(NamedTuple):
    """The header of a record.

    Attributes:
        flag: Number of labels that follow the struct; 0 means none.
        labels: [max(flag, 1)] float32.
        id: Unsigned 64-bit integer, usually the key.
        id2: Unsigned 64-bit integer, the exact class beyond 2**24.
    """

    flag: int
    labels: np.ndarray
    id: int
    id2: int


class RecordPlace(NamedTuple):
    """Where a scan found a record, in bytes.

    Attributes:
        offset: Start of its first part.
        payload_length: Length of its joined payload.
        end: Start of what follows it.
    """

    offset: int
    payload_length: int
    end: int


def unreadable(path: Path, error: OSError) -> RecordError:
    """Makes the error of a file that the system does not let us read."""
    return RecordError(
        f"{path}: cannot be read ({error.strerror or error}). Check its permissions and its disk, "
        "or give another path."
    )


def padded(length: int) -> int:
    """Returns `length` rounded up to a multiple of 4 bytes."""
    return (length + 3) & ~3


def pack_record(
    image: bytes, label: float | Sequence[float], record_id: int = 0, record_id2: int = 0
) -> bytes:
    """Makes the payload of a record.

    Args:
        image: Encoded image.
        label: Label, or a sequence of labels, which is written after the struct (flag > 0). A
            (first) label that is an integer beyond 2**24 becomes id2 as well, see `class_of`.
        record_id: Value of id.
        record_id2: Value of id2.

    Raises:
        RecordError: There is no label, or `record_id2` contradicts a label beyond 2**24.
    """
    several = isinstance(label, Sequence)
    labels = list(label) if isinstance(label, Sequence) else [label]
    if not labels:
        raise RecordError("a record needs at least one label; got an empty sequence")
    if isinstance(labels[0], (int, np.integer)) and labels[0] > MAX_EXACT_LABEL:
        if record_id2 not in (0, labels[0]):
            raise RecordError(
                f"label {labels[0]} with id2 {record_id2}: a class beyond {MAX_EXACT_LABEL} takes "
                "the place of id2; leave record_id2 at 0"
            )
        record_id2 = int(labels[0])
    if not several:
        return RECORD_HEADER.pack(0, labels[0], record_id, record_id2) + image
    values = np.asarray(labels, dtype="<f4")
    return RECORD_HEADER.pack(values.size, 0.0, record_id, record_id2) + values.tobytes() + image


def pack_range(first: int, end: int, record_id: int = 0) -> bytes:
    """Makes the payload of a header or identity record: labels (first, end), no image.

    Args:
        first: First number.
        end: Second number; beyond 2**24 both are kept as ids too, see `range_of`.
        record_id: Value of id otherwise.
    """
    ids = (first, end) if end > MAX_EXACT_LABEL else (record_id, 0)
    return RECORD_HEADER.pack(2, 0.0, *ids) + np.array([first, end], "<f4").tobytes()


def class_of(header: RecordHeader) -> int | float:
    """Returns the class that a record's header names: its first label, exact beyond 2**24 too.

    The result is a float if the label is not a class: not whole, not finite, or beyond 2**24
    without an id2 that rounds to it.
    """
    label = float(header.labels[0])
    if MAX_EXACT_LABEL <= label < 2.0**63:
        return header.id2 if np.float32(header.id2) == label else label
    return int(label) if label.is_integer() else label


def range_of(header: RecordHeader) -> tuple[float, float]:
    """Returns both numbers of a header or identity record.

    They are exact beyond 2**24 if `pack_range` made the record.
    """
    first, end = header.labels.tolist()
    if end >= MAX_EXACT_LABEL and np.float32(header.id) == first and np.float32(header.id2) == end:
        return header.id, header.id2
    return first, end


def unpack_record(payload: bytes, where: str = "record") -> tuple[RecordHeader, memoryview]:
    """Splits a payload into its header and the bytes of its image (a view, nothing is copied).

    Args:
        payload: Payload of the record.
        where: Beginning of the error message.

    Raises:
        RecordError: The payload is shorter than its header says.
    """
    header = unpack_header(payload, len(payload), where)
    return header, memoryview(payload)[RECORD_HEADER.size + 4 * header.flag :]


def unpack_header(head: bytes, payload_length: int, where: str = "record") -> RecordHeader:
    """Reads the header from the first bytes of a payload.

    Args:
        head: First bytes. They may stop after the first label; `labels` then holds those present.
        payload_length: Length of the whole payload in bytes.
        where: Beginning of the error message.

    Raises:
        RecordError: The payload is shorter than its header says.
    """
    if len(head) < RECORD_HEADER.size:
        raise RecordError(
            f"{where}: its payload has {len(head)} bytes, but a record header alone takes "
            f"{RECORD_HEADER.size}. The file is damaged or is not a set of images; copy it again."
        )
    flag, label, record_id, record_id2 = RECORD_HEADER.unpack_from(head)
    room = payload_length - RECORD_HEADER.size
    if 4 * flag > room:
        raise RecordError(
            f"{where}: its header announces {flag} labels ({4 * flag} bytes), but only {room} "
            "bytes follow. The file is damaged; copy it again or pack it anew."
        )
    if flag == 0:
        return RecordHeader(0, np.array([label], dtype=np.float32), record_id, record_id2)
    present = min(flag, (len(head) - RECORD_HEADER.size) // 4)
    labels = np.frombuffer(head, dtype="<f4", count=present, offset=RECORD_HEADER.size)
    return RecordHeader(flag, labels, record_id, record_id2)


def frame_record(payload: bytes) -> bytes:
    """Frames a record for the file: one part, or several if the payload contains the magic."""
    parts: list[bytes] = []
    begin = 0
    while (at := _find_magic(payload, begin)) >= 0:
        parts.append(_frame_part(FIRST if not parts else MIDDLE, payload[begin:at]))
        begin = at + 4
    parts.append(_frame_part(LAST if parts else WHOLE, payload[begin:]))
    return b"".join(parts)


def _find_magic(payload: bytes, begin: int = 0) -> int:
    """Returns where from `begin` on the magic stands at a multiple of 4 bytes, or -1."""
    at = payload.find(MAGIC_BYTES, begin)
    while at % 4 and at >= 0:
        at = payload.find(MAGIC_BYTES, at + 1)
    return at


def _frame_part(continue_flag: int, data: bytes) -> bytes:
    if len(data) > MAX_PART_LENGTH:
        raise RecordError(
            f"a record of {len(data)} bytes does not fit the format, which allows "
            f"{MAX_PART_LENGTH}; store smaller images"
        )
    header = PART_HEADER.pack(MAGIC, continue_flag << 29 | len(data))
    return header + data + bytes(padded(len(data)) - len(data))


class RecordReader:
    """Reads records by byte offset. Threads may share one reader: it has no position and no lock.

    Every length is compared with the size of the file before memory of that length is allocated.

    Args:
        path_rec: Path of the file.

    Attributes:
        path: Path of the file.
        size: Size of the file in bytes when it was opened.

    Raises:
        RecordError: The file cannot be opened.
    """

    def __init__(self, path_rec: str | os.PathLike[str]) -> None:
        self.path = Path(path_rec)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(self.path, error) from error
        self._closer = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self._words = np.empty(0, "<u4")  # the mapped file, for read_classes only

    def close(self) -> None:
        """Closes the file; it must not be read afterwards. Deleting the reader closes it too."""
        self._descriptor = -1  # the number may soon belong to another file
        self._closer()

    def where(self, offset: int, key: int | None = None) -> str:
        """Names a record for errors: file, key if it is known, byte offset."""
        name = "record" if key is None else f"record with key {key}"
        return f"{self.path}: {name} at byte {offset}"

    def read_at(self, offset: int, key: int | None = None, end: int | None = None) -> bytes:
        """Reads the joined payload of a record.

        Args:
            offset: Byte offset of the record.
            key: Key of the record, for messages only.
            end: Offset of the next record that the index lists, if known. This record may not reach
                past it, and if it ends before, another record has to follow.

        Raises:
            RecordError: The record is damaged.
        """
        limit = self.size if end is None else end
        payload = self._read_usual(offset, limit)
        return self._read(offset, key, limit)[0] if payload is None else payload

    def end_of(self, offset: int, key: int | None = None) -> int:
        """Reads the record that starts at byte `offset` and returns where it ends.

        Raises:
            RecordError: The record is damaged.
        """
        return self._read(offset, key, self.size)[1]

    def read_header(self, offset: int, key: int | None = None) -> RecordHeader:
        """Reads flag, first label and ids of a record, a few dozen bytes of it.

        Labels beyond the first are left out, unless the record is in several parts.

        Args:
            offset: Byte offset of the record.
            key: Key of the record, for messages only.

        Raises:
            RecordError: The record is damaged.
        """
        where = self.where(offset, key)
        first_bytes = RECORD_HEADER.size + 4
        window = self._pread(offset, PART_HEADER.size + first_bytes) if offset >= 0 else b""
        flag, length = self._part(window, offset, where)
        if flag != WHOLE and length < first_bytes:  # the magic sits inside the header itself
            payload = self.read_at(offset, key)
            return unpack_header(payload, len(payload), where)
        if offset + PART_HEADER.size + length > self.size:
            raise self._truncated(where, length, offset)
        head = window[PART_HEADER.size : PART_HEADER.size + min(length, first_bytes)]
        return unpack_header(head, length, where)

    def read_classes(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads the classes of many records at once, by a vectorized look at their headers.

        Args:
            offsets: [k] int64 byte offsets.

        Returns:
            Classes, int64 [k], and which of them are certain, bool [k]. The others (damaged, in
            several parts, beyond 2**24, not a class) need `read_header`.

        Raises:
            RecordError: The size of the file changed.
        """
        if os.fstat(self._descriptor).st_size != self.size:  # a shorter file must not be mapped
            raise RecordError(f"{self.path}: its size changed while it was read")
        if not self._words.size:
            mapped = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            self._words = np.frombuffer(mapped, "<u4", self.size // 4)
        words = self._words
        in_file = offsets + PART_HEADER.size + RECORD_HEADER.size + 4 <= self.size
        at = np.where(in_file & (offsets >= 0), offsets, 0) // 4
        if len(words) < (PART_HEADER.size + RECORD_HEADER.size + 4) // 4:
            return np.zeros(len(offsets), np.int64), np.zeros(len(offsets), bool)
        length = (words[at + 1] & np.uint32(MAX_PART_LENGTH)).astype(np.int64)
        flag = words[at + 2].astype(np.int64)
        label = np.where(flag > 0, words[at + 8], words[at + 3]).view("<f4")
        sure = (
            in_file
            & (offsets >= 0)
            & (offsets % 4 == 0)
            & (words[at] == MAGIC)
            & (words[at + 1] >> 29 == WHOLE)
            & (offsets + PART_HEADER.size + length <= self.size)
            & (RECORD_HEADER.size + 4 * flag <= length)
            & (label >= 0)
            & (label < MAX_EXACT_LABEL)
            & (label == np.floor(label))
        )
        return np.where(sure, label, 0).astype(np.int64), sure

    def will_need(self, begin: int, end: int) -> None:
        """Asks the kernel to read the bytes begin..end-1 ahead of time; this is only a hint."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def __reduce__(self) -> tuple[type[RecordReader], tuple[Path]]:
        return RecordReader, (self.path,)  # another process has to open the file for itself

    def scan(self, offset: int = 0) -> Iterator[RecordPlace]:
        """Yields every record from byte `offset` on, for files without an index.

        Raises:
            RecordError: No valid record starts where one is due.
        """
        while offset < self.size:
            payload, end = self._read(offset, None, self.size)
            yield RecordPlace(offset, len(payload), end)
            offset = end

    def _read_usual(self, offset: int, limit: int) -> bytes | None:
        """Reads the payload of an intact one-part record that fits one window; else returns None.

        The rules are those of `_read`, which handles all other records. This saves nine tenths of
        the reader's own time.
        """
        room = limit - offset
        if offset < 0 or offset % 4 or room < PART_HEADER.size:
            return None
        window = self._pread(offset, room if room <= _WHOLE_BYTES else _WINDOW_BYTES)
        if len(window) < PART_HEADER.size:
            return None
        magic, length = PART_HEADER.unpack_from(window)
        if magic != MAGIC or length > MAX_PART_LENGTH:  # above: another flag than WHOLE
            return None
        at = PART_HEADER.size + ((length + 3) & ~3)
        if offset + at != limit:
            if offset + at > limit or at + PART_HEADER.size > len(window):
                return None
            magic, follows = PART_HEADER.unpack_from(window, at)
            if magic != MAGIC or follows >> 29 not in (WHOLE, FIRST):
                return None
        if at > len(window) or limit > self.size or any(window[PART_HEADER.size + length : at]):
            return None
        payload = window[PART_HEADER.size : PART_HEADER.size + length]
        sure = offset + at == limit < self.size  # the index says so too
        return payload if sure or _find_magic(payload) < 0 else None

    def _read(self, offset: int, key: int | None, limit: int) -> tuple[bytes, int]:
        """Reads payload and end of a record: one system call if it fits the window, else a few."""
        where = self.where(offset, key)
        limit = min(limit, self.size)
        if offset < 0 or offset % 4 or offset + PART_HEADER.size > limit:
            raise RecordError(
                f"{where}: no record can start there; offsets are multiples of 4 and the file has "
                f"{self.size} bytes. The index belongs to another file, or the file was cut."
            )
        window = self._pread(offset, _WINDOW_BYTES)

        def take(start: int, length: int) -> bytes:
            skip = start - offset
            if skip + length <= len(window):
                return window[skip : skip + length]
            return self._pread(start, length)

        parts: list[bytes] = []
        at = offset
        while True:
            flag, length = self._part(take(at, PART_HEADER.size), at, where)
            if flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise RecordError(
                    f"{where}: the part at byte {at} has continue flag {flag}, allowed here: "
                    f"{'2 or 3' if parts else '0 or 1'}. The file is damaged, or the index points "
                    "into the middle of a record."
                )
            begin = at + PART_HEADER.size
            at = begin + padded(length)
            if at > limit:
                raise self._truncated(where, length, begin - PART_HEADER.size, limit)
            part = take(begin, padded(length))
            if len(part) != padded(length):
                raise RecordError(f"{where}: the file became shorter while it was read")
            if any(part[length:]) or (flag in (FIRST, MIDDLE) and length % 4):
                raise RecordError(
                    f"{where}: the part at byte {begin - PART_HEADER.size} claims {length} bytes, "
                    "but its padding is not zero or another part follows in mid-word: the length "
                    "is damaged. Copy the file again or pack it anew."
                )
            if (inside := _find_magic(part[:length])) >= 0:
                raise RecordError(
                    f"{where}: the part at byte {begin - PART_HEADER.size} holds the magic at byte "
                    f"{begin + inside}, where only a part may start: its length is damaged. Copy "
                    "the file again or pack it anew."
                )
            parts.append(part[:length])
            if flag in (WHOLE, LAST):
                break
        if at < limit:  # else the index or the end of the file confirms where the record ends
            follows = take(at, PART_HEADER.size)
            flag, _ = self._part(follows, at, f"{where}: what follows it")
            if flag not in (WHOLE, FIRST):
                raise RecordError(
                    f"{where}: what follows at byte {at} has continue flag {flag}, but a record "
                    "starts with 0 or 1. The file is damaged; copy it again or pack it anew."
                )
        return (parts[0] if len(parts) == 1 else MAGIC_BYTES.join(parts)), at

    def _part(self, header: bytes, at: int, where: str) -> tuple[int, int]:
        """Returns continue flag and length of the part whose first bytes are `header`."""
        if len(header) < PART_HEADER.size:
            raise TruncatedError(
                f"{where}: byte {at} starts a part, but the file ends at byte {self.size}. "
                "It was cut off; copy it again."
            )
        magic, word = PART_HEADER.unpack_from(header)
        if magic != MAGIC:
            raise RecordError(
                f"{where}: expected the magic {MAGIC:#010x} at byte {at}, found {magic:#010x}. "
                "The file is damaged or the index belongs to another file."
            )
        return word >> 29, word & MAX_PART_LENGTH

    def _truncated(self, where: str, length: int, at: int, limit: int | None = None) -> RecordError:
        if limit is not None and limit < self.size:
            return RecordError(
                f"{where}: a length of {length} bytes at byte {at} reaches past byte {limit}, "
                "where the index starts the next record. One of the two files is damaged."
            )
        return TruncatedError(
            f"{where}: a length of {length} bytes at byte {at} reaches past the end of the file "
            f"({self.size} bytes). The file was cut off or is damaged; copy it again."
        )

    def _pread(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._descriptor, length, offset)
        except OSError as error:
            raise unreadable(self.path, error) from error
