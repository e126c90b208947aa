"""Corrupt the labels of a record set as the published noisy-label experiments do.

    python scripts/make_noise.py DATA OUT --flip 0.4               wrong classes (WF12M-Flip)
    python scripts/make_noise.py DATA OUT --conflict 0.32          one person under several classes

--flip F: a share F of the images, drawn at random, gets the label of another class.
--conflict F: a share F of the classes, drawn at random, is split into --parts classes (default 3;
with a third of them, 617,970 classes become about 1,018,000, as in the published set).
OUT/noise.tsv says what was done: key, class given, true class. Images stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.class_names import read_label_map
from data.datasets import DataError
from data.order import derive_key, hash_indices, shuffled_indices
from data.tools.image_records import ImageRecords, relabeled
from data.tools.record_writer import RecordSetWriter
from utils.cli import cli_command
from utils.files import atomic_write


def flip_labels(classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Replaces round(share * n) of the labels by another class of the set, all equally likely.

    Args:
        classes: [n] int64.
        share: Share of the images, in [0, 1].
        seed: Seed of the draws.

    Returns:
        [n] int64.

    Raises:
        DataError: There are fewer than two classes.
    """
    present, places = np.unique(classes, return_inverse=True)
    if len(present) < 2:
        raise DataError(f"{len(present)} class: labels can only be flipped among two or more")
    count = round(share * len(classes))
    chosen = shuffled_indices(np.arange(count), len(classes), seed, epoch=0)
    steps = hash_indices(chosen, derive_key(seed, 1)) % np.uint64(len(present) - 1)
    noisy = classes.copy()
    noisy[chosen] = present[(places[chosen] + 1 + steps.astype(np.int64)) % len(present)]
    return noisy


def split_classes(classes: np.ndarray, share: float, parts: int, seed: int) -> np.ndarray:
    """Splits round(share * C) of the classes evenly at random into `parts` classes.

    A class with fewer images becomes fewer parts. The first part keeps its class, and the others
    get the next free ones.

    Args:
        classes: [n] int64.
        share: Share of the classes, in [0, 1].
        parts: Number of classes that one becomes.
        seed: Seed of the draws.

    Returns:
        [n] int64.
    """
    present, places = np.unique(classes, return_inverse=True)
    count = round(share * len(present))
    is_split = np.zeros(len(present), bool)
    if count:
        is_split[shuffled_indices(np.arange(count), len(present), seed, epoch=0)] = True
    images = np.flatnonzero(is_split[places])
    draws = hash_indices(images, derive_key(seed, 2))
    order = images[np.lexsort((draws, places[images]))]  # class by class, random inside
    first_of_class = np.searchsorted(places[order], places[order])
    part = (np.arange(len(order)) - first_of_class) % parts
    noisy = classes.copy()
    moved = part > 0
    names = places[order[moved]] * parts + part[moved]
    noisy[order[moved]] = classes.max() + 1 + np.unique(names, return_inverse=True)[1]
    return noisy


def make_noise(
    data: Path,
    out: Path,
    *,
    flip: float | None = None,
    conflict: float | None = None,
    parts: int = 3,
    seed: int = 0,
    force: bool = False,
) -> tuple[int, int]:
    """Writes the set with corrupted labels; after an error nothing is written.

    Args:
        data: Folder with train.rec and train.idx.
        out: Folder to write to.
        flip: Share of the images that get another label; None splits classes.
        conflict: Share of the classes that are split.
        parts: Number of classes that one becomes.
        seed: Seed of the draws.
        force: Whether an existing set is replaced.

    Returns:
        The number of images with another label, and the number of classes now.

    Raises:
        DataError: The set or an argument does not fit.
        RecordError: A record is damaged.
    """
    records = ImageRecords(data)
    folder = records.path_rec.parent
    if out.resolve() == folder.resolve():
        raise DataError(f"{out}: labels are never spoilt in place; give another folder")
    with tqdm(total=len(records), desc="labels", unit=" records") as bar:
        classes = records.classes(bar.update)
    if flip is not None:
        noisy = flip_labels(classes, flip, seed)
    else:
        noisy = split_classes(classes, conflict or 0.0, parts, seed)
    stated = records.stated()
    num_classes = max(stated.num_classes, int(max(classes.max(), noisy.max())) + 1)
    names = read_label_map(folder)
    if names is not None:
        names += [f"part_of_another_{label}" for label in range(len(names), num_classes)]
    truth = ["# key\tclass given\ttrue class\n"]
    size = (stated.height, stated.width)
    with RecordSetWriter(out, size, force, style=records.style) as writer:
        for record, label in zip(tqdm(records, unit=" records"), noisy.tolist(), strict=True):
            payload = record.payload
            if label != record.class_id:
                payload = relabeled(payload, label)
                truth.append(f"{record.key}\t{label}\t{record.class_id}\n")
            writer.add_payload(payload, label, record.key)
        with atomic_write(out / "noise.tsv") as file:
            file.write("".join(truth).encode())
        writer.finish(names, num_classes)
    return len(truth) - 1, num_classes


@cli_command("stopped; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="make_noise.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with train.rec and train.idx")
    add("out", type=Path, metavar="OUT", help="folder to write to")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--flip", type=float, metavar="F", help="share of the images, 0 to 1")
    kind.add_argument("--conflict", type=float, metavar="F", help="share of the classes, 0 to 1")
    add("--parts", type=int, default=3, help="classes that a split one becomes (default 3)")
    add("--seed", type=int, default=0, help="another seed, other images (default 0)")
    add("--force", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    share = args.conflict if args.flip is None else args.flip
    if not 0 <= share <= 1:
        parser.error(f"a share of {share}: allowed are 0 to 1, such as 0.4")
    if args.parts < 2:
        parser.error(f"--parts {args.parts}: allowed are 2 or more")
    changed, num_classes = make_noise(
        args.data,
        args.out,
        flip=args.flip,
        conflict=args.conflict,
        parts=args.parts,
        seed=args.seed,
        force=args.force,
    )
    print(f"{args.out}: {changed} images with another label, {num_classes} classes; see noise.tsv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
