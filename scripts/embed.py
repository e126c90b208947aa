"""Embed a folder, a list of files, or records: an .npy of embeddings and the names of its rows.

    python scripts/embed.py --model work_dirs/ms1mv3_r50 FOLDER OUT
    torchrun --nproc_per_node=8 scripts/embed.py --model face.onnx DATA/train.rec OUT

OUT gets embeddings.npy [n, D] float32, names.txt (n lines) and, from records and class folders,
labels.npy. Every rank writes its share directly into the file (on a disk that all ranks share), so
memory does not grow with n. After a kill the same command continues where it stopped, on any number
of ranks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import DataError, RecordDataset
from data.decode import decode_image
from eval.cli import (
    add_model_options,
    cache_of,
    choose_dist_context,
    open_models,
    run_command,
    write_json,
)
from eval.extract import (
    FileImages,
    Images,
    Progress,
    embed_batch,
    embedded_batches,
    fit,
    share_of_batches,
)
from eval.identification import list_images
from utils.distributed import barrier
from utils.files import atomic_write


class NamedImages(Images, Protocol):
    """Images with a name each and, if they are known, labels.

    Attributes:
        names: Name of each image.
    """

    names: list[str]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels, int64 [n], or None."""
        ...


class _Files(FileImages):
    names: list[str]
    people: list[str] | None = None

    @property
    def labels(self) -> NDArray[np.int64] | None:
        if self.people is None:
            return None
        return np.unique(self.people, return_inverse=True)[1].astype(np.int64)


class _Records:
    """The images of a record set, as embedding takes them."""

    def __init__(self, source: RecordDataset, input_size: int, resize: bool) -> None:
        self.source, self.input_size, self.resize = source, input_size, resize
        self.names = [str(key) for key in source.keys.tolist()]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels, int64 [n]."""
        return self.source.labels().astype(np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def encoded(self, index: int) -> bytes:
        """Reads the encoded image; see `eval.extract.Images`."""
        return bytes(self.source.read_encoded(index)[0])

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """Decodes an image; see `eval.extract.Images`."""
        where = self.source.describe(index)
        return fit(decode_image(encoded, where), self.input_size, self.resize, where)


def open_images(source: Path, input_size: int, resize: bool) -> NamedImages:
    """Opens the images of a folder, of records, or of a text file with a path per line.

    Relative paths of a list are below the list's folder.

    Args:
        source: Folder, .rec file or list.
        input_size: Height and width that the model takes.
        resize: Whether images of another size are resized.

    Raises:
        DataError: The source does not exist, is empty or does not fit.
    """
    if source.suffix == ".rec" or (source / "train.rec").is_file():
        return _Records(RecordDataset(source, input_size=input_size), input_size, resize)
    if source.is_dir():
        found = list_images(source)
        images = _Files(found.paths, input_size, resize)
        images.names = found.names
        if any("/" in name for name in found.names):
            images.people = found.identities
        return images
    if not source.is_file():
        raise DataError(f"{source}: no such folder, list or record file")
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: no text with a path per line ({error})") from error
    numbered = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{source}: is empty; a list has one path per line")
    paths = [source.parent / line for _, line in numbered]
    places = [f"{source}, line {number}" for number, _ in numbered]
    images = _Files(paths, input_size, resize, places)
    images.names = [line for _, line in numbered]
    return images


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="embed.py", description="Embed many images into a file.")
    add_model_options(parser)
    parser.add_argument("source", type=Path, help="a folder, a list of paths (text), or records")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the result")
    parser.add_argument("--resize", action="store_true", help="resize images of another size")
    parser.add_argument("--no-flip", action="store_true", help="without the mirror image's added")
    parser.add_argument("--restart", action="store_true", help="begin anew, whatever is in OUT")
    options = parser.parse_args(arguments)
    return run_command(lambda: _embed(options))


def _embed(options: argparse.Namespace) -> int:
    world = choose_dist_context(options.device)
    (model,) = open_models(options, world)
    images = open_images(options.source, model.input_size, options.resize)
    flip, batch_size, size = not options.no_flip, options.batch_size, model.input_size
    blank = np.zeros((size, size, 3), np.uint8)
    width = embed_batch(model.embed, [blank], flip=False).shape[1]
    names = hashlib.sha256("\n".join(images.names).encode()).hexdigest()
    manifest = {
        "model": model.key,
        "names": names,
        "images": len(images),
        "width": width,
        "flip": flip,
        "batch_size": batch_size,
        "resize": options.resize,
    }
    part = Part(options.out, manifest)
    if world.is_main:
        part.create(options.restart)
    barrier(world)
    rows, done = part.open()
    own = share_of_batches(len(images), batch_size, world.rank, world.world_size)
    left = [s for s in range(own.start, own.end, batch_size) if not done[s // batch_size]]
    if world.is_main and done.any():
        print(f"{options.out}: {int(done.sum())} of {len(done)} batches are there", file=sys.stderr)
    progress = Progress(sum(min(batch_size, len(images) - s) for s in left), "embedding", True)
    for start, both in embedded_batches(
        model.embed,
        images,
        left,
        flip=flip,
        batch_size=batch_size,
        input_size=size,
        cache=cache_of(options, model),
    ):
        summed = both[:, :width] + both[:, width:] if flip else both
        rows[start : start + len(both)] = summed
        rows.flush()  # the rows are on disk before their batch is marked as done
        done[start // batch_size] = 1
        done.flush()
        progress.add(len(both))
    progress.close()
    del rows, done
    barrier(world)
    if world.is_main:
        part.finish(images)
        print(f"{options.out}: {len(images):,} embeddings of {width} numbers")
    barrier(world)
    return 0


class Part:
    """The unfinished file, the batches of it that are done, and what it is made from.

    Args:
        out: Folder of the result.
        manifest: Model, names and settings; work with another manifest is not continued.
    """

    def __init__(self, out: Path, manifest: dict[str, Any]) -> None:
        self.out, self.manifest = out, manifest
        self.rows, self.done = out / "embeddings.npy.part", out / "done.npy.part"
        self.facts = out / "manifest.json.part"

    def create(self, restart: bool) -> None:
        """Creates the files, unless those of the same work exist.

        Args:
            restart: Whether finished or other unfinished work is replaced.

        Raises:
            DataError: The folder holds finished work, or unfinished work with another manifest.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if (self.out / "embeddings.npy").exists() and not restart:
            raise DataError(
                f"{self.out} already holds embeddings.npy; give another folder, or --restart"
            )
        if self.facts.is_file() and not restart:
            if json.loads(self.facts.read_text()) != self.manifest:
                raise DataError(
                    f"{self.out} holds unfinished work of another model, source or setting; give "
                    "another folder, or --restart"
                )
            return
        self.facts.unlink(missing_ok=True)
        count, batch = self.manifest["images"], self.manifest["batch_size"]
        _new(self.rows, (count, self.manifest["width"]), np.float32)
        _new(self.done, (-(-count // batch),), np.uint8)
        write_json(self.manifest, self.facts)  # last: with it the work can be continued

    def open(self) -> tuple[np.memmap, np.memmap]:
        """Returns (rows, done) as memory-mapped files."""
        return np.load(self.rows, mmap_mode="r+"), np.load(self.done, mmap_mode="r+")

    def finish(self, images: NamedImages) -> None:
        """Renames everything to its final name, the embeddings last."""
        with atomic_write(self.out / "names.txt") as file:
            file.writelines(f"{name}\n".encode() for name in images.names)
        (self.out / "labels.npy").unlink(missing_ok=True)
        labels = images.labels
        if labels is not None:
            np.save(self.out / "labels.npy", labels)
        self.rows.replace(self.out / "embeddings.npy")
        self.done.unlink()
        self.facts.unlink()


def _new(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape).flush()


if __name__ == "__main__":
    sys.exit(main())
