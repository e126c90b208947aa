"""Write a small set of generated images: records to train on and pairs to verify with.

    python scripts/make_synthetic.py OUT [--identities 320 --images-per-identity 15 ...]

An identity is a smooth random pattern of colors. Images of one identity differ in position, size,
rotation, background, light, exposure, blur and noise. The identities in OUT/synthetic.bin are not
among those in OUT/train.rec. The same seed gives the same bytes with the same versions of NumPy,
OpenCV and libjpeg-turbo, in any number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError
from data.pairs import write_verification_set
from data.tools.encode import encode_jpeg
from data.tools.record_writer import RecordSetWriter
from data.tools.workers import ordered_map
from utils.cli import cli_command

# These set how hard the set is: how much identities differ, and how much images of one identity do.
CELLS = 5  # per side of the coarse grid of an identity or a background
CONTRAST = 40.0  # standard deviation of an identity and a background, in gray values
LIGHT = 20.0  # standard deviation of the uneven, colored light
EXPOSURE = 0.24  # largest change, as a logarithm
SHIFT, ZOOM, ROTATION = 0.06, 0.08, 12.0  # largest: share of the side, logarithm, degrees
BLUR, NOISE = 1.5, 9.0  # largest standard deviation, in pixels and in gray values

JPEG_QUALITY = 92
FOLDS = 10
_TRAINING, _VERIFICATION, _PLAN = 0, 1, 2  # streams of random numbers

Task = tuple[int, int, int, Sequence[int], int]  # seed, stream, identity, its images, size


def draw_pattern(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Draws smooth colors, float32 [size, size, 3] with mean 0, from a random grid of cells."""
    grid = rng.standard_normal((cells, cells, 3), dtype=np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def draw_image(identity: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one image of an identity, RGB uint8 [size, size, 3].

    Args:
        identity: Its pattern, float32 [size, size, 3].
        rng: Decides all in which images of the identity differ.
    """
    size = len(identity)
    middle = (size - 1) / 2
    zoom = float(np.exp(rng.uniform(-ZOOM, ZOOM)))
    pose = cv2.getRotationMatrix2D((middle, middle), rng.uniform(-ROTATION, ROTATION), zoom)
    pose[:, 2] = pose[:, 2] + size * rng.uniform(-SHIFT, SHIFT, 2)
    moved = cv2.warpAffine(identity, pose, (size, size), borderMode=cv2.BORDER_REFLECT)
    # The identity fills a disk with a soft edge, which moves with it.
    center = pose @ (middle, middle, 1.0)
    x, y = np.arange(size)[None, :] - center[0], np.arange(size)[:, None] - center[1]
    share = np.clip(4.5 - 10 * np.hypot(x, y) / (zoom * size), 0, 1)[:, :, None]
    image = CONTRAST * (share * moved + (1 - share) * draw_pattern(rng, CELLS, size))
    image = 128 + image + LIGHT * draw_pattern(rng, 2, size)
    image = image.astype(np.float32) * np.float32(np.exp(rng.uniform(-EXPOSURE, EXPOSURE)))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, BLUR))
    image += rng.uniform(1, NOISE) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def draw_encoded(task: Task) -> list[bytes]:
    """Draws a task's images as JPEG files: a pure function, run by the workers."""
    seed, stream, identity, images, size = task
    pattern = draw_pattern(np.random.default_rng((seed, stream, identity)), CELLS, size)
    draws = (np.random.default_rng((seed, stream, identity, image + 1)) for image in images)
    return [encode_jpeg(draw_image(pattern, rng), JPEG_QUALITY) for rng in draws]


def make_synthetic(
    out: str | os.PathLike[str],
    *,
    identities: int = 320,
    images_per_identity: int = 15,
    verification_pairs: int = 600,
    seed: int = 0,
    size: int = 112,
    force: bool = False,
    num_processes: int | None = None,
) -> None:
    """Writes OUT/train.rec, train.idx, property, label_map.txt and OUT/synthetic.bin.

    Args:
        out: Folder to write to.
        identities: Number of identities to train on.
        images_per_identity: Images of each.
        verification_pairs: A multiple of 20, for ten folds in order, each half same and half
            different, each with its own identities.
        seed: Seed of the images.
        size: Side of the images in pixels.
        force: Whether existing files are replaced.
        num_processes: Number of processes; None takes one per core, at most 4.

    Raises:
        DataError: The numbers do not fit, or the files exist.
    """
    out = Path(out)
    if identities < 1 or images_per_identity < 1 or size < 16 or seed < 0:
        raise DataError(
            f"identities={identities}, images_per_identity={images_per_identity}, size={size}, "
            f"seed={seed}: allowed are 1 or more, 1 or more, 16 or more, 0 or more"
        )
    if verification_pairs < 2 * 2 * FOLDS or verification_pairs % (2 * FOLDS):
        raise DataError(
            f"verification_pairs={verification_pairs}: {FOLDS} folds, each half same and half "
            f"different, need a multiple of {2 * FOLDS}, at least {4 * FOLDS}"
        )
    if not force and (out / "synthetic.bin").exists():
        raise DataError(f"{out / 'synthetic.bin'} already exists; --force replaces it")
    images = range(images_per_identity)
    tasks: list[Task] = [(seed, _TRAINING, i, images, size) for i in range(identities)]
    faces, same = verification_plan(verification_pairs, seed)
    tasks += [(seed, _VERIFICATION, i, (image,), size) for i, image in faces]
    drawn = ordered_map(draw_encoded, tasks, num_processes or min(4, os.cpu_count() or 1))
    held_out: list[bytes] = []
    with (
        RecordSetWriter(out, size, force) as writer,
        contextlib.closing(drawn),
        tqdm(total=identities * images_per_identity + len(faces), unit=" images") as bar,
    ):
        for (_, stream, identity, _, _), encoded in zip(tasks, drawn, strict=True):
            if stream == _VERIFICATION:
                held_out += encoded
            else:
                for image in encoded:
                    writer.add(image, identity)
            bar.update(len(encoded))
        write_verification_set(out / "synthetic.bin", held_out, same, force=force)
        writer.finish([f"synthetic_{identity:05d}" for identity in range(identities)])


def verification_plan(num_pairs: int, seed: int) -> tuple[list[tuple[int, int]], list[bool]]:
    """Returns (identity, image) of 2 * num_pairs images and num_pairs answers, ten folds in order.

    A fold has its own identities, as many as it has same pairs. No image is used twice.

    Args:
        num_pairs: Number of pairs, a multiple of 20.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng((seed, _PLAN))
    per_fold = num_pairs // (2 * FOLDS)
    images: list[tuple[int, int]] = []
    for first in range(0, FOLDS * per_fold, per_fold):
        for place in range(per_fold):
            images += [(first + place, 0), (first + place, 1)]
        # A step to another identity of the fold; numbering by `place` keeps its images apart.
        for place, step in enumerate(rng.integers(1, per_fold, per_fold).tolist()):
            images += [(first + place, 2), (first + (place + step) % per_fold, 3 + place)]
    return images, ([True] * per_fold + [False] * per_fold) * FOLDS


@cli_command()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="make_synthetic.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to write to")
    add("--identities", type=int, default=320, help="identities to train on (default 320)")
    add("--images-per-identity", type=int, default=15, help="images of each (default 15)")
    add("--verification-pairs", type=int, default=600, help="a multiple of 20 (default 600)")
    add("--seed", type=int, default=0, help="another seed, other identities (default 0)")
    add("--size", type=int, default=112, help="pixels per side (default 112)")
    add("--force", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    make_synthetic(**vars(args))
    print(
        f"{args.out}: {args.identities * args.images_per_identity} images of {args.identities} "
        f"identities, and synthetic.bin with {args.verification_pairs} pairs of other identities"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
