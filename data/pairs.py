"""Verification sets: pairs files in, `.bin` files out."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.files import write_atomically
from data.sources import DataError, MissingDataError


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file: two (name, number) and whether they are the same person."""

    first: tuple[str, int]
    second: tuple[str, int]
    same: bool
    line: int


def read_pairs(path: Path) -> list[Pair]:
    """Parse a pairs file: the lines of LFW's `pairs.txt` (name n1 n2, or name1 n1 name2 n2, after
    a line of one or two counts), or name1 n1 name2 n2 same, with same 0 or 1.

    Raises DataError naming the line.
    """
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a pairs file")
    pairs: list[Pair] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        columns = line.split()
        counts_line = number == 1 and len(columns) <= 2 and all(c.isdigit() for c in columns)
        if not columns or counts_line:
            continue
        match columns:
            case [name, a, b] if _numbers(a, b):
                pairs.append(Pair((name, int(a)), (name, int(b)), True, number))
            case [name, a, other, b] if _numbers(a, b):
                pairs.append(Pair((name, int(a)), (other, int(b)), False, number))
            case [name, a, other, b, ("0" | "1") as same] if _numbers(a, b):
                pairs.append(Pair((name, int(a)), (other, int(b)), same == "1", number))
            case _:
                raise DataError(
                    f"{path}, line {number}: expected 'name n1 n2', 'name1 n1 name2 n2' or "
                    f"'name1 n1 name2 n2 same', got {line[:80]!r}"
                )
    if not pairs:
        raise DataError(f"{path}: holds no pairs")
    return pairs


def _numbers(*texts: str) -> bool:
    return all(re.fullmatch(r"[0-9]{1,9}", text) for text in texts)


def image_path(folder: Path, name: str, number: int, where: str) -> Path:
    """FOLDER/name/name_0001.jpg. Raises DataError, beginning with `where`, for a name that is no
    folder name (pairs files are downloaded) and MissingDataError where the image is not there."""
    if os.path.basename(name) != name or name in (".", ".."):
        raise DataError(f"{where}: {name!r} is no folder name")
    path = folder / name / f"{name}_{number:04d}.jpg"
    if not path.is_file():
        raise MissingDataError(f"{where}: {path} does not exist; images lie at FOLDER/name/")
    return path


def write_verification_set(
    path: Path, images: Sequence[bytes], same: Sequence[bool], *, force: bool = False
) -> None:
    """Write the `.bin` layout: a pickle of (list of 2N encoded images, list of N bools)."""
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(images)} images for {len(same)} pairs; a pair is two images")
    if path.exists() and not force:
        raise DataError(f"{path} already exists; give another name, or --force to replace it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Protocol 4 stores bytes as bytes; below 3 they would become calls that safe readers refuse.
    write_atomically(path, pickle.dumps((list(images), [bool(s) for s in same]), protocol=4))
