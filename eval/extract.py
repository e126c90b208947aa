"""Embeds many images on all ranks together, with progress, and each content only once.

Every protocol here (and `scripts/embed.py`) gets its embeddings from `embed_images`. The work is
cut into batches, and a rank takes a contiguous run of whole batches. The cache keeps batches too,
so a later run, on any number of ranks, finds what an earlier one has embedded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data.alignment import AlignmentError, align
from data.decode import ImageError, decode_image, read_image_file
from utils.errors import UserError
from utils.files import atomic_write

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
"""Function of uint8 RGB [n, 3, H, W] on the CPU to [n, D], float32 or float64, on any device."""

_DECODE_THREADS = 4
_ROWS_PER_BROADCAST = 65_536  # 256 MiB at 1024 numbers
_SECONDS_BETWEEN_LINES = 10.0


class Images(Protocol):
    """Images by index. `encoded` gives the key of the cache, `pixels` what a model sees."""

    def __len__(self) -> int:
        """Returns the number of images."""
        ...

    def encoded(self, index: int) -> bytes:
        """Returns everything that image `index` is made from: its bytes, its landmarks, ..."""
        ...

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """Decodes an image.

        Args:
            index: Number of the image.
            encoded: Result of `encoded(index)`.

        Returns:
            RGB [input_size, input_size, 3].

        Raises:
            UserError: The image cannot be used; the message names it.
        """
        ...


class FileImages:
    """Image files of the model's size; others are an error, or are resized on request.

    Args:
        paths: Paths of the files.
        input_size: Height and width that the model takes.
        resize: Whether an image of another size is scaled (without keeping its shape), not refused.
        places: How errors name each image, for example file and line of a list; None means the
            path.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        input_size: int,
        resize: bool = False,
        places: Sequence[str] | None = None,
    ) -> None:
        self.paths, self.input_size, self.resize = paths, input_size, resize
        self._places = places

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, index: int) -> str:
        """Returns how errors name image `index`."""
        path = str(self.paths[index])
        return path if self._places is None else f"{self._places[index]}: {path}"

    def encoded(self, index: int) -> bytes:
        """Reads the file.

        Raises:
            ImageError: The file cannot be read.
        """
        return read_image_file(self.paths[index], self.place(index))

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """See Images.

        Raises:
            ImageError: The image cannot be decoded, or has another size and `resize` is False.
        """
        where = self.place(index)
        return fit(decode_image(encoded, where), self.input_size, self.resize, where)


class AlignedImages(FileImages):
    """Photographs with five landmarks each, aligned to the model's size.

    Args:
        paths: Paths of the files.
        landmarks: [n, 5, 2] float64, in pixels.
        input_size: Height and width that the model takes.
        places: As in FileImages.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        landmarks: NDArray[np.float64],
        input_size: int,
        places: Sequence[str] | None = None,
    ) -> None:
        super().__init__(paths, input_size, places=places)
        self.landmarks = landmarks

    def encoded(self, index: int) -> bytes:
        """Returns the landmarks (80 bytes), then the file."""
        return self.landmarks[index].tobytes() + super().encoded(index)

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """See Images.

        Raises:
            ImageError: The image cannot be decoded.
            AlignmentError: The landmarks determine no alignment.
        """
        where = self.place(index)
        image = decode_image(memoryview(encoded)[80:], where)
        try:
            return align(image, self.landmarks[index], self.input_size)
        except AlignmentError as error:
            raise AlignmentError(f"{where}: {error}") from error


def fit(image: NDArray[np.uint8], input_size: int, resize: bool, where: str) -> NDArray[np.uint8]:
    """Returns an image as it is if it has the size, else resized.

    Args:
        image: uint8 [H, W, 3].
        input_size: Height and width that the model takes.
        resize: Whether resizing is allowed.
        where: Name of the image in errors.

    Raises:
        ImageError: The image has another size and `resize` is False.
    """
    height, width = image.shape[:2]
    if (height, width) == (input_size, input_size):
        return image
    if not resize:
        raise ImageError(
            f"{where}: {height} x {width} pixels; the model takes {input_size} x {input_size}. "
            "Align the images (scripts/align.py) or, if they are aligned, pass --resize"
        )
    shrinks = min(height, width) > input_size
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    resized = cv2.resize(image, (input_size, input_size), interpolation=interpolation)
    return np.asarray(resized, dtype=np.uint8)


class EmbeddingCache:
    """Embeddings kept by content: one file per batch, named by model, settings and image bytes.

    Args:
        folder: Folder of the files, made when the first is written.
        model_key: Key of the model's weights and preprocessing, for example `Model.key`.
    """

    def __init__(self, folder: str | os.PathLike[str], model_key: str) -> None:
        self.folder, self.model_key = Path(folder), model_key

    def path(self, encoded: Sequence[bytes], settings: str) -> Path:
        """Returns the file of a batch of `encoded` images embedded with `settings`."""
        key = hashlib.sha256(f"{self.model_key}\n{settings}\n".encode())
        for one in encoded:
            key.update(hashlib.sha256(one).digest())
        return self.folder / f"{key.hexdigest()}.npy"

    def get(self, path: Path, rows: int) -> NDArray | None:
        """Reads a batch [rows, width]; None if it is absent or (with a warning) damaged."""
        if not path.is_file():
            return None
        try:
            kept = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s: a damaged file of the cache (%s); embedding again", path, error)
            return None
        if kept.ndim != 2 or len(kept) != rows or kept.dtype not in (np.float32, np.float64):
            logger.warning("%s: not a batch of %d embeddings; embedding again", path, rows)
            return None
        return kept

    def put(self, path: Path, rows: NDArray) -> None:
        """Writes `rows` atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=False) as file:
            np.save(file, rows, allow_pickle=False)


class Progress:
    """Shows progress, speed and time left: a bar on a terminal, occasional lines in a log.

    Args:
        total: Number of units to do.
        what: Text before the numbers.
        show: Whether anything is shown.
        unit: Name of the units.
    """

    def __init__(self, total: int, what: str, show: bool, unit: str = "images") -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0
        self._start = self._last = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self._bar = None
        if show and is_terminal:
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True)
        self._lines = show and not is_terminal

    def add(self, count: int) -> None:
        """Counts `count` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        now = time.monotonic()
        if self._lines and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            rate = self.done / max(now - self._start, 1e-9)
            print(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} a second, "
                f"{(self.total - self.done) / max(rate, 1e-9) / 60:.1f} minutes left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


class Share(NamedTuple):
    """Images [start, end) of a rank.

    Attributes:
        start: First image.
        end: First image after the last.
    """

    start: int
    end: int


def share_of_batches(num_images: int, batch_size: int, rank: int, world_size: int) -> Share:
    """Returns the images of a rank: whole batches, contiguous, at most one batch apart.

    Cutting only between batches means that every image is in the same batch whatever the number of
    ranks, so a network gives it the same embedding bit for bit.

    Args:
        num_images: Number of images of all ranks.
        batch_size: Images per batch.
        rank: The rank.
        world_size: Number of ranks.

    Raises:
        UserError: `batch_size` or `rank` is out of range.
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise UserError(f"rank is {rank}; with world_size {world_size} it is in [0, {world_size})")
    num_batches = -(-num_images // batch_size)
    start = num_batches * rank // world_size * batch_size
    end = num_batches * (rank + 1) // world_size * batch_size
    return Share(min(start, num_images), min(end, num_images))


def embed_images(
    embed: Embed,
    images: Images,
    *,
    name: str = "images",
    flip: bool = True,
    sum_flip: bool = False,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 112,
    cache: EmbeddingCache | None = None,
    show_progress: bool = False,
) -> NDArray[np.floating]:
    """Embeds all `images`, complete on every rank; all ranks call it together.

    Args:
        embed: See `Embed`. Every rank must have the same weights.
        images: The same images on every rank.
        name: Name of the set, in errors and progress.
        flip: Whether the mirror images are embedded too.
        sum_flip: Whether the two embeddings are added instead of concatenated.
        rank: This rank.
        world_size: Number of ranks; torch.distributed is used only if it is more than 1.
        group: Process group of the ranks.
        batch_size: Images per call of `embed`; the last batch may be smaller.
        input_size: Height and width in pixels that every image must have.
        cache: Cache in which batches are looked up and kept.
        show_progress: Whether progress and the time left are shown on stderr.

    Returns:
        [n, D]; with `flip` [n, 2D] (image, then mirror image); with `sum_flip` too [n, D]. float32,
        or float64 if `embed` gives that.

    Raises:
        UserError: There is no image, or an image or an embedding has another shape. An error of
            one rank raises there.
        OtherRankFailed: Another rank failed; the message names it. No rank is left waiting.
    """
    if not len(images):
        raise UserError(f"{name}: there is no image to embed")
    shares = [share_of_batches(len(images), batch_size, r, world_size) for r in range(world_size)]
    own = share_of_batches(len(images), batch_size, rank, world_size)
    local: NDArray | None = None
    failure: Exception | None = None
    progress = Progress(own.end - own.start, f"embedding {name}", show_progress)
    try:
        for first, rows in embedded_batches(
            embed,
            images,
            range(own.start, own.end, batch_size),
            name=name,
            flip=flip,
            batch_size=batch_size,
            input_size=input_size,
            cache=cache,
        ):
            first -= own.start
            if sum_flip and flip:
                half = rows.shape[1] // 2
                rows = rows[:, :half] + rows[:, half:]
            if local is None:  # the width is known now: rows are filled in, never held twice
                local = np.empty((own.end - own.start, rows.shape[1]), rows.dtype)
            if rows.shape[1] != local.shape[1]:
                raise UserError(
                    f"{name}: embeddings of {rows.shape[1]} numbers after some of "
                    f"{local.shape[1]}; a model gives one width"
                )
            local[first : first + len(rows)] = rows
            progress.add(len(rows))
    except Exception as error:
        if world_size == 1:
            raise
        failure = error  # the other ranks must know of it before it is raised
    finally:
        progress.close()
    if world_size > 1:
        return gather_rows(local, failure, shares, name, rank, group)
    assert local is not None
    return local


def embedded_batches(
    embed: Embed,
    images: Images,
    starts: Sequence[int],
    *,
    name: str = "images",
    flip: bool = True,
    batch_size: int = 64,
    input_size: int = 112,
    cache: EmbeddingCache | None = None,
) -> Iterator[tuple[int, NDArray]]:
    """Yields the start and the rows of each batch, while threads decode the next one.

    Args:
        embed: See `Embed`.
        images: The images.
        starts: First image of each batch; a batch ends after `batch_size` images, or with the
            images.
        name: Name of the set in errors.
        flip: Whether the mirror images are embedded too.
        batch_size: Images per batch.
        input_size: Height and width in pixels that every image must have.
        cache: Cache in which batches are looked up and kept.

    Yields:
        The first image of a batch, and its rows as `embed_batch` makes them.

    Raises:
        UserError: An image or an embedding has another shape.
    """
    settings = f"flip={flip} input_size={input_size}"

    def read(index: int) -> tuple[bytes, NDArray[np.uint8] | None]:
        encoded = images.encoded(index)
        return encoded, None if cache is not None else decode(index, encoded)

    def decode(index: int, encoded: bytes) -> NDArray[np.uint8]:
        pixels = images.pixels(index, encoded)
        if pixels.shape != (input_size, input_size, 3) or pixels.dtype != np.uint8:
            raise UserError(
                f"{name}, image {index}: shape is {list(pixels.shape)}; the model takes "
                f"[{input_size}, {input_size}, 3]. Pack the set again at that size"
            )
        return pixels

    def submit(first: int) -> list[Future[tuple[bytes, NDArray[np.uint8] | None]]]:
        return [pool.submit(read, i) for i in range(first, min(first + batch_size, len(images)))]

    with ThreadPoolExecutor(max_workers=_DECODE_THREADS) as pool:
        upcoming = submit(starts[0]) if starts else []
        for number, first in enumerate(starts):
            current = upcoming
            upcoming = submit(starts[number + 1]) if number + 1 < len(starts) else []
            read_now = [future.result() for future in current]
            path = kept = None
            if cache is not None:
                path = cache.path([encoded for encoded, _ in read_now], settings)
                kept = cache.get(path, len(read_now))
            if kept is None:
                indices = range(first, first + len(read_now))
                if cache is None:
                    pixels = [ready for _, ready in read_now if ready is not None]
                else:
                    pixels = list(pool.map(decode, indices, [encoded for encoded, _ in read_now]))
                kept = embed_batch(embed, pixels, flip)
                if cache is not None and path is not None:
                    cache.put(path, kept)
            yield first, kept


def embed_batch(embed: Embed, pixels: Sequence[NDArray[np.uint8]], flip: bool = True) -> NDArray:
    """Embeds images, and with `flip` their mirror images beside them.

    Args:
        embed: See `Embed`.
        pixels: n RGB images [H, W, 3].
        flip: Whether the mirror images are embedded too.

    Returns:
        [n, D], with `flip` [n, 2D].

    Raises:
        UserError: `embed` gives another shape.
    """
    # [n, 3, H, W]; copied, because torch takes no view with negative or odd strides for granted
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    sides = []
    for images in (batch, batch.flip(3)) if flip else (batch,):
        embeddings = embed(images)
        if embeddings.ndim != 2 or len(embeddings) != len(batch) or not embeddings.shape[1]:
            raise UserError(
                f"embed gave shape {list(embeddings.shape)} for {len(batch)} images; "
                f"[{len(batch)}, D] is what is needed"
            )
        wide = embeddings.dtype == torch.float64
        sides.append(embeddings.detach().to("cpu", torch.float64 if wide else torch.float32))
    return torch.cat(sides, dim=1).numpy()


class OtherRankFailed(RuntimeError):
    """The work failed on another rank; the error raised there says why."""


def gather_rows(
    local: NDArray | None,
    failure: Exception | None,
    shares: Sequence[Share],
    name: str,
    rank: int,
    group: dist.ProcessGroup | None,
) -> NDArray:
    """Gathers all ranks' rows in rank order on every rank, or raises on all if one has failed.

    The ranks first exchange (failed, width, float64). Then the rows are broadcast, one block of a
    rank at a time into their final place, so that nothing is held twice.

    Args:
        local: [n, D] rows of this rank, None if it has none.
        failure: Error of this rank, which is raised here.
        shares: Images of each rank.
        name: Name of the set in errors.
        rank: This rank.
        group: Process group of the ranks.

    Raises:
        OtherRankFailed: Another rank failed.
        RuntimeError: The ranks' rows have different widths.
    """
    world_size = len(shares)
    device = torch.device("cpu")
    if "nccl" in dist.get_backend(group):
        device = torch.device("cuda", torch.cuda.current_device())
    width = 0 if local is None else local.shape[1]
    wide = local is not None and local.dtype == np.float64
    status = torch.tensor([failure is not None, width, wide], dtype=torch.int64, device=device)
    gathered = [torch.empty_like(status) for _ in range(world_size)]
    dist.all_gather(gathered, status, group=group)
    everyone = torch.stack(gathered).cpu()  # [world_size, 3]

    if failure is not None:
        raise failure
    failed = everyone[:, 0].nonzero().flatten().tolist()
    if failed:
        raise OtherRankFailed(
            f"embedding {name} failed on rank {', '.join(map(str, failed))}; "
            "the error raised there says why"
        )
    widths = set(everyone[:, 1].tolist()) - {0}
    if len(widths) > 1:
        raise RuntimeError(f"ranks gave embeddings of different widths: {sorted(widths)}")

    dtype = np.float64 if everyone[:, 2].any() else np.float32
    whole = np.empty((shares[-1].end, widths.pop()), dtype)
    for owner, share in enumerate(shares):
        for start in range(share.start, share.end, _ROWS_PER_BROADCAST):
            end = min(start + _ROWS_PER_BROADCAST, share.end)
            if owner == rank:
                assert local is not None
                whole[start:end] = local[start - share.start : end - share.start]
            block = torch.from_numpy(whole[start:end]).to(device)
            source = owner if group is None else dist.get_global_rank(group, owner)
            dist.broadcast(block, src=source, group=group)
            if device.type != "cpu":
                whole[start:end] = block.cpu().numpy()
    return whole
