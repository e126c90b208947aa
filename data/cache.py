"""Keeps arrays that were computed from a file: memory-mapped, checked by size and time.

A cache lies beside the file that it was made from. Where that folder cannot be written, it lies in
the user's cache folder. Where that cannot be written either, it is in memory (an anonymous file,
which the workers of this process share). Deleting a cache is always safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

log = logging.getLogger(__name__)

_MAGIC = b"ArcShard cache 1\n"
_HEADER_BYTES = 4096
_DTYPES = ("int64", "int32")

# What a cache was made from: {file name: [size in bytes, modification time in ns]}, and its kind.
Stamp = dict[str, Any]
Built = tuple[dict[str, Any], dict[str, np.ndarray]]


def stamp_of(*paths: Path) -> Stamp:
    """Returns sizes and modification times of files, by which a cache knows its origin."""
    return {path.name: [(status := path.stat()).st_size, status.st_mtime_ns] for path in paths}


class Cached:
    """Facts (JSON) and one-dimensional arrays of one cache; read-only, pickled by its path.

    Attributes:
        path: Path of the cache.
        facts: What `build` stated besides the arrays.
        arrays: Memory-mapped arrays by name.
    """

    def __init__(self, path: str, stamp: Stamp) -> None:
        """Maps an existing cache.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not a cache of `stamp`.
        """
        self.path, self._stamp = path, stamp
        if not Path(path).is_file():  # to open a pipe would wait for ever
            raise ValueError(f"{path} is no file")
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
            magic, crc, text = head[: len(_MAGIC)], *head[len(_MAGIC) :].partition(b"\n")[::2]
            text = text.rstrip(b"\0")
            if magic != _MAGIC or crc != b"%08x" % zlib.crc32(text):
                raise ValueError(f"{path} is no cache of ours")
            header = json.loads(text)
            if header["stamp"] != stamp:
                raise ValueError(f"{path} was made from another version of its files")
            size = os.fstat(file.fileno()).st_size
            places = [(np.dtype(d), int(n), int(o)) for d, n, o in header["arrays"].values()]
            if any(
                str(d) not in _DTYPES or not 0 <= o <= o + n * d.itemsize <= size
                for d, n, o in places
            ):
                raise ValueError(f"{path} is shorter than it says")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.facts: dict[str, Any] = header["facts"]
        self.arrays = {
            name: np.frombuffer(mapped, dtype, count, offset)
            for name, (dtype, count, offset) in zip(header["arrays"], places, strict=True)
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Cached, (self.path, self._stamp)


def open_or_build(made_from: Path, suffix: str, stamp: Stamp, build: Callable[[], Built]) -> Cached:
    """Opens the cache `<made_from><suffix>` from the first place that has it, or builds it.

    Of several processes that ask at once, one builds and the others wait for it, where the file
    system has locks. Errors of `build` are passed on.

    Args:
        made_from: File that the arrays are computed from.
        suffix: What the cache's name adds to the file's.
        stamp: Sizes and times of the files; a cache with another stamp is not used.
        build: Computes facts and arrays.
    """
    places = [made_from.with_name(made_from.name + suffix), _in_user_folder(made_from, suffix)]
    found = _first_valid(places, stamp)
    if found is not None:
        return found
    with _one_at_a_time(made_from):
        found = _first_valid(places, stamp)  # another process may have built it by now
        if found is not None:
            return found
        facts, arrays = build()
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(place, stamp, facts, arrays)
                log.info("%s: kept for the next time as %s", made_from, place)
                return Cached(str(place), stamp)
            except OSError as error:
                log.info("%s cannot be written (%s)", place, error.strerror or error)
    log.info("%s: kept in memory; a writable XDG_CACHE_HOME spares the work next time", made_from)
    return _in_memory(made_from.name + suffix, stamp, facts, arrays)


def _in_user_folder(made_from: Path, suffix: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(os.fsencode(made_from.absolute())).hexdigest()[:32]
    return Path(base).expanduser() / "arcshard" / (name + suffix)


def _first_valid(places: list[Path], stamp: Stamp) -> Cached | None:
    for place in places:
        # A cache that is missing, unreadable, old or damaged is made again, so nothing is lost.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            return Cached(str(place), stamp)
    return None


@contextlib.contextmanager
def _one_at_a_time(made_from: Path) -> Iterator[None]:
    descriptor = os.open(made_from, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Without locks (some network file systems) every process builds; the result is the same.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, stamp: Stamp, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            _write_content(file, stamp, facts, arrays)
            os.fchmod(file.fileno(), 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_content(
    file: BinaryIO, stamp: Stamp, facts: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    at, places = _HEADER_BYTES, {}
    for name, array in arrays.items():
        assert array.ndim == 1
        places[name] = [str(array.dtype), len(array), at]
        at += -(-array.nbytes // 8) * 8
    text = json.dumps({"stamp": stamp, "facts": facts, "arrays": places}).encode()
    head = _MAGIC + b"%08x\n" % zlib.crc32(text) + text
    if len(head) > _HEADER_BYTES:
        raise ValueError(f"{len(head)} bytes of facts do not fit the header")
    file.write(head.ljust(_HEADER_BYTES, b"\0"))
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)
        file.write(bytes(-array.nbytes % 8))


def _in_memory(
    name: str, stamp: Stamp, facts: dict[str, Any], arrays: dict[str, np.ndarray]
) -> Cached:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        _write_content(file, stamp, facts, arrays)
    # Worker processes of the same user reach it by this name, as long as this process lives.
    cached = Cached(f"/proc/{os.getpid()}/fd/{descriptor}", stamp)
    weakref.finalize(cached, os.close, descriptor)
    return cached
