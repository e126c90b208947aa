"""Pack images into the files that training and verification read.

    python scripts/pack.py FOLDER OUT                       FOLDER/<class>/<image> -> OUT/train.rec
    python scripts/pack.py LIST.lst OUT --root FOLDER       im2rec's list: key, label(s), path
    python scripts/pack.py LIST.csv OUT --root FOLDER       path, label
    python scripts/pack.py --pairs PAIRS.txt FOLDER OUT.bin a verification set

The command writes train.rec, train.idx, train.manifest (a hash per record, see scripts/doctor.py
--verify), property and, if classes have names, label_map.txt. Run the same command again after an
interruption: it continues where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError, MissingDataError, list_class_folders
from data.decode import read_image_file
from data.order import shuffled_indices
from data.pairs import read_pairs, write_verification_set
from data.tools.encode import FitTask, fit_files, fit_image
from data.tools.record_writer import IM2REC, INSIGHTFACE, STYLES, RecordSetWriter
from data.tools.workers import ordered_map
from utils.cli import cli_command
from utils.files import list_some

_CHUNK = 64  # images per task handed to a process
_KEPT = 1000  # images left out that are named; further ones are only counted
_PATH_COLUMNS = ("path", "file", "filename", "image")
_LABEL_COLUMNS = ("label", "class", "identity", "id", "name")


class Listing(NamedTuple):
    """What to pack, in order.

    Attributes:
        paths: Path of each image.
        labels: [n] int64, the class of each image.
        vectors: All labels of each image if there are several, else None.
        keys: [n] int64 if the list gives them, else None.
        class_names: Names by label, or None.
    """

    paths: list[str]
    labels: np.ndarray
    vectors: list[list[float]] | None = None
    keys: np.ndarray | None = None
    class_names: list[str] | None = None


@dataclass
class PackReport:
    """What was written.

    Attributes:
        num_images: Number of images written.
        num_classes: Number of classes.
        num_reencoded: Number of images that were encoded again.
        num_skipped: Number of images left out.
        skipped: The first files left out (path: why).
    """

    num_images: int = 0
    num_classes: int = 0
    num_reencoded: int = 0
    num_skipped: int = 0
    skipped: list[str] = field(default_factory=list)

    def skip(self, problem: str) -> None:
        """Counts an image that is left out and keeps its problem if there is room."""
        self.num_skipped += 1
        if len(self.skipped) < _KEPT:
            self.skipped.append(problem)


def pack_listing(
    listing: Listing,
    out: Path,
    *,
    size: int = 112,
    quality: int | None = None,
    style: str = INSIGHTFACE,
    shuffle_seed: int | None = None,
    force: bool = False,
    restart: bool = False,
    skip_bad: bool = False,
    num_processes: int = 1,
) -> PackReport:
    """Writes the listed images as records to OUT, fitted by `fit_image`.

    Args:
        listing: The images.
        out: Folder to write to.
        size: Side in pixels.
        quality: See `fit_image`.
        style: See `RecordSetWriter`.
        shuffle_seed: Seed of a random order; None keeps the order of the list.
        force: Whether an existing set is replaced.
        restart: Whether the interrupted beginning of another job in `out` is dropped.
        skip_bad: Whether unreadable images are left out and reported.
        num_processes: Number of processes that decode.

    Raises:
        DataError: An image cannot be read (without `skip_bad`), none can, or `out` is not free; the
            message lists the files. Nothing is written then.
    """
    total = len(listing.paths)
    for name in listing.class_names or ():
        if not name.isprintable():
            raise DataError(f"class name {name!r}: label_map.txt needs names of one line, no tabs")
    token = _token(listing, size, quality, style, shuffle_seed, skip_bad)
    with RecordSetWriter(
        out, size, force, style=style, resume_token=token, restart=restart
    ) as writer:
        report = PackReport(**writer.progress.get("report", {}))
        done = int(writer.progress.get("done", 0))
        if done and not writer.progress.get("finished"):
            print(f"{out}: going on after {done} of {total} images", file=sys.stderr)
        chunks = _chunks(total, done, shuffle_seed)
        tasks = (
            FitTask([listing.paths[i] for i in chunk], size, quality)
            for chunk in _chunks(total, done, shuffle_seed)
        )
        processes = num_processes if total - done > 4 * _CHUNK else 1
        with (
            tqdm(total=total, initial=done, unit=" images") as bar,
            closing(ordered_map(fit_files, tasks, processes)) as results,
        ):
            for chunk, fitted in zip(chunks, results, strict=False):
                for i, result in zip(chunk, fitted, strict=True):
                    if isinstance(result, str):
                        report.skip(result)
                        continue
                    report.num_reencoded += result.reencoded
                    label = listing.vectors[i] if listing.vectors else int(listing.labels[i])
                    key = None if listing.keys is None else int(listing.keys[i])
                    writer.add(result.encoded, label, key if style == IM2REC else None)
                done += len(chunk)
                writer.note(done=done, report=asdict(report))
                bar.update(len(chunk))
        if report.num_skipped and not skip_bad:
            writer.discard()
            raise DataError(
                f"{report.num_skipped} of {total} images cannot be used; nothing was "
                f"written.\n{list_some(report.skipped)}\nRepair or remove them, or leave them out "
                "with --skip-bad."
            )
        if not writer.num_images:
            writer.discard()
            raise DataError("none of the images can be read; nothing was written")
        report.num_images = writer.num_images
        report.num_classes = max(int(listing.labels.max()) + 1, len(listing.class_names or ()))
        writer.finish(listing.class_names, report.num_classes)
    return report


def _chunks(total: int, done: int, shuffle_seed: int | None) -> Iterator[list[int]]:
    """Yields the positions of the listing in the order of packing, `_CHUNK` at a time."""
    for begin in range(done, total, _CHUNK):
        positions = np.arange(begin, min(begin + _CHUNK, total))
        if shuffle_seed is not None:
            positions = shuffled_indices(positions, total, shuffle_seed, epoch=0)
        yield positions.tolist()


def _token(listing: Listing, *options: object) -> str:
    """Identifies a job; an interrupted one is continued only by a job with the same token."""
    token = hashlib.sha1(repr(options).encode())
    for path in listing.paths:
        token.update(os.fsencode(path) + b"\0")
    token.update(listing.labels.tobytes())
    token.update(b"" if listing.keys is None else listing.keys.tobytes())
    token.update(repr(listing.vectors).encode())
    return token.hexdigest()


def list_folder(folder: Path, include: Sequence[str] = ("*",)) -> Listing:
    """Lists FOLDER/<class>/<image>, classes and images in sorted order.

    Raises:
        DataError: The folder has no class or a class without images.
    """
    names, files, labels = list_class_folders(folder, tuple(include))
    paths = [
        os.path.join(folder, names[label], file)
        for label, file in zip(labels.tolist(), files, strict=True)
    ]
    return Listing(paths, labels, class_names=names)


def read_list(path: Path, root: Path, include: Sequence[str] = ("*",)) -> Listing:
    """Reads a `.lst` or `.csv` file.

    Args:
        path: Path of the file.
        root: Folder that its paths are relative to.
        include: Shell patterns; a path as written has to match one of them.

    Raises:
        DataError: The file cannot be read, has a wrong line, or lists no image.
    """
    readers = {".lst": _read_lst, ".csv": _read_csv}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: a file of this kind cannot be packed; allowed are a folder, a .lst file "
            "(key, label, path) and a .csv file (path, label)"
        )
    try:
        listing = readers[path.suffix](path, include)
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error
    if not listing.paths:
        raise DataError(f"{path}: lists no image" + ("" if "*" in include else f" like {include}"))
    return listing._replace(paths=[os.path.join(root, name) for name in listing.paths])


def _read_lst(path: Path, include: Sequence[str]) -> Listing:
    """Reads im2rec's lines `key<tab>label<tab>...<tab>path`, labels as whole numbers or floats."""
    names: list[str] = []
    keys: list[int] = []
    labels: list[list[float]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            columns = line.rstrip("\r\n").split("\t")
            if columns == [""]:
                continue
            try:
                key, values = int(columns[0]), [float(text) for text in columns[1:-1]]
                good = key >= 0 and values[0] >= 0 and values[0].is_integer()
            except (ValueError, IndexError):
                good = False
            if not good:
                raise DataError(
                    f"{path}, line {number}: expected 'key<tab>label<tab>path', the key and the "
                    f"(first) label whole numbers from 0 on, got {line[:80]!r}"
                )
            if not any(fnmatchcase(columns[-1], pattern) for pattern in include):
                continue
            names.append(columns[-1])
            keys.append(key)
            labels.append(values)
    if len({len(values) for values in labels}) > 1:
        raise DataError(f"{path}: the lines have different numbers of labels; give each as many")
    key_array = np.array(keys, np.int64)
    ascending = np.sort(key_array)
    twice = np.flatnonzero(np.diff(ascending) == 0)
    if len(twice):
        raise DataError(f"{path}: key {ascending[twice[0]]} appears twice; keys must be distinct")
    several = bool(labels) and len(labels[0]) > 1
    classes = np.array([int(values[0]) for values in labels], np.int64)
    vectors = [[int(v[0]), *v[1:]] for v in labels] if several else None
    return Listing(names, classes, vectors, key_array)


def _read_csv(path: Path, include: Sequence[str]) -> Listing:
    """Reads the columns path and label, in this order or as the first line names them.

    Labels are class numbers. If one of them is not a whole number, all are names, which are
    numbered in sorted order.
    """
    names: list[str] = []
    texts: list[str] = []
    path_column, label_column = 0, 1
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            cells = [cell.strip() for cell in row]
            lower = [cell.lower() for cell in cells]
            if number == 1:
                found = [
                    next((c for c in wanted if c in lower), None)
                    for wanted in (_PATH_COLUMNS, _LABEL_COLUMNS)
                ]
                if found[0] and found[1]:
                    path_column, label_column = lower.index(found[0]), lower.index(found[1])
                    continue
            if not any(cells):
                continue
            if len(cells) <= max(path_column, label_column) or not cells[path_column]:
                raise DataError(
                    f"{path}, line {number}: expected 'path,label' (or a first line that names the "
                    f"columns, such as 'path,label'), got {','.join(row)[:80]!r}"
                )
            if any(fnmatchcase(cells[path_column], pattern) for pattern in include):
                names.append(cells[path_column])
                texts.append(cells[label_column])
    class_names: list[str] | None = None
    if all(text.isascii() and text.isdigit() and len(text) <= 18 for text in texts):
        labels = np.array([int(text) for text in texts], np.int64)
    else:
        class_names = sorted(set(texts))
        number_of = {name: label for label, name in enumerate(class_names)}
        labels = np.array([number_of[text] for text in texts], np.int64)
    order = np.argsort(labels, kind="stable")  # class by class, as InsightFace-style sets are
    return Listing([names[i] for i in order], labels[order], class_names=class_names)


def pack_pairs(
    path_pairs: Path,
    folder: Path,
    out: Path,
    *,
    size: int = 112,
    quality: int | None = None,
    force: bool = False,
) -> int:
    """Writes a verification set from FOLDER/name/name_0001.jpg and so on.

    Args:
        path_pairs: The pairs file.
        folder: Folder of the images.
        out: Path of the .bin file.
        size: Side in pixels.
        quality: See `fit_image`.
        force: Whether an existing file is replaced.

    Returns:
        The number of pairs.

    Raises:
        DataError: The pairs file is wrong, an image is missing, or `out` exists.
        ImageError: An image is damaged; the message names line and file.
    """
    pairs = read_pairs(path_pairs)
    images: list[bytes] = []
    for pair in tqdm(pairs, unit=" pairs"):
        for relative in pair.paths:
            path = folder / relative
            where = f"{path_pairs}, line {pair.line}: {path}"
            if not path.is_file():
                raise MissingDataError(f"{where} does not exist; images lie at FOLDER/name/")
            images.append(fit_image(read_image_file(path, where), where, size, quality).encoded)
    write_verification_set(out, images, [pair.same for pair in pairs], force=force)
    return len(pairs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pack.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="folder of class folders, .lst or .csv file")
    add("out", type=Path, metavar="OUT", help="folder for the records; with --pairs a .bin file")
    add("--root", type=Path, help="what paths in a list are relative to (default: its folder)")
    add("--pairs", type=Path, metavar="PAIRS.txt", help="write a verification set of these pairs")
    add("--size", type=int, default=112, help="pixels per side (default 112)")
    add("--quality", type=int, help="encode every image anew, as JPEG of this quality (1 to 100)")
    add(
        "--include",
        action="append",
        metavar="GLOB",
        help="only class folders (paths in a list) like this: '0_*'; repeats",
    )
    add("--style", choices=STYLES, help="default: im2rec for .lst files, else insightface")
    add("--shuffle", action="store_true", help="write the images in random order")
    add("--seed", type=int, default=0, help="of --shuffle (default 0)")
    add("--skip-bad", action="store_true", help="leave unreadable images out, and list them")
    add("--force", action="store_true", help="replace what is there")
    add("--restart", action="store_true", help="drop the interrupted beginning of another job")
    add(
        "--num-thread",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode (default: one per core, at most 4)",
    )
    return parser


@cli_command("stopped; the same command resumes here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not 1 <= args.size <= 4096:
        parser.error(f"--size {args.size}: allowed are 1 to 4096")
    if args.quality is not None and not 1 <= args.quality <= 100:
        parser.error(f"--quality {args.quality}: allowed are 1 to 100")
    if args.num_thread < 1:
        parser.error(f"--num-thread {args.num_thread}: allowed are 1 or more")
    if args.pairs and (args.include or args.skip_bad or args.shuffle):
        parser.error("--include, --skip-bad and --shuffle do not go with --pairs")
    common = {"size": args.size, "quality": args.quality, "force": args.force}
    include = tuple(args.include or ("*",))
    if args.pairs:
        count = pack_pairs(args.pairs, args.input, args.out, **common)
        print(f"{args.out}: {count} pairs")
        return 0
    if args.input.is_file():
        listing = read_list(args.input, args.root or args.input.parent, include)
    else:
        listing = list_folder(args.input, include)
    report = pack_listing(
        listing,
        args.out,
        style=args.style or (INSIGHTFACE if listing.keys is None else IM2REC),
        shuffle_seed=args.seed if args.shuffle else None,
        restart=args.restart,
        skip_bad=args.skip_bad,
        num_processes=args.num_thread,
        **common,
    )
    print(
        f"{args.out}: {report.num_images} images of {report.num_classes} classes, "
        f"{report.num_reencoded} encoded anew, {report.num_skipped} left out"
    )
    if report.skipped:
        print(list_some(report.skipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
