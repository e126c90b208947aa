"""Keeps arrays that were computed from a file: memory-mapped, checked by size and time.

A cache is one file of several arrays in numpy's `.npy` format, one after another: first the bytes
of a JSON text, which says what the others were computed from and their names. It lies beside the
file that it was made from; where that folder cannot be written, in the user's cache folder; where
that cannot be written either, the arrays stay in memory. Deleting a cache is always safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib.format import read_array_header_1_0, read_magic

from utils.files import atomic_write

log = logging.getLogger(__name__)

_DTYPES = ("int64", "int32", "uint8")

# What a cache was made from: {file name: [size in bytes, modification time in ns]}, and its kind.
Stamp = dict[str, Any]


class Cached(NamedTuple):
    """What was computed from a file.

    Attributes:
        facts: Plain values, as JSON has them.
        arrays: One-dimensional arrays of int64 or int32 by name, read-only.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


def stamp_of(*paths: Path) -> Stamp:
    """Returns sizes and modification times of files, by which a cache knows its origin."""
    return {path.name: [(status := path.stat()).st_size, status.st_mtime_ns] for path in paths}


def open_or_build(
    made_from: Path, suffix: str, stamp: Stamp, build: Callable[[], Cached]
) -> Cached:
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
        built = build()
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(place, stamp, built)
                log.info("%s: kept for the next time as %s", made_from, place)
                return read_cache(place, stamp)
            except OSError as error:
                log.info("%s cannot be written (%s)", place, error.strerror or error)
    log.info("%s: kept in memory; a writable XDG_CACHE_HOME spares the work next time", made_from)
    return built


def _in_user_folder(made_from: Path, suffix: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(os.fsencode(made_from.absolute())).hexdigest()[:32]
    return Path(base).expanduser() / "arcshard" / (name + suffix)


def _first_valid(places: list[Path], stamp: Stamp) -> Cached | None:
    for place in places:
        try:
            return read_cache(place, stamp)
        except Exception as error:  # a damaged or hostile file can raise anything at all
            log.debug("%s is not used: %s", place, error)  # it is made again, nothing is lost
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


def read_cache(path: Path, stamp: Stamp) -> Cached:
    """Maps an existing cache.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a cache of `stamp`. Hostile files raise other exceptions, too.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path} is no file")
    with open(path, "rb") as file:
        header = json.loads(_map_next(file).tobytes())
        arrays = {name: _map_next(file) for name in header["names"]}
        rest = file.read(1)
    if rest or header["crc"] != _checksum(header["facts"], arrays):
        raise ValueError(f"{path} is damaged")
    if header["stamp"] != stamp:
        raise ValueError(f"{path} was made from another version of its files")
    return Cached(header["facts"], arrays)


def _map_next(file: BinaryIO) -> np.ndarray:
    """Maps the array that begins here, and moves to the byte after it."""
    if read_magic(file) != (1, 0):
        raise ValueError(f"{file.name} has arrays of another version")
    shape, _, dtype = read_array_header_1_0(file)
    begin = file.tell()
    if str(dtype) not in _DTYPES or len(shape) != 1:
        raise ValueError(f"{file.name} holds {dtype} {shape}, no list of whole numbers")
    array = np.memmap(file, dtype, "r", begin, shape)  # raises ValueError if the file is shorter
    file.seek(begin + array.nbytes)
    return np.asarray(array)


def _checksum(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> int:
    """Returns a checksum of all but the arrays' content, which takes too long to read."""
    sizes = {name: [str(array.dtype), len(array)] for name, array in arrays.items()}
    return zlib.crc32(json.dumps([facts, sizes]).encode())


def _write(path: Path, stamp: Stamp, built: Cached) -> None:
    facts, arrays = built
    header = {"crc": _checksum(*built), "stamp": stamp, "facts": facts, "names": list(arrays)}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 64) * 64)  # so that the arrays after it are aligned
    with atomic_write(path, durable=False) as file:
        for array in (np.frombuffer(text, np.uint8), *arrays.values()):
            np.save(file, array, allow_pickle=False)
