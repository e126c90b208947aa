"""Divide class folders into train/ and val/, for classification, without copying a picture.

    python scripts/hold_out.py FOLDER OUT [--every 10]

OUT/train/<class>/ and OUT/val/<class>/ hold links to the pictures of FOLDER/<class>/: of every
class the pictures number 10, 20, ... in sorted order are held out, so that each keeps most of its
own.
Everything is made in a folder beside OUT and renamed at the end.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError, FolderDataset


def hold_out(folder: Path, out: Path, every: int = 10) -> tuple[int, int]:
    """Link the pictures of FOLDER below OUT, which must not exist; returns (train, val) counts.

    Raises DataError.
    """
    if every < 2:
        raise DataError(f"--every {every}: 2 or more, or nothing is left to train on")
    if out.exists():
        raise DataError(f"{out} already exists; give another folder, or remove it")
    source = FolderDataset(folder)
    staging = out.with_name(f".{out.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)  # of links, left by an interruption
    counts = {"train": 0, "val": 0}
    number, label = 0, -1
    for index, its_label in enumerate(source.labels().tolist()):
        number, label = (1, its_label) if its_label != label else (number + 1, label)
        part = "val" if number % every == 0 else "train"
        path = source.path(index).resolve()
        link = staging / part / source.class_names[label] / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
        counts[part] += 1
    if not counts["val"]:
        raise DataError(
            f"{folder}: no class has {every} pictures, so none is held out; a smaller --every would"
        )
    staging.rename(out)
    return counts["train"], counts["val"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Divide class folders into train/ and val/.")
    parser.add_argument("folder", type=Path, help="FOLDER/<class>/<picture>")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--every", type=int, default=10, help="hold out every so many (default 10)")
    options = parser.parse_args(arguments)
    try:
        train, val = hold_out(options.folder, options.out, options.every)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {train:,} pictures to train on, {val:,} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
