"""Batches decoded and augmented by NVIDIA DALI, on the GPU or (device_id=None) on CPU cores.

DALI's own `readers.mxnet` follows the order of the file whatever the index says, shuffles
differently for every number of shards and returns float32 labels. So our reader feeds DALI through
`external_source`: the same order, int64 labels and the same draws of augmentation as the CPU
loader, and therefore the same position on resume. One thread reads ahead; DALI decodes.

DALI is optional: `pip install nvidia-dali-cuda120` (or -cuda130); see docs/installing_dali.md.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.augment import CUBIC, ERASED, LINEAR, NEAREST, Draws, blur_sigma
from data.collate import BatchLoader, LoadedBatch, replacements
from data.datasets import DataError
from data.decode import decode_into, empty_pixels, image_size
from data.prefetch import OrderedPrefetch
from utils.errors import UserError

_IN_FLIGHT = 2  # batches inside the pipeline
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


def dali_is_installed() -> bool:
    """Returns whether `import nvidia.dali` would find it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even its parent
        return False


@dataclass
class _Encoded:
    """A batch that was read: the inputs of the pipeline, and what its output is joined with."""

    indices: np.ndarray  # int64 [b]
    files: list[np.ndarray]  # uint8 [bytes] each
    labels: np.ndarray  # int64 [b]
    draws: Draws
    bad: dict[int, Exception]


class _Feed:
    """Gives DALI the next batch. DALI works ahead, so some batches are in flight."""

    def __init__(self, reader: Iterator[_Encoded]) -> None:
        self._reader = reader
        self._again: deque[_Encoded] = deque()
        self.in_flight: deque[_Encoded] = deque()
        self.empty: _Encoded | None = None  # a last batch without images, which DALI cannot take
        self.error: Exception | None = None  # of the batch after those in flight

    def start_again(self) -> None:
        """Gives the batches in flight to a new pipeline."""
        self._again, self.in_flight = self.in_flight, deque()

    def next(self) -> _Encoded:
        """Returns the next batch.

        Raises:
            StopIteration: The batches are at an end, or the next one is empty or cannot be read.
        """
        if self._again:
            batch = self._again.popleft()
        elif self.error is not None or self.empty is not None:
            raise StopIteration
        else:
            try:
                batch = next(self._reader)
            except UserError as error:
                self.error = error
                raise StopIteration from error
            if not batch.files:
                self.empty = batch
                raise StopIteration
        self.in_flight.append(batch)
        return batch


class DaliPool:
    """Runs one DALI pipeline over the batches of a BatchLoader.

    If DALI fails on a batch, our own decoder looks for the damaged image and names it. The pipeline
    is unusable after an error and is built again.

    Args:
        make: Says which images a batch has and how they are changed.
        num_threads: Number of DALI's decoding threads.
        device: CUDA device, on which the batches then lie. Any other device, or None, decodes on
            the CPU.

    Raises:
        DataError: DALI cannot be imported.
    """

    def __init__(
        self, make: BatchLoader, num_threads: int, device: torch.device | None = None
    ) -> None:
        try:
            import nvidia.dali
        except ImportError as error:
            raise DataError(
                f"dali=True, but NVIDIA DALI cannot be imported ({error}): pip install "
                "nvidia-dali-cuda120 (or -cuda130), or dali=False, which gives the same images in "
                "the same order"
            ) from error
        self._dali = nvidia.dali
        self._make, self._num_threads = make, num_threads
        on_gpu = device is not None and device.type == "cuda"
        self._device = device if on_gpu else None
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._pipeline: Any = None
        self._feed: _Feed | None = None

    def run(self, epoch: int, steps: range) -> Iterator[LoadedBatch]:
        """Yields the batches of these steps in order; an error is raised in place of its batch."""
        reader = OrderedPrefetch(lambda step: self._read(epoch, step), steps, num_workers=1)
        feed = self._feed = _Feed(reader)
        pipeline, self._pipeline = self._pipeline, None  # kept only if this iteration ends well
        try:
            while True:
                pipeline = pipeline or self._build()
                try:
                    images = self._outputs(pipeline)
                except StopIteration:
                    break
                except RuntimeError as error:
                    if not feed.in_flight:
                        raise  # the error concerns no batch
                    self._repair(feed.in_flight[0], error)
                    feed.start_again()
                    pipeline = None
                    continue
                yield self._loaded(images, feed.in_flight.popleft())
            if feed.empty is not None:
                size = self._make.source.input_size
                yield self._loaded(torch.empty((0, size, size, 3), dtype=torch.uint8), feed.empty)
            if feed.error is not None:
                raise feed.error
            pipeline.reset()
            self._pipeline = pipeline
        finally:
            reader.close()

    def _repair(self, batch: _Encoded, error: RuntimeError) -> None:
        """Replaces the damaged images of a failed batch, or without "skip" raises an error."""
        bad = self._probe(batch)
        if not bad:
            where = self._make.source.describe(int(batch.indices[0]))
            raise DataError(
                f"DALI failed on a batch in which our own decoder finds nothing wrong (its first "
                f"image: {where}): {error}. Try dali=False."
            ) from error
        if not self._make.skips_bad_records:
            raise next(iter(bad.values())) from error
        batch.bad.update(bad)
        _replace_bad(batch)

    def _read(self, epoch: int, step: int) -> _Encoded:
        """Reads the encoded images of a batch and finds those that cannot be used."""
        make = self._make
        make.fetch_ahead(epoch, step)
        indices = make.indices(epoch, step)
        labels = np.zeros(len(indices), np.int64)
        files = [np.empty(0, np.uint8)] * len(indices)
        bad: dict[int, Exception] = {}
        for row, index in enumerate(indices.tolist()):
            try:
                encoded, labels[row] = make.source.read_encoded(index)
                files[row] = np.frombuffer(encoded, np.uint8)
                self._check(encoded, index)
            except UserError as error:
                if not make.skips_bad_records:
                    raise
                bad[row] = error
        batch = _Encoded(indices, files, labels, make.draws(epoch, indices), bad)
        _replace_bad(batch)
        return batch

    def _check(self, encoded: bytes | memoryview, index: int) -> None:
        """Refuses what DALI would accept: other sizes, and truncated JPEGs, which it fills up."""
        where, wanted = self._make.source.describe(index), self._make.source.input_size
        height, width = image_size(memoryview(encoded), where)
        if (height, width) != (wanted, wanted):
            raise DataError(
                f"{where}: an image of {width} x {height} pixels; the network takes {wanted} x "
                f"{wanted}. Resize the set once with: python scripts/pack.py FOLDER OUT --size "
                f"{wanted}"
            )
        file = bytes(encoded)
        if file.startswith(_JPEG_START) and file.rfind(_JPEG_END) < 0:
            decode_into(file, empty_pixels(wanted, wanted, 3), where)

    def _probe(self, batch: _Encoded) -> dict[int, Exception]:
        """Returns the images of a batch that our own decoder refuses, by row, and why."""
        size = self._make.source.input_size
        found: dict[int, Exception] = {}
        scratch = np.empty((size, size, 3), np.uint8)
        for row, (file, index) in enumerate(zip(batch.files, batch.indices.tolist(), strict=True)):
            try:
                decode_into(file, scratch, self._make.source.describe(index))
            except UserError as error:
                found[row] = error
        return found

    def _outputs(self, pipeline: Any) -> torch.Tensor:
        """Returns the images of the oldest batch in flight: uint8 [b, H, W, 3]."""
        if self._stream is None:
            (images,) = pipeline.run()
            return torch.from_numpy(np.array(images.as_array()))  # a copy: DALI reuses its memory
        from nvidia.dali.plugin.pytorch import feed_ndarray

        (images,) = pipeline.run(cuda_stream=self._stream)
        decoded = images.as_tensor()
        with torch.cuda.stream(self._stream):
            copy = torch.empty(decoded.shape(), dtype=torch.uint8, device=self._device)
            feed_ndarray(decoded, copy, cuda_stream=self._stream)  # waits for this stream only
        return copy

    def _loaded(self, images: torch.Tensor, batch: _Encoded) -> LoadedBatch:
        reasons = [str(error) for error in batch.bad.values()]
        return LoadedBatch(images, torch.from_numpy(batch.labels), reasons)

    # ---------------------------------------------------------------- the pipeline

    def _inputs(self, draws: Draws) -> dict[str, np.ndarray]:
        """Converts the draws to inputs of the pipeline: float32 or int32, one row per image."""
        wanted, size = self._make.augmentation, self._make.source.input_size
        inputs = {"flip": draws.flip.astype(np.int32)}
        if wanted.crop:
            inputs["crop_at"], inputs["crop_size"] = _outside(draws.crop, size)
        if wanted.resize or wanted.low_res:
            inputs["side"] = draws.side.astype(np.float32)
            inputs["down"], inputs["up"] = self._interpolation(draws.down, draws.up)
        if wanted.blur:
            inputs["blur"] = draws.blur
            inputs["sigma"] = blur_sigma(draws.blur).astype(np.float32)
        if wanted.changes_colors:
            inputs["color"] = draws.color
        if wanted.erase:
            inputs["erase_at"] = draws.erase[:, :2].astype(np.float32)
            inputs["erase_size"] = draws.erase[:, 2:].astype(np.float32)
        return inputs

    def _interpolation(self, *ways: np.ndarray) -> list[np.ndarray]:
        kinds = self._dali.types.DALIInterpType
        names = {NEAREST: kinds.INTERP_NN, LINEAR: kinds.INTERP_LINEAR, CUBIC: kinds.INTERP_CUBIC}
        numbers = np.array([int(names[kind]) for kind in sorted(names)], np.int32)
        return [numbers[way] for way in ways]

    def _build(self) -> Any:
        fn, types = self._dali.fn, self._dali.types
        wanted, size = self._make.augmentation, self._make.source.input_size
        on_gpu = self._device is not None
        pipeline = self._dali.Pipeline(
            batch_size=self._make.batch_size,
            num_threads=self._num_threads,
            device_id=self._device.index or 0 if self._device is not None else None,
            prefetch_queue_depth=_IN_FLIGHT,
        )

        names: list[str] = []

        def given_batch() -> list[Any]:
            assert self._feed is not None
            batch = self._feed.next()
            inputs = {"files": batch.files, **self._inputs(batch.draws)}
            return [inputs[name] for name in names]

        with pipeline:
            names += ["files", *self._inputs(self._make.draws(0, np.arange(1)))]
            sources = fn.external_source(source=given_batch, num_outputs=len(names), batch=True)
            given = dict(zip(names, sources, strict=True)).__getitem__
            images = fn.decoders.image(
                given("files"), device="mixed" if on_gpu else "cpu", output_type=types.RGB
            )
            if wanted.crop:
                images = fn.erase(
                    images,
                    anchor=given("crop_at"),
                    shape=given("crop_size"),
                    fill_value=0,
                    axis_names="HW",
                )
            if wanted.resize or wanted.low_res:
                side = given("side")
                down, up = (
                    fn.reinterpret(given(name), dtype=types.INTERP_TYPE) for name in ("down", "up")
                )
                images = fn.resize(
                    images, resize_x=side, resize_y=side, interp_type=down, antialias=False
                )
                images = fn.resize(
                    images, resize_x=size, resize_y=size, interp_type=up, antialias=False
                )
            if wanted.blur:
                images = fn.gaussian_blur(images, window_size=given("blur"), sigma=given("sigma"))
            if wanted.changes_colors:
                images = fn.coord_transform(images, MT=given("color"), dtype=types.UINT8)
            if wanted.erase:
                images = fn.erase(
                    images,
                    anchor=given("erase_at"),
                    shape=given("erase_size"),
                    fill_value=ERASED,
                    axis_names="HW",
                )
            pipeline.set_outputs(fn.flip(images, horizontal=given("flip")))
        pipeline.build()
        return pipeline


def _replace_bad(batch: _Encoded) -> None:
    for row, other in replacements(batch.bad, len(batch.files)).items():
        batch.files[row], batch.labels[row] = batch.files[other], batch.labels[other]
        for values in vars(batch.draws).values():
            values[row] = values[other]


def _outside(boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the area around each box as four boxes.

    Args:
        boxes: [b, 4] int32 (top, left, height, width).
        size: Side of the images in pixels.

    Returns:
        Corners and sizes (y, x) of the four boxes, float32 [b, 8] each.
    """
    top, left, height, width = boxes.T
    zero, whole = np.zeros_like(top), np.full_like(top, size)
    at = np.stack([zero, zero, top + height, zero, zero, zero, zero, left + width], axis=1)
    extent = np.stack(
        [top, whole, size - top - height, whole, whole, left, whole, size - left - width], axis=1
    )
    return at.astype(np.float32), extent.astype(np.float32)
