"""Make records and a verification set of Labeled Faces in the Wild, for a first run on real faces.

    python scripts/fetch_lfw.py OUT                  downloads it (200 MB) by scikit-learn
    python scripts/fetch_lfw.py OUT --source DIR     takes a local copy

The command writes OUT/train.rec with the people who have at least --min-images images,
center-cropped to 112 x 112, and OUT/lfw_part.bin with the official pairs of all other people, so
that nobody is in both. Folds stay balanced: each keeps as many pairs of either kind as the smallest
has. Then train:

    torchrun --nproc_per_node=2 train_v2.py configs/lfw_nano rec=OUT val_targets=[lfw_part]

DIR holds NAME/NAME_0001.jpg and pairs.txt, itself or in one of the folders of LFW's releases
(lfw_funneled, lfw-deepfunneled, lfw). Or it holds train/NAME/*.jpg with a finished .bin of pairs,
which is then checked and copied. Center-cropped faces are not aligned: for numbers to compare with
published ones detect landmarks and use scripts/align.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError, MissingDataError, list_class_folders
from data.decode import decode_image, read_image_file
from data.pairs import Pair, read_pairs, write_verification_set
from data.tools.encode import encode_jpeg, fit_pixels
from data.tools.record_writer import RecordSetWriter
from eval.verification_sets import load_verification_set
from utils.cli import cli_command

SIZE = 112
FOLDS = 10
_IMAGE_FOLDERS = ("lfw_funneled", "lfw-deepfunneled", "lfw", "train", "lfw_home/lfw_funneled", ".")


def center_crop(encoded: bytes, where: str) -> bytes:
    """Cuts out the center 112 x 112 pixels as a JPEG.

    A JPEG of that size stays byte for byte, and a smaller image is enlarged.

    Args:
        encoded: Content of the file.
        where: Name of the image in errors.

    Raises:
        ImageError: The image cannot be decoded.
    """
    image = decode_image(encoded, where)
    height, width = image.shape[:2]
    if (height, width) == (SIZE, SIZE) and encoded[:2] == b"\xff\xd8":
        return encoded
    if min(height, width) >= SIZE:
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        image = image[top : top + SIZE, left : left + SIZE]
    return encode_jpeg(fit_pixels(image, SIZE))


def find_images(source: Path) -> Path:
    """Returns the folder below `source` that has a folder per identity.

    Raises:
        MissingDataError: There is no such folder.
    """
    for name in _IMAGE_FOLDERS:
        folder = source / name
        if folder.is_dir() and any(
            person.is_dir() and any(person.glob(f"{person.name}_*.jpg"))
            for person in sorted(folder.iterdir())[:100]
        ):
            return folder
    raise MissingDataError(
        f"{source}: no NAME/NAME_0001.jpg below it or below {', '.join(_IMAGE_FOLDERS[:-1])}. Give "
        "the folder that a release of LFW was unpacked to"
    )


def find_pairs(source: Path, images: Path) -> Path | None:
    """Returns the official pairs.txt beside or above the images, or None."""
    for folder in (source, images, images.parent):
        if (folder / "pairs.txt").is_file():
            return folder / "pairs.txt"
    return None


def balanced_folds(pairs: Sequence[Pair], num_folds: int, held_out: set[str]) -> list[Pair]:
    """Returns the pairs of identities that are not in training, balanced in each fold.

    They are ordered fold by fold, same before different, with the same number of either in every
    fold, because verification cuts its ten folds by counting.

    Args:
        pairs: Pairs in the order of LFW's file, whose folds are equally long.
        num_folds: Number of folds in the file.
        held_out: Names of the identities in training.

    Raises:
        DataError: A fold has no pair of one kind left.
    """
    per_fold = -(-len(pairs) // num_folds)
    kinds: list[list[Pair]] = []
    for begin in range(0, len(pairs), per_fold):
        fold = [
            p for p in pairs[begin : begin + per_fold] if not {p.first[0], p.second[0]} & held_out
        ]
        kinds += [[p for p in fold if p.same], [p for p in fold if not p.same]]
    count = min(map(len, kinds))
    if not count:
        raise DataError(
            "a fold of the pairs has none left whose people are not in training; raise --min-images"
        )
    return [pair for kind in kinds for pair in kind[:count]]


def make_lfw(source: Path, out: Path, *, min_images: int, force: bool = False) -> str:
    """Writes OUT/train.rec and OUT/lfw_part.bin.

    Args:
        source: Folder of a release of LFW.
        out: Folder to write to.
        min_images: Smallest number of images of an identity in training.
        force: Whether existing files are replaced.

    Returns:
        What was written, in words.

    Raises:
        DataError: The files do not fit, or `out` has them already.
        ImageError: An image cannot be decoded.
        RecordError: A record does not fit the format.
        UserError: The finished .bin is damaged.
    """
    images = find_images(source)
    names, files, labels = list_class_folders(images)
    counts = np.bincount(labels, minlength=len(names))
    chosen = np.flatnonzero(counts >= min_images)
    if len(chosen) < 2:
        raise DataError(
            f"{images}: {len(chosen)} people have {min_images} or more images; lower --min-images"
        )
    people = {names[label] for label in chosen.tolist()}
    path_pairs = find_pairs(source, images)
    finished = sorted(source.glob("*.bin"))
    if path_pairs is None and len(finished) != 1:
        raise MissingDataError(
            f"{source}: neither pairs.txt (of LFW's web site) nor one finished .bin; put one there"
        )
    target = out / "lfw_part.bin"
    if target.exists() and not force:
        raise DataError(f"{target} already exists; give another folder, or --force to replace it")
    new_label = {old: new for new, old in enumerate(chosen.tolist())}
    with RecordSetWriter(out, SIZE, force) as writer:
        for label, file in zip(
            labels.tolist(), tqdm(files, desc="people", unit=" images"), strict=True
        ):
            if label in new_label:
                path = images / names[label] / file
                writer.add(center_crop(read_image_file(path), str(path)), new_label[label])
        if path_pairs is None:
            num_pairs = len(load_verification_set(finished[0]).issame)  # checks it
            shutil.copyfile(finished[0], target)
        else:
            num_pairs = _write_pairs(path_pairs, images, target, people, force)
        writer.finish([names[label] for label in chosen.tolist()])
        num_images = writer.num_images
    return f"{num_images} images of {len(people)} people, and {num_pairs} pairs of others"


def _write_pairs(
    path_pairs: Path, images: Path, target: Path, people: set[str], force: bool
) -> int:
    first = path_pairs.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split()
    num_folds = int(first[0]) if len(first) == 2 and first[0].isdigit() else FOLDS
    pairs = balanced_folds(read_pairs(path_pairs), max(1, num_folds), people)
    encoded: list[bytes] = []
    for pair in tqdm(pairs, desc="pairs", unit=" pairs"):
        for relative in pair.paths:
            path = images / relative
            if not path.is_file():
                raise MissingDataError(
                    f"{path_pairs}, line {pair.line}: {path} does not exist; images lie at "
                    "FOLDER/name/"
                )
            encoded.append(center_crop(read_image_file(path), str(path)))
    write_verification_set(target, encoded, [pair.same for pair in pairs], force=force)
    return len(pairs)


def download(folder: Path) -> Path:
    """Downloads LFW (funneled) and its pairs by scikit-learn, which checks their hashes.

    Args:
        folder: Folder that keeps the download.

    Returns:
        The folder of the files.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import fetch_lfw_people
    except ImportError as error:
        raise DataError(
            "downloading needs scikit-learn: pip install scikit-learn (or give --source DIR)"
        ) from error
    # The high limit loads few images into memory; only the files on disk are needed.
    fetch_lfw_people(data_home=str(folder), funneled=True, min_faces_per_person=500)
    return folder / "lfw_home"


@cli_command("stopped; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="fetch_lfw.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add("--source", type=Path, metavar="DIR", help="a local copy of LFW instead of a download")
    add("--min-images", type=int, default=10, help="of a person in training (default 10)")
    add("--keep", type=Path, metavar="DIR", help="keep the download here (default: removed)")
    add("--force", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    if args.min_images < 1:
        parser.error(f"--min-images {args.min_images}: allowed are 1 or more")
    options = {"min_images": args.min_images, "force": args.force}
    if args.source:
        written = make_lfw(args.source, args.out, **options)
    elif args.keep:
        written = make_lfw(download(args.keep), args.out, **options)
    else:
        with tempfile.TemporaryDirectory(prefix="lfw_") as folder:
            written = make_lfw(download(Path(folder)), args.out, **options)
    print(f"{args.out}: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
