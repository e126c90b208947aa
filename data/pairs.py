"""Reads files of face pairs and writes `.bin` verification sets."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data.datasets import DataError, MissingDataError
from utils.files import atomic_write

Face = tuple[str, int | None]
"""(name, number) of LFW's layout, or (path, None)."""


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file.

    Attributes:
        first: First face.
        second: Second face.
        same: Whether both show the same identity.
        line: Number of the line.
    """

    first: Face
    second: Face
    same: bool
    line: int

    @property
    def paths(self) -> tuple[str, str]:
        """Paths of both images in the folder: name/name_0001.jpg, or the path as it was given."""
        return _path(self.first), _path(self.second)


def read_pairs(path: Path) -> list[Pair]:
    """Parses a pairs file.

    Its lines are those of LFW's `pairs.txt` (name n1 n2, or name1 n1 name2 n2, after a line of one
    or two counts), name1 n1 name2 n2 same, or path1 path2 same (the `pair.list` of TorchShard's
    ArcFace project). `same` is 1 for one identity; 0 or -1 means different identities, and a file
    uses one of these two throughout. Columns are separated by white space or, in a line that has
    tabs, by tabs only.

    Args:
        path: Path of the file.

    Raises:
        MissingDataError: The file does not exist.
        DataError: A line has another form or names a path outside the folder, both 0 and -1 appear,
            or there is no pair.
    """
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a pairs file after --pairs")
    pairs: list[Pair] = []
    first_use: dict[str, int] = {}  # label -> line
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        columns = [c.strip() for c in line.split("\t")] if "\t" in line else line.split()
        counts_line = number == 1 and len(columns) <= 2 and all(c.isdigit() for c in columns)
        if not line.strip() or counts_line:
            continue
        match columns:
            case [name, a, b] if _numbers(a, b):
                pair = Pair((name, int(a)), (name, int(b)), True, number)
            case [name, a, other, b] if _numbers(a, b):
                pair = Pair((name, int(a)), (other, int(b)), False, number)
            case [name, a, other, b, ("0" | "-1" | "1") as same] if _numbers(a, b):
                pair = Pair((name, int(a)), (other, int(b)), same == "1", number)
                first_use.setdefault(same, number)
            case [one, other, ("0" | "-1" | "1") as same] if not _numbers(one, other):
                pair = Pair((one, None), (other, None), same == "1", number)
                first_use.setdefault(same, number)
            case _:
                raise DataError(
                    f"{path}, line {number}: expected 'name n1 n2', 'name1 n1 name2 n2', "
                    "'name1 n1 name2 n2 same' or 'path1 path2 same' with same 1 or 0 (or -1), "
                    f"got {line[:80]!r}"
                )
        for face in (pair.first, pair.second):
            _check(face, f"{path}, line {number}")
        pairs.append(pair)
    if "0" in first_use and "-1" in first_use:
        raise DataError(
            f"{path}: different people are 0 in line {first_use['0']} and -1 in line "
            f"{first_use['-1']}; is -1 something else here? Write one of the two throughout"
        )
    if not pairs:
        raise DataError(f"{path}: holds no pairs")
    return pairs


def _path(face: Face) -> str:
    name, number = face
    return name if number is None else f"{name}/{name}_{number:04d}.jpg"


def _check(face: Face, where: str) -> None:
    name, number = face
    if number is not None and (os.path.basename(name) != name or name in (".", "..")):
        raise DataError(f"{where}: {name!r} is no folder name")
    if number is None and (PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts):
        raise DataError(f"{where}: {name!r} leads out of the folder; give a path below it")


def _numbers(*texts: str) -> bool:
    return all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts)


def write_verification_set(
    path: Path, images: Sequence[bytes], same: Sequence[bool], *, force: bool = False
) -> None:
    """Writes the `.bin` layout: a pickle of (list of 2N encoded images, list of N bools).

    Args:
        path: Path of the file.
        images: Encoded images, two per pair.
        same: Whether each pair shows one identity.
        force: Whether an existing file is replaced.

    Raises:
        ValueError: The number of images is not twice the number of pairs.
        DataError: The file exists and `force` is False.
    """
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(images)} images for {len(same)} pairs; a pair is two images")
    if path.exists() and not force:
        raise DataError(f"{path} already exists; give another name, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Protocol 4 stores bytes as bytes; below 3 they become calls, which safe readers refuse.
    with atomic_write(path) as file:
        pickle.dump((list(images), [bool(s) for s in same]), file, protocol=4)
