"""Runs an ONNX file of any vendor as a function of uint8 images, through onnxruntime.

What the file states is read (batch, size, layout, type of the input; our metadata). The caller has
to give the rest. Nothing is guessed from names of nodes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.errors import UserError

Layout = Literal["NCHW", "NHWC"]
Channels = float | Sequence[float]

_INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


class OnnxEmbedder:
    """Callable `uint8 RGB [n, 3, H, W] -> embeddings [n, D]` float32 around an ONNX file.

    A fixed batch size is met by cutting the images into batches and padding the last one; the
    result does not depend on the padding.

    Args:
        path: Path of the .onnx; external weights lie beside it.
        mean: Mean of pixels 0..255, one number or one per channel in RGB order; the graph gets
            (pixel - mean) / std.
        std: Standard deviation of pixels, as `mean`.
        color: Order of the channels that the graph takes, RGB or BGR.
        layout: NCHW or NHWC; None reads it from the input's shape if that is unambiguous.
        input_size: Height and width in pixels; None reads it from the input's shape.
        output: Name of the output that is the embedding; None means the only one.
        device: cpu or cuda (with onnxruntime's CUDA provider).
        threads: Number of onnxruntime's threads; None means as many as PyTorch uses.

    Raises:
        UserError: The file cannot be used, or an option is missing or does not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mean: Channels,
        std: Channels,
        color: str = "RGB",
        *,
        layout: str | None = None,
        input_size: int | None = None,
        output: str | None = None,
        device: torch.device | str = "cpu",
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.session = open_session(self.path, device, threads)
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            shapes = ", ".join(f"{one.name} {one.shape}" for one in inputs)
            raise UserError(
                f"{path}: needed is one input of 4 dimensions (images); it has {shapes or 'none'}"
            )
        self._input = inputs[0]
        if self._input.type not in _INPUT_TYPES:
            raise UserError(
                f"{path}: its input is {self._input.type}; allowed are {', '.join(_INPUT_TYPES)}"
            )
        self._dtype = np.dtype(_INPUT_TYPES[self._input.type])
        shape: list[Any] = list(self._input.shape)
        self.layout: Layout = _layout(self.path, shape, layout)
        self.input_size = _input_size(self.path, shape, self.layout, input_size)
        self.fixed_batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        self._output = _output_name(self.path, self.session, output)
        self.mean = _per_channel("mean", mean)
        self.std = _per_channel("std", std)
        if not (self.std > 0).all():
            raise UserError(f"std is {std}; it must be positive")
        if color not in ("RGB", "BGR"):
            raise UserError(f"color is {color!r}; allowed are RGB and BGR")
        self.color = color
        plain = bool((self.mean == 0).all() and (self.std == 1).all())
        if self._dtype == np.uint8 and not plain:
            raise UserError(
                f"{path}: its input is uint8, so it normalizes by itself: pass --mean 0 --std 1"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Computes embeddings [n, D], float32 on the CPU, of uint8 RGB `images` [n, 3, H, W].

        Raises:
            UserError: The images have another shape or dtype, onnxruntime fails, or the output has
                another shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}; "
                "give uint8 [n, 3, height, width] with values 0..255"
            )
        pixels = images.cpu().numpy()
        if self._dtype == np.uint8:
            batch: NDArray[Any] = pixels
        else:
            batch = (pixels.astype(np.float32) - self.mean) / self.std  # [n, 3, H, W]
            batch = batch.astype(self._dtype, copy=False)
        if self.color == "BGR":
            batch = batch[:, ::-1]
        if self.layout == "NHWC":
            batch = batch.transpose(0, 2, 3, 1)
        batch = np.ascontiguousarray(batch)
        size = self.fixed_batch
        if size is None:
            return torch.from_numpy(self._run(batch))
        rows = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            missing = size - len(part)
            full = np.concatenate([part, part[-1:].repeat(missing, 0)]) if missing else part
            rows.append(self._run(full)[: len(part)])
        return torch.from_numpy(np.concatenate(rows))

    def _run(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        try:
            (found,) = self.session.run([self._output], {self._input.name: batch})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise UserError(
                f"{self.path}: onnxruntime failed on a batch {list(batch.shape)} ({error})"
            ) from error
        rows = np.asarray(found, dtype=np.float32)
        # Some exporters keep the dimensions of a 1 x 1 map: [n, D, 1, 1].
        if rows.size % len(batch) or not rows.size or rows.shape[0] != len(batch):
            raise UserError(
                f"{self.path}: output {self._output} has shape {list(rows.shape)} for "
                f"{len(batch)} images; needed is [{len(batch)}, D]"
            )
        return rows.reshape(len(batch), -1).copy()


def open_session(
    path: Path, device: torch.device | str = "cpu", threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Opens onnxruntime's session of a file.

    Args:
        path: Path of the file.
        device: cpu or cuda.
        threads: Number of onnxruntime's threads; None means as many as PyTorch uses.

    Raises:
        UserError: The file cannot be loaded, or the device has no provider.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of an .onnx")
    device = torch.device(device)
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError(
                f"{device} was asked for, but this onnxruntime has no CUDA provider: "
                "pip install onnxruntime-gpu, or pass --device cpu"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    # Spinning threads take the processor from the decoding threads and from other ranks.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its exceptions share no base class
        raise UserError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({str(error)[:300]}). "
            "Is it a complete ONNX file, with its weights beside it?"
        ) from error


def metadata_of(path: Path) -> Mapping[str, str]:
    """Returns the text properties of an ONNX file; for ours see docs/export.md."""
    return dict(open_session(path).get_modelmeta().custom_metadata_map)


def content_key(path: Path) -> str:
    """Hashes the file, and the file of weights beside it that belongs to it."""
    key = hashlib.sha256()
    for part in (path, path.with_name(f"{path.name}.data")):
        if part.is_file():
            with open(part, "rb") as file:
                key.update(hashlib.file_digest(file, "sha256").digest())
    return key.hexdigest()


def _layout(path: Path, shape: Sequence[Any], wanted: str | None) -> Layout:
    channels_first, channels_last = shape[1] == 3, shape[3] == 3
    if wanted is not None:
        if wanted not in ("NCHW", "NHWC"):
            raise UserError(f"layout is {wanted!r}; allowed are NCHW and NHWC")
        said = shape[1] if wanted == "NCHW" else shape[3]
        if isinstance(said, int) and said != 3:
            raise UserError(
                f"{path}: its input {list(shape)} cannot be {wanted}: that has {said} channels "
                "where 3 are needed"
            )
        return "NCHW" if wanted == "NCHW" else "NHWC"
    if channels_first != channels_last:
        return "NCHW" if channels_first else "NHWC"
    raise UserError(
        f"{path}: its input {list(shape)} does not say where the 3 channels are: pass "
        "--layout NCHW or --layout NHWC"
    )


def _input_size(path: Path, shape: Sequence[Any], layout: Layout, wanted: int | None) -> int:
    height, width = shape[2:4] if layout == "NCHW" else shape[1:3]
    known = [side for side in (height, width) if isinstance(side, int) and side > 0]
    if len(set(known)) > 1:
        raise UserError(
            f"{path}: its images are {height} x {width}; only square ones are supported"
        )
    if wanted is None and not known:
        raise UserError(
            f"{path}: its input {list(shape)} does not say the size of images: pass --input-size, "
            "for example 112"
        )
    if wanted is not None and known and wanted != known[0]:
        raise UserError(f"{path}: takes images of {known[0]} pixels, not {wanted}")
    return known[0] if known else int(wanted or 0)


def _output_name(path: Path, session: onnxruntime.InferenceSession, wanted: str | None) -> str:
    names = [one.name for one in session.get_outputs()]
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise UserError(
            f"{path}: has the outputs {', '.join(names)}; pass --output with the one that is the "
            "embedding"
        )
    return str(wanted)


def _per_channel(name: str, value: Channels) -> NDArray[np.float32]:
    numbers = np.asarray(value, dtype=np.float32).reshape(1, -1, 1, 1)
    if numbers.shape[1] not in (1, 3) or not np.isfinite(numbers).all():
        raise UserError(f"{name} is {value}; give one number or one per channel, as in RGB")
    return numbers
