"""Pack images into the files that training and verification read.

    python scripts/pack.py FOLDER OUT                       FOLDER/<class>/<image> -> OUT/train.rec
    python scripts/pack.py --pairs PAIRS.txt FOLDER OUT.bin a verification set

The records are InsightFace style: a header record, the images, one record per identity.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.decode import ImageError, decode_image, read_image_file
from data.pairs import read_pairs
from data.prefetch import OrderedPrefetch
from data.recordio import RecordError, RecordWriter, pack_record
from data.sources import MAX_EXACT_LABEL, DataError, MissingDataError, list_class_folders

DEFAULT_QUALITY = 95
_CHUNK = 64  # images per task handed to a thread
_LISTED = 20  # bad files named in an error; the rest is counted


@dataclass
class PackReport:
    """What was written: counts, and the files left out (path: why)."""

    num_images: int = 0
    num_classes: int = 0
    num_reencoded: int = 0
    skipped: list[str] = field(default_factory=list)


class RecordSetWriter:
    """Writes `train.rec`, `train.idx`, `property`, `label_map.txt`, InsightFace style.

    Images come class by class. Everything appears at `finish`; leaving the `with` block without it
    leaves nothing behind.
    """

    def __init__(self, out: Path, size: int, force: bool = False) -> None:
        self.out, self.size = out, size
        out.mkdir(parents=True, exist_ok=True)
        existing = [name for name in ("train.rec", "train.idx") if (out / name).exists()]
        if existing and not force:
            raise DataError(
                f"{out} already holds {' and '.join(existing)}; give another folder, or --force to "
                "replace them"
            )
        self._writer = RecordWriter(out / "train.rec", out / "train.idx")
        self._writer.write(0, pack_record(b"", (0.0, 0.0)))  # the counts are known at the end
        self._firsts: list[int] = []  # key of the first image of each class
        self.num_images = 0

    def start_class(self) -> int:
        """Images from here on belong to a new class; returns its label."""
        self._firsts.append(self.num_images + 1)
        return len(self._firsts) - 1

    def add(self, encoded: bytes) -> None:
        """One more image of the current class."""
        self.num_images += 1
        label = len(self._firsts) - 1
        self._check_exact(self.num_images + 1)
        self._writer.write(self.num_images, pack_record(encoded, label, self.num_images))

    def finish(self, class_names: Sequence[str] | None = None) -> None:
        """Write the identity records and put all files in place."""
        first_identity = self.num_images + 1
        num_classes = len(self._firsts)
        self._check_exact(first_identity + num_classes)
        for label, first in enumerate(self._firsts):
            end = self._firsts[label + 1] if label + 1 < num_classes else first_identity
            key = first_identity + label
            self._writer.write(key, pack_record(b"", (first, end), key))
        self._writer.rewrite_first(pack_record(b"", (first_identity, first_identity + num_classes)))
        texts = {"property": f"{num_classes},{self.size},{self.size}\n"}
        if class_names is not None:
            texts["label_map.txt"] = "".join(f"{i}\t{n}\n" for i, n in enumerate(class_names))
        for name in ("property", "label_map.txt"):
            # A kill between the steps below must not leave old facts beside new records.
            (self.out / name).unlink(missing_ok=True)
        self._writer.close()
        for name, text in texts.items():
            write_atomically(self.out / name, text.encode())

    def _check_exact(self, largest: int) -> None:
        if largest > MAX_EXACT_LABEL:
            raise DataError(
                f"more than {MAX_EXACT_LABEL:,} images and classes: the header of this record "
                "style keeps numbers as float32, exact only up to there. Pack a part "
                "(--include '0_*')."
            )

    def __enter__(self) -> RecordSetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.abort()  # does nothing after finish


def pack_folder(
    folder: Path,
    out: Path,
    *,
    size: int = 112,
    quality: int | None = None,
    include: Sequence[str] = ("*",),
    force: bool = False,
    skip_bad: bool = False,
    num_threads: int = 4,
) -> PackReport:
    """Write the images of FOLDER/<class>/ as records to OUT; see `fit_image` for what they become.

    Raises DataError listing the unreadable files, unless `skip_bad` leaves them out and reports
    them; nothing is written then.
    """
    names, files, labels = list_class_folders(folder, tuple(include))
    report = PackReport(num_classes=len(names))

    def load(chunk: int) -> list[tuple[bytes, bool] | ImageError]:
        results: list[tuple[bytes, bool] | ImageError] = []
        for i in range(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(files))):
            path = folder / names[labels[i]] / files[i]
            try:
                results.append(fit_image(read_image_file(path), str(path), size, quality))
            except ImageError as error:
                results.append(error)
        return results

    chunks = OrderedPrefetch(load, range(-(-len(files) // _CHUNK)), num_threads)
    with RecordSetWriter(out, size, force) as writer, tqdm(total=len(files), unit=" images") as bar:
        try:
            last_label = -1
            for label, result in zip(labels.tolist(), _flat(chunks), strict=True):
                if label != last_label:
                    last_label = writer.start_class()
                if isinstance(result, ImageError):
                    report.skipped.append(str(result))
                else:
                    writer.add(result[0])
                    report.num_reencoded += result[1]
                bar.update()
        finally:
            chunks.close()
        if report.skipped and not skip_bad:
            raise DataError(
                f"{len(report.skipped)} of {len(files)} images cannot be used; nothing was "
                f"written.\n{list_some(report.skipped)}\nRepair or remove them, or leave them out "
                "with --skip-bad."
            )
        report.num_images = writer.num_images
        if not report.num_images:
            raise DataError(f"{folder}: none of its images can be read; nothing was written")
        writer.finish(names)
    return report


def _flat(
    chunks: Iterable[list[tuple[bytes, bool] | ImageError]],
) -> Iterable[tuple[bytes, bool] | ImageError]:
    for chunk in chunks:
        yield from chunk


def fit_image(encoded: bytes, where: str, size: int, quality: int | None) -> tuple[bytes, bool]:
    """The image as a JPEG of size x size pixels, and whether it had to be encoded anew.

    A JPEG of the right size is kept byte for byte unless a quality is asked for. Other sizes are
    cropped to the centred square and resized. Every image is decoded once, so that a damaged one
    is found now. Raises ImageError.
    """
    image = decode_image(encoded, where)
    height, width = image.shape[:2]
    if (height, width) == (size, size) and quality is None and encoded[:2] == b"\xff\xd8":
        return encoded, False
    if (height, width) != (size, size):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
        shrinks = side > size
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        image = cv2.resize(image, (size, size), interpolation=interpolation)
    return encode_jpeg(image, DEFAULT_QUALITY if quality is None else quality), True


def encode_jpeg(image: np.ndarray, quality: int = DEFAULT_QUALITY) -> bytes:
    """RGB uint8 [H, W, 3] as JPEG, colours at full resolution."""
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def pack_pairs(
    path_pairs: Path,
    folder: Path,
    out: Path,
    *,
    size: int = 112,
    quality: int | None = None,
    force: bool = False,
) -> int:
    """Write a verification set from FOLDER/name/name_0001.jpg and so on; returns the pair count.

    Raises DataError naming the line and file of a missing or damaged image.
    """
    pairs = read_pairs(path_pairs)
    images: list[bytes] = []
    for pair in tqdm(pairs, unit=" pairs"):
        for relative in pair.paths:
            path = folder / relative
            where = f"{path_pairs}, line {pair.line}: {path}"
            if not path.is_file():
                raise MissingDataError(f"{where} does not exist; images lie at FOLDER/name/")
            images.append(fit_image(read_image_file(path, where), where, size, quality)[0])
    write_verification_set(out, images, [pair.same for pair in pairs], force=force)
    return len(pairs)


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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is the old one, the new one, or absent."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def list_some(problems: Sequence[str]) -> str:
    """The first problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
    return "\n".join([*problems[:_LISTED], *more])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pack.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="class folders with images in them")
    add("out", type=Path, metavar="OUT", help="folder for the records; with --pairs a .bin file")
    add("--pairs", type=Path, metavar="PAIRS.txt", help="write a verification set of these pairs")
    add("--size", type=int, default=112, help="pixels per side (default 112)")
    add("--quality", type=int, help="encode every image anew, as JPEG of this quality (1 to 100)")
    add("--include", action="append", metavar="GLOB", help="only class folders like this; repeats")
    add("--skip-bad", action="store_true", help="leave unreadable images out, and list them")
    add("--force", action="store_true", help="replace what is there")
    add("--num-thread", type=int, default=4, metavar="N", help="threads that decode (default 4)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 with a message on stderr."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not 1 <= args.size <= 4096:
        parser.error(f"--size {args.size}: allowed are 1 to 4096")
    if args.quality is not None and not 1 <= args.quality <= 100:
        parser.error(f"--quality {args.quality}: allowed are 1 to 100")
    if args.num_thread < 1:
        parser.error(f"--num-thread {args.num_thread}: allowed are 1 or more")
    if args.pairs and (args.include or args.skip_bad):
        parser.error("--include and --skip-bad do not go with --pairs: the file names the images")
    common = {"size": args.size, "quality": args.quality, "force": args.force}
    try:
        if args.pairs:
            count = pack_pairs(args.pairs, args.folder, args.out, **common)
            print(f"{args.out}: {count} pairs")
            return 0
        report = pack_folder(
            args.folder,
            args.out,
            include=args.include or ("*",),
            skip_bad=args.skip_bad,
            num_threads=args.num_thread,
            **common,
        )
    except (DataError, ImageError, RecordError, OSError) as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {report.num_images} images of {report.num_classes} classes, "
        f"{report.num_reencoded} encoded anew, {len(report.skipped)} left out"
    )
    if report.skipped:
        print(list_some(report.skipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
