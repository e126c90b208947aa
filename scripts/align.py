"""Align faces by five landmarks to 112 x 112, as the published weights expect them.

    python scripts/align.py IMAGES LANDMARKS.txt OUT

LANDMARKS.txt has a line per image: its path below IMAGES, then x y of left eye, right eye, nose
tip, left and right corner of the mouth in pixels. More columns (a detector's score) are ignored.
Separators are blanks, or commas. OUT gets the same paths, as JPEG (quality 95, colors at full
resolution) or PNG. Everything is written to .OUT.partial beside OUT and renamed at the end. After
an interruption the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.alignment import AlignmentError, align
from data.datasets import DataError
from data.decode import ImageError, decode_image, read_image_file
from data.tools.encode import encode_jpeg
from data.tools.workers import ordered_map
from utils.cli import cli_command
from utils.files import atomic_write, list_some, publish_folder, staging_folder

_CHUNK = 32  # images per task handed to a process


class Face(NamedTuple):
    """One line of a landmark file.

    Attributes:
        name: Path of the image below the folder.
        points: Ten pixels x1, y1, ..., x5, y5.
        line: Number of the line.
    """

    name: str
    points: tuple[float, ...]
    line: int


class AlignTask(NamedTuple):
    """Images for one worker.

    Attributes:
        faces: The images and their landmarks.
        images: Folder that the names are relative to.
        out: Folder to write to.
        size: Side of the result in pixels.
        png: Whether PNG is written instead of JPEG.
    """

    faces: Sequence[Face]
    images: str
    out: str
    size: int
    png: bool


def read_landmarks(path: Path) -> list[Face]:
    """Parses a landmark file.

    Raises:
        DataError: The file cannot be read, or a line is wrong; the message names it.
    """
    faces: list[Face] = []
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        columns = (line.split(",") if "," in line else line.split()) or [""]
        name = columns[0].strip()
        if not name:
            continue
        try:
            points = tuple(float(text) for text in columns[1:11])
        except ValueError:
            if number == 1:  # a line of column names
                continue
            points = ()
        if len(points) != 10:
            raise DataError(
                f"{path}, line {number}: expected a path and ten numbers (x and y of five points), "
                f"got {line[:80]!r}"
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path}, line {number}: {name!r} leads out of the folder of images")
        if name in seen:
            raise DataError(f"{path}, line {number}: {name!r} a second time; one face per image")
        seen.add(name)
        faces.append(Face(name, points, number))
    if not faces:
        raise DataError(f"{path}: lists no image")
    return faces


def align_files(task: AlignTask) -> list[str]:
    """Aligns images, in a worker; files are written atomically. Returns why some could not be."""
    problems: list[str] = []
    for face in task.faces:
        target = Path(task.out, face.name).with_suffix(".png" if task.png else ".jpg")
        if target.exists():
            continue
        source = Path(task.images, face.name)
        try:
            image = decode_image(read_image_file(source), str(source))
            aligned = align(image, np.reshape(face.points, (5, 2)), task.size)
        except ImageError as error:
            problems.append(str(error))
            continue
        except AlignmentError as error:
            problems.append(f"{source}: {error}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target, durable=False) as file:
            file.write(encode_png(aligned) if task.png else encode_jpeg(aligned))
    return problems


def encode_png(image: np.ndarray) -> bytes:
    """Encodes RGB uint8 [H, W, 3] as PNG."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def align_folder(
    images: Path,
    landmarks: Path,
    out: Path,
    *,
    size: int = 112,
    png: bool = False,
    skip_bad: bool = False,
    num_processes: int = 1,
) -> tuple[int, list[str]]:
    """Aligns every listed image.

    What was aligned before an error is kept for the next attempt.

    Args:
        images: Folder that the listed paths are relative to.
        landmarks: The landmark file.
        out: Folder to make.
        size: Side of the result in pixels.
        png: Whether PNG is written instead of JPEG.
        skip_bad: Whether images that cannot be aligned are left out.
        num_processes: Number of worker processes.

    Returns:
        The number of images written, and the problems of those left out.

    Raises:
        DataError: `out` exists, the list is wrong, or images cannot be aligned (all, or some
            without `skip_bad`); the message lists them.
    """
    if out.exists():
        raise DataError(f"{out} already exists; give another folder, or remove it")
    faces = read_landmarks(landmarks)
    targets = {str(Path(face.name).with_suffix("")) for face in faces}
    if len(targets) < len(faces):
        raise DataError(f"{landmarks}: two images differ only in their suffix; rename one")
    token = repr((str(images.resolve()), size, png, faces))
    staging = staging_folder(out, hashlib.sha1(token.encode()).hexdigest())
    problems: list[str] = []
    with (
        tqdm(total=len(faces), unit=" images") as bar,
        closing(
            ordered_map(
                align_files,
                _tasks(faces, images, staging, size, png),
                num_processes if len(faces) > 4 * _CHUNK else 1,
            )
        ) as results,
    ):
        for found in results:
            problems += found
            bar.update(min(_CHUNK, len(faces) - bar.n))
    if problems and (not skip_bad or len(problems) == len(faces)):
        raise DataError(
            f"{len(problems)} of {len(faces)} images cannot be aligned:\n{list_some(problems)}\n"
            "Repair them and run the same command again, or leave them out with --skip-bad."
        )
    publish_folder(staging, out)
    return len(faces) - len(problems), problems


def _tasks(
    faces: Sequence[Face], images: Path, out: Path, size: int, png: bool
) -> Iterator[AlignTask]:
    for begin in range(0, len(faces), _CHUNK):
        yield AlignTask(faces[begin : begin + _CHUNK], str(images), str(out), size, png)


@cli_command("stopped; the same command resumes here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="align.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder that the paths are relative to")
    add("landmarks", type=Path, metavar="LANDMARKS.txt", help="path and ten numbers per line")
    add("out", type=Path, metavar="OUT", help="folder to make")
    add("--size", type=int, default=112, help="pixels per side (default 112)")
    add("--png", action="store_true", help="write PNG, which loses nothing")
    add("--skip-bad", action="store_true", help="leave out what cannot be aligned, and list it")
    add(
        "--num-thread",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: one per core, at most 4)",
    )
    args = parser.parse_args(argv)
    if not 1 <= args.size <= 4096 or args.num_thread < 1:
        parser.error("--size: allowed are 1 to 4096; --num-thread: 1 or more")
    count, problems = align_folder(
        args.images,
        args.landmarks,
        args.out,
        size=args.size,
        png=args.png,
        skip_bad=args.skip_bad,
        num_processes=args.num_thread,
    )
    print(f"{args.out}: {count} faces aligned, {len(problems)} left out")
    if problems:
        print(list_some(problems))
    return 0


if __name__ == "__main__":
    sys.exit(main())
