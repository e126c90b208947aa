"""Divide class folders into train/ and val/, for classification, without copying an image.

    python scripts/hold_out.py FOLDER OUT [--every 10]

OUT/train/<class>/ and OUT/val/<class>/ hold links to the images of FOLDER/<class>/. Of every class
the images number 10, 20, ... in sorted order are held out, so each class keeps most of its images
for training. Everything is made in a folder beside OUT and renamed at the end.
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
from utils.cli import cli_command


def hold_out(folder: Path, out: Path, every: int = 10) -> tuple[int, int]:
    """Links the images of FOLDER below OUT, which must not exist.

    Args:
        folder: Folder of the class folders.
        out: Folder to make.
        every: Every so many images of a class one is held out.

    Returns:
        The numbers of images to train on and held out.

    Raises:
        DataError: An argument does not fit, or no image would be held out.
    """
    if every < 2:
        raise DataError(f"--every {every}: 2 or more, or nothing is left to train on")
    if out.exists():
        raise DataError(f"{out} already exists; give another folder, or remove it")
    source = FolderDataset(folder)
    staging = out.with_name(f".{out.name}.partial")
    if staging.exists():
        shutil.rmtree(staging)  # links that an interruption left
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


@cli_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(description="Divide class folders into train/ and val/.")
    parser.add_argument("folder", type=Path, help="FOLDER/<class>/<picture>")
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--every", type=int, default=10, help="hold out every so many (default 10)")
    options = parser.parse_args(arguments)
    train, val = hold_out(options.folder, options.out, options.every)
    print(f"{options.out}: {train:,} pictures to train on, {val:,} held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
