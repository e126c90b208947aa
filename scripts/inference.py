"""Embed one image, or several.

    python scripts/inference.py A.jpg --model work_dirs/ms1mv3_r50
    python scripts/inference.py A.jpg B.jpg --model backbone.pth --network r50   # and the cosine
    python scripts/inference.py *.jpg --model face.onnx --npy embeddings.npy

The command prints one line of numbers per image, not normalized, as the network gives them (with
--flip the mirror image's are added, as in the evaluation), or writes them to an .npy file [n, D]
float32. With two images the cosine follows. The images are aligned faces of the size that the model
takes, usually 112 x 112: scripts/align.py makes them. For many images see scripts/embed.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.cli import (
    add_model_options,
    cache_of,
    check_outputs,
    choose_dist_context,
    open_models,
    run_command,
)
from eval.extract import FileImages, embed_images
from utils.errors import UserError
from utils.files import atomic_write


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="inference.py", description="Embed aligned faces.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMG")
    add_model_options(parser)
    parser.add_argument("--flip", action="store_true", help="add the mirror image's embedding")
    parser.add_argument("--resize", action="store_true", help="resize images of another size")
    parser.add_argument("--npy", type=Path, help="write [n, D] here instead of printing it")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _infer(options))


def _infer(options: argparse.Namespace) -> int:
    check_outputs({"--npy": options.npy})
    world = choose_dist_context(options.device)
    (model,) = open_models(options, world)
    rows = embed_images(
        model.embed,
        FileImages(options.images, model.input_size, options.resize),
        flip=options.flip,
        sum_flip=options.flip,
        batch_size=options.batch_size,
        input_size=model.input_size,
        cache=cache_of(options, model),
    ).astype(np.float32)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    for path, length in zip(options.images, lengths, strict=True):
        if not (np.isfinite(length) and length > 0):
            raise UserError(f"{path}: its embedding is zero or not finite")
    if options.npy is None:
        for row in rows:
            print(" ".join(f"{number:.8g}" for number in row))
    else:
        with atomic_write(options.npy) as file:
            np.save(file, rows)
        print(f"{options.npy}: {len(rows)} embeddings of {rows.shape[1]} numbers")
    if len(rows) == 2:
        product = rows[0].astype(np.float64) @ rows[1].astype(np.float64)
        print(f"cosine {product / lengths.prod():.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
