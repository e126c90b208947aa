"""Many images to embeddings: on all ranks together, with progress, and once per content.

`embed_images` is the one way every protocol here (and `scripts/embed.py`) gets its embeddings.
Work is cut into batches; a rank takes a contiguous run of whole batches, and a batch is also what
the cache keeps, so what one run has embedded the next, on any number of ranks, finds again.
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

logger = logging.getLogger(__name__)

Embed = Callable[[Tensor], Tensor]
"""uint8 RGB [n, 3, H, W] on the CPU -> [n, D], float32 or float64, on any device."""

_DECODE_THREADS = 4
_ROWS_PER_BROADCAST = 65_536  # 256 MiB at 1024 numbers
_SECONDS_BETWEEN_LINES = 10.0


class Images(Protocol):
    """Images by index. `encoded` is what the cache is keyed by, `pixels` what a model sees."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def encoded(self, index: int) -> bytes:
        """Everything image `index` is made from: its bytes, its landmarks, ..."""
        ...

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """RGB [input_size, input_size, 3] of what `encoded(index)` gave; ValueError naming it."""
        ...


class FileImages:
    """Image files of the model's size; others are an error, or are resized when asked for.

    Args:
        paths: of the files.
        input_size: height and width the model takes.
        resize: scale an image of another size (without keeping its shape) instead of refusing it.
        places: what errors say of each image, for example file and line of a list; default: path.
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
        """How errors name image `index`."""
        path = str(self.paths[index])
        return path if self._places is None else f"{self._places[index]}: {path}"

    def encoded(self, index: int) -> bytes:
        """The file. Raises ImageError."""
        return read_image_file(self.paths[index], self.place(index))

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """See Images. Raises ImageError, also for another size unless `resize`."""
        where = self.place(index)
        return fit(decode_image(encoded, where), self.input_size, self.resize, where)


class AlignedImages(FileImages):
    """Photographs and five landmarks each, aligned to the model's size.

    Args:
        paths: of the files.
        landmarks: float64 [n, 5, 2], pixels.
        input_size: height and width the model takes.
        places: as for FileImages.
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
        """The landmarks (80 bytes), then the file."""
        return self.landmarks[index].tobytes() + super().encoded(index)

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """See Images. Raises ImageError, AlignmentError."""
        where = self.place(index)
        image = decode_image(memoryview(encoded)[80:], where)
        try:
            return align(image, self.landmarks[index], self.input_size)
        except AlignmentError as error:
            raise AlignmentError(f"{where}: {error}") from error


def fit(image: NDArray[np.uint8], input_size: int, resize: bool, where: str) -> NDArray[np.uint8]:
    """`image` if it is input_size x input_size, or resized to it. Raises ImageError."""
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
    """Embeddings kept by content: a file per batch, named by model, settings and image bytes.

    Args:
        folder: where the files are; made when the first is written.
        model_key: of the model's weights and preprocessing, for example `Model.key`.
    """

    def __init__(self, folder: str | os.PathLike[str], model_key: str) -> None:
        self.folder, self.model_key = Path(folder), model_key

    def path(self, encoded: Sequence[bytes], settings: str) -> Path:
        """The file of a batch of `encoded` images embedded with `settings`."""
        key = hashlib.sha256(f"{self.model_key}\n{settings}\n".encode())
        for one in encoded:
            key.update(hashlib.sha256(one).digest())
        return self.folder / f"{key.hexdigest()}.npy"

    def get(self, path: Path, rows: int) -> NDArray | None:
        """What was kept [rows, width], or None. A damaged file is embedded anew, with a warning."""
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
        """Keep `rows` whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(unfinished, "wb") as file:
                np.save(file, rows, allow_pickle=False)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


class Progress:
    """How far, how fast, how long still: a bar on a terminal, a line now and then in a log."""

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
        """`count` more are done."""
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
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


class Share(NamedTuple):
    """Images [start, end) of a rank."""

    start: int
    end: int


def share_of_batches(num_images: int, batch_size: int, rank: int, world_size: int) -> Share:
    """Images [start, end) of `rank`: whole batches, contiguous, at most one batch apart.

    Cutting between batches only means that every image sits in the same batch whatever the
    number of ranks, so a network gives it the same embedding to the bit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; with world_size {world_size} it is in [0, {world_size})")
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
    """Embeddings of all `images`, whole on every rank; all ranks call it together.

    Args:
        embed: see `Embed`. Every rank must have the same weights.
        images: the same on every rank.
        name: of the set, in errors and progress.
        flip: also embed the mirror images.
        sum_flip: add the two instead of putting them side by side.
        rank, world_size, group: which share is this one's; torch.distributed is used only when
            `world_size` is more than 1.
        batch_size: images per call of `embed`; the last batch may be smaller.
        input_size: height and width in pixels every image must have.
        cache: look batches up there first, and put them there.
        show_progress: on stderr, with the time left.

    Returns:
        [n, D], with `flip` [n, 2D] (image, then mirror image), with `sum_flip` too [n, D]. float32,
        or float64 where `embed` gives that.

    Raises:
        ValueError: no image, an image of another size, an embedding of another shape. What fails
            on one rank raises there, and a RuntimeError that names the rank on the others: no
            rank is left waiting.
    """
    if not len(images):
        raise ValueError(f"{name}: there is no image to embed")
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
            if local is None:  # now the width is known: filled in place, never held twice
                local = np.empty((own.end - own.start, rows.shape[1]), rows.dtype)
            if rows.shape[1] != local.shape[1]:
                raise ValueError(
                    f"{name}: embeddings of {rows.shape[1]} numbers after some of "
                    f"{local.shape[1]}; a model gives one width"
                )
            local[first : first + len(rows)] = rows
            progress.add(len(rows))
    except Exception as error:
        if world_size == 1:
            raise
        failure = error  # the other ranks must hear of it before it is raised
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
    """(start, rows) of the batches that begin at `starts`; the next one is decoded meanwhile.

    A batch ends after `batch_size` images, or with the images. Rows are those of `embed_batch`.
    """
    settings = f"flip={flip} input_size={input_size}"

    def read(index: int) -> tuple[bytes, NDArray[np.uint8] | None]:
        encoded = images.encoded(index)
        return encoded, None if cache is not None else decode(index, encoded)

    def decode(index: int, encoded: bytes) -> NDArray[np.uint8]:
        pixels = images.pixels(index, encoded)
        if pixels.shape != (input_size, input_size, 3) or pixels.dtype != np.uint8:
            raise ValueError(
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
    """Embeddings [n, D] of RGB images [H, W, 3], with `flip` [n, 2D]: mirror images beside them.

    Raises ValueError if `embed` gives another shape.
    """
    # [n, 3, H, W]; copied, because torch takes no view with negative or odd strides for granted
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    sides = []
    for images in (batch, batch.flip(3)) if flip else (batch,):
        embeddings = embed(images)
        if embeddings.ndim != 2 or len(embeddings) != len(batch) or not embeddings.shape[1]:
            raise ValueError(
                f"embed gave shape {list(embeddings.shape)} for {len(batch)} images; "
                f"[{len(batch)}, D] is what is needed"
            )
        wide = embeddings.dtype == torch.float64
        sides.append(embeddings.detach().to("cpu", torch.float64 if wide else torch.float32))
    return torch.cat(sides, dim=1).numpy()


class OtherRankFailed(RuntimeError):
    """Embedding failed elsewhere; the error raised there says why."""


def gather_rows(
    local: NDArray | None,
    failure: Exception | None,
    shares: Sequence[Share],
    name: str,
    rank: int,
    group: dist.ProcessGroup | None,
) -> NDArray:
    """All ranks' rows in rank order on every rank; or an error on every rank if one has failed.

    First what everybody has (failed, width, float64), then the rows, a block of a rank at a time
    into their final place, so that nothing is held twice.
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
