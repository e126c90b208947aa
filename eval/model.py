"""Makes a function that embeds uint8 images from a model; every evaluation uses it.

`open_model` takes what a user names on a command line (a run, a file of weights, an ONNX file).
`Embedder` wraps a backbone in memory, as the training loop has it. Protocols take any callable of
this form.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.weights import MODEL_FILE, load_model, read_state_dict
from eval.onnx_model import (
    Channels,
    OnnxEmbedder,
    content_key,
    metadata_of,
)
from utils.errors import UserError


@dataclass(frozen=True)
class Model:
    """What a protocol needs of a model.

    Attributes:
        embed: uint8 RGB [n, 3, input_size, input_size] -> [n, D].
        input_size: Height and width of images in pixels.
        key: Hash of weights and preprocessing: equal keys mean equal embeddings.
        facts: Origin and preprocessing, for reports.
    """

    embed: Callable[[Tensor], Tensor]
    input_size: int
    key: str
    facts: dict[str, Any]


def open_model(
    path: str | os.PathLike[str],
    *,
    network: str | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    color: str | None = None,
    layout: str | None = None,
    input_size: int | None = None,
    output: str | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """Opens the model at `path`: the folder of a run, a file of weights, or an ONNX file.

    Args:
        path: Folder with model.pt, state dict of ours or of arcface_torch, or `*.onnx`.
        network: Architecture, for weights that do not state it.
        mean: Mean of pixels 0..255, one number or three in RGB order; None takes the file's. An
            ONNX file that does not state it needs it. Weights of arcface_torch, which never state
            it, get its 127.5, and `facts` says so.
        std: Standard deviation of pixels, as `mean`.
        color: RGB or BGR, the order that the network takes; None as for `mean`.
        layout: NCHW or NHWC, for an ONNX file whose input does not show it.
        input_size: Height and width in pixels, for an ONNX file that does not state it.
        output: Name of the embedding, for an ONNX file with several outputs.
        device: Device of the model.

    Raises:
        UserError: The ONNX file cannot be used, or an option is missing, has a wrong value or does
            not fit; the message has an example.
        FileNotFoundError: The file does not exist.
        WeightsError: The weights cannot be used.
    """
    if Path(path).suffix.lower() == ".onnx":
        if network is not None:
            raise UserError(f"{path} is an ONNX file: it needs no --network")
        return _open_onnx(Path(path), mean, std, color, layout, input_size, output, device)
    for name, value in (("--layout", layout), ("--output", output), ("--input-size", input_size)):
        if value is not None:
            raise UserError(f"{name} is for ONNX files; {path} is none")
    _, own = read_state_dict(path)
    backbone, metadata = load_model(path, network=network)
    if metadata.in_channels != 3:
        raise UserError(
            f"{path} takes {metadata.in_channels} channels; only color images are embedded here"
        )
    used_mean = metadata.mean if mean is None else mean
    used_std = metadata.std if std is None else std
    used_color = metadata.color if color is None else color
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    facts: dict[str, Any] = {
        "path": str(path),
        "network": metadata.network,
        "mean": used_mean,
        "std": used_std,
        "color": used_color,
        "input_size": metadata.input_size,
        "preprocessing_from": _origin(
            [mean, std, color],
            "the file" if own else f"{backbone.PUBLISHED_BY}'s usual (the file says none)",
        ),
    }
    facts["key"] = _key(content_key(file), facts)
    embed = Embedder(backbone.to(device), used_mean, used_std, color=used_color)
    return Model(embed, metadata.input_size, facts["key"], facts)


def _open_onnx(
    path: Path,
    mean: Channels | None,
    std: Channels | None,
    color: str | None,
    layout: str | None,
    input_size: int | None,
    output: str | None,
    device: torch.device | str,
) -> Model:
    said = metadata_of(path)
    missing = [
        option
        for option, given in (("mean", mean), ("std", std), ("color", color))
        if given is None and option not in said
    ]
    if missing:
        raise UserError(
            f"{path} does not say {', '.join(missing)} of its images, and guessing would give "
            f"wrong numbers: pass {' '.join('--' + option for option in missing)}. Usual are "
            "--mean 127.5 --std 127.5 --color RGB (InsightFace) and --mean 123.675,116.28,103.53 "
            "--std 58.395,57.12,57.375 --color RGB (ImageNet); --mean 0 --std 1 if the graph "
            "normalizes by itself"
        )
    used_mean = parse_channels("mean", said["mean"]) if mean is None else mean
    used_std = parse_channels("std", said["std"]) if std is None else std
    used_color = said["color"] if color is None else color
    if input_size is None and said.get("input_size", "").isdigit():
        input_size = int(said["input_size"])
    embed = OnnxEmbedder(
        path,
        used_mean,
        used_std,
        used_color,
        layout=layout,
        input_size=input_size,
        output=output,
        device=device,
    )
    facts: dict[str, Any] = {
        "path": str(path),
        "network": said.get("network", "ONNX"),
        "mean": used_mean,
        "std": used_std,
        "color": used_color,
        "layout": embed.layout,
        "fixed_batch": embed.fixed_batch,
        "input_size": embed.input_size,
        "preprocessing_from": _origin([mean, std, color], "the file"),
    }
    facts["key"] = _key(content_key(path), facts, output)
    return Model(embed, embed.input_size, facts["key"], facts)


def parse_channels(name: str, text: str) -> float | tuple[float, ...]:
    """Parses `127.5` or `123.675,116.28,103.53` (RGB).

    Args:
        name: Name of the option in the error.
        text: The text.

    Raises:
        UserError: The text is not one number or three.
    """
    try:
        numbers = tuple(float(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3):
        raise UserError(
            f"{name} is {text!r}; give one number, or three for R,G,B: 123.675,116.28,103.53"
        )
    return numbers[0] if len(numbers) == 1 else numbers


def _origin(given: Sequence[Any], otherwise: str) -> str:
    count = sum(value is not None for value in given)
    return otherwise if not count else "options" if count == len(given) else f"options, {otherwise}"


def _key(content: str, facts: dict[str, Any], *more: Any) -> str:
    seen = [facts["mean"], facts["std"], facts["color"], facts["network"], *more]
    return hashlib.sha256(f"{content} {seen}".encode()).hexdigest()


class Embedder:
    """Callable `uint8 [n, 3, H, W] -> embeddings [n, D]` around a backbone.

    Every call puts the backbone's modules into eval mode and gives each its own mode back
    afterwards, also when the call fails. So a training loop can verify between two steps, and
    layers that it keeps frozen stay frozen.

    Args:
        backbone: Takes normalized images [n, 3, H, W] and gives [n, D]. It is the module itself,
            not its DDP wrapper: an evaluation needs no collective of its own.
        mean: Mean of pixels 0..255, one number or one per RGB channel; the backbone sees (pixel -
            mean) / std.
        std: Standard deviation of pixels, as `mean`.
        device: Where images are sent; None means where the backbone's first parameter is.
        autocast: Dtype for `torch.autocast` (bfloat16, float16), or None for the backbone's own.
        color: Order of the channels that the backbone takes, RGB or BGR; images come as RGB.

    Raises:
        UserError: `mean`, `std` or `color` has a wrong value.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Channels = 127.5,
        std: Channels = 127.5,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        color: str = "RGB",
    ) -> None:
        parameter = next(backbone.parameters(), None)
        self.backbone = backbone
        self.device = torch.device(
            device if device is not None else "cpu" if parameter is None else parameter.device
        )
        # float64 backbones (the tests' exact mode) get float64 images, all others float32.
        is_double = parameter is not None and parameter.dtype == torch.float64
        self.dtype = torch.float64 if is_double else torch.float32
        self.autocast = autocast
        if color not in ("RGB", "BGR"):
            raise UserError(f"color is {color!r}; allowed are RGB and BGR")
        self.color = color
        self.mean = self._per_channel("mean", mean)  # [1, 3 or 1, 1, 1]
        self.std = self._per_channel("std", std)
        if not bool((self.std > 0).all()):
            raise UserError(f"std is {std}; it must be positive (127.5 for the usual models)")

    def __call__(self, images: Tensor) -> Tensor:
        """Computes embeddings [n, D] of images, on the embedder's device.

        They are float64 from a float64 backbone and float32 from any other, whatever the autocast.

        Args:
            images: [n, 3, H, W] uint8 RGB.

        Raises:
            UserError: The images have another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}; "
                "give uint8 [n, 3, height, width] with values 0..255"
            )
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    self.device.type, dtype=self.autocast, enabled=self.autocast is not None
                ),
            ):
                pixels = images.to(self.device, non_blocking=True).to(self.dtype)
                pixels = (pixels - self.mean) / self.std
                embeddings = self.backbone(pixels.flip(1) if self.color == "BGR" else pixels)
        finally:
            for module, mode in modes:
                module.training = mode
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()

    def _per_channel(self, name: str, value: Channels) -> Tensor:
        numbers = torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(1, -1, 1, 1)
        if numbers.shape[1] not in (1, 3):
            raise UserError(
                f"{name} has {numbers.shape[1]} values; give one number or one per RGB channel"
            )
        return numbers
