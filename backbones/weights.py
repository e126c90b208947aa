"""model.pt: a plain state dict that any tool can load, and that says which network it holds.

The file is what arcface_torch writes, an ordered dict of tensors under the published names, so
`net.load_state_dict(torch.load("model.pt"))` works anywhere. The description of the network and its
images is an attribute of that dict, which other tools do not see.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from backbones import Backbone, backbone_class, get_model, model_names
from utils.errors import UserError
from utils.files import atomic_write

logger = logging.getLogger(__name__)

MODEL_FILE = "model.pt"  # name of the file inside a run folder
_ATTRIBUTE = "_arcshard"  # attribute of the saved dict; torch.load(weights_only=True) keeps it
_FORMAT = 1
# Where checkpoints of arcface_torch and of common trainers keep the weights.
_NESTED = ("state_dict", "state_dict_backbone")
# Prefixes of DDP and of models that hold backbone and head. "features." alone is no such prefix,
# because IResNet has a layer of that name.
_PREFIXES = ("module.", "backbone.", "features.module.")
_CLASSIFIERS = ("arcface_linear.",)  # the classifier in checkpoints of TorchShard
_SHOWN = 4  # number of keys that an error names
_SAVE_WEIGHTS = "the weights alone saved, as torch.save(net.state_dict(), path)"


class WeightsError(UserError, RuntimeError):
    """A file of weights cannot be used. The message says why and what to do."""


@dataclass(frozen=True)
class ModelMetadata:
    """What is needed beside the weights to use them.

    Attributes:
        network: A name of `backbones.model_names()`.
        num_features: Size of the embedding.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        mean: What is subtracted from every pixel (0..255), one number or one per RGB channel.
        std: What the difference is divided by, one number or one per RGB channel.
        color: Order of the channels, "RGB" or "BGR".
        step: Optimizer steps of the training so far.
        epoch: Finished epochs.
        config: Name of the run's config.
        trained_with: Name and version of the trainer.
        options: Further arguments of `get_model` that the network was built with.
    """

    network: str
    num_features: int = 512
    input_size: int = 112
    in_channels: int = 3
    mean: float | tuple[float, ...] = 127.5
    std: float | tuple[float, ...] = 127.5
    color: str = "RGB"
    step: int | None = None
    epoch: int | None = None
    config: str | None = None
    trained_with: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MatchReport:
    """What `load_matching` did, key by key.

    Attributes:
        matched: Keys that were loaded.
        skipped: (key, shape in the file, shape in the model) where the two shapes differ.
        missing: Keys of the model that the file does not have. They keep their initial values.
        unexpected: Keys of the file that the model does not have.
    """

    matched: tuple[str, ...]
    skipped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors fit"]
        if self.skipped:
            parts.append(_list("have another shape", map(_show_shapes, self.skipped)))
        if self.missing:
            parts.append(_list("are not in the file", self.missing))
        if self.unexpected:
            parts.append(_list("are not in the model", self.unexpected))
        return "; ".join(parts)


def save_model(
    path: str | os.PathLike[str],
    backbone_or_state_dict: nn.Module | Mapping[str, Tensor],
    metadata: ModelMetadata,
) -> Path:
    """Write weights and metadata to `path` atomically.

    The file appears under its name only when it is complete and on disk. Prefixes of DDP and
    torch.compile are removed from the keys; every tensor is a contiguous CPU copy with its own
    storage. The folder is created if it does not exist.

    Args:
        path: The file to write.
        backbone_or_state_dict: The weights.
        metadata: What the file says about the network.

    Returns:
        The path written.

    Raises:
        WeightsError: The state dict holds something else than tensors, or the metadata something
            else than plain values.
        OSError: The file cannot be written.
    """
    if isinstance(backbone_or_state_dict, nn.Module):
        backbone_or_state_dict = backbone_or_state_dict.state_dict()
    source = _plain_state_dict(backbone_or_state_dict, "the state dict to save")
    state: OrderedDict[str, Tensor] = OrderedDict(
        (key, tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
        for key, tensor in source.items()
    )
    setattr(state, _ATTRIBUTE, _plain_metadata(metadata))

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        _serialize(state, file)
    return path


def _serialize(state: OrderedDict[str, Tensor], file: BinaryIO) -> None:
    """Call torch.save, and raise the OSError of the disk where there was one.

    torch's writer turns an OSError into a RuntimeError about positions.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_state_dict(
    path: str | os.PathLike[str],
) -> tuple[OrderedDict[str, Tensor], ModelMetadata | None]:
    """Read the weights in a file or run folder to the CPU, under plain keys.

    Only tensors and plain values are ever unpickled. A file that asks for more is refused, because
    unpickling it could run code. Checkpoints that keep the weights under `state_dict` or
    `state_dict_backbone` are opened. The prefixes `module.`, `backbone.`, `features.module.` and
    `_orig_mod.` are removed from the keys. A classifier that TorchShard stored beside the network
    is left out.

    Args:
        path: The file, or the folder of a run.

    Returns:
        The state dict, and the metadata if the file has any.

    Raises:
        FileNotFoundError: There is no such file, or the folder has no model.pt.
        WeightsError: The file is damaged, unsafe, or not a file of weights.
    """
    file = _find_file(path)
    content = read_plain_file(file)
    if isinstance(content, Mapping):
        for name in _NESTED:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
    state = _plain_state_dict(content, str(file))
    for key in [key for key in state if key.startswith(_CLASSIFIERS)]:
        logger.info("%s: %s belongs to the classes, not to the network: left out", file, key)
        del state[key]
    return state, _metadata_of(content, file)


def read_plain_file(file: Path, mmap: bool = False) -> Any:
    """Read a file of torch.save to the CPU if it holds only tensors and plain values.

    Args:
        file: The file.
        mmap: Whether the tensors stay on the disk until they are used (files of torch 1.6 and
            later).

    Returns:
        The object that was saved.

    Raises:
        WeightsError: The file is damaged or unsafe.
        OSError: The file cannot be read.
    """
    with open(file, "rb") as stream:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about foreign files, refused below
                return torch.load(
                    file if mmap else stream, map_location="cpu", weights_only=True, mmap=mmap
                )
        except Exception as error:  # a crafted or broken file can raise anything at all
            raise _refusal(file, error) from error


def load_model(
    path: str | os.PathLike[str],
    *,
    network: str | None = None,
    num_features: int | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Backbone, ModelMetadata]:
    """Load the backbone of a model.pt, in fp32 and eval mode, with its metadata.

    Args:
        path: A file or a run folder of ours, or any state dict of arcface_torch.
        network: Name of the network. It is needed where the file has no metadata, and must agree
            with the metadata elsewhere.
        num_features: Expected size of the embedding; None does not check it. The size itself comes
            from the metadata or the weights.
        device: Device of the backbone.

    Returns:
        The backbone and its metadata.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: No network has the name `network`.
        WeightsError: The file is refused, does not name its network, or does not fit it.
    """
    if network is not None:
        backbone_class(network)  # reports a wrong name before a large file is read
    state, metadata = read_state_dict(path)
    if metadata is None:
        if network is None:
            raise WeightsError(
                f"{path} does not say which network it holds (it was not written by ArcShard): "
                f"name it (network=, on the command line --network). Names: "
                f"{', '.join(model_names())}"
            )
        metadata = _metadata_from_weights(state, network, path)
    elif network is not None and network != metadata.network:
        raise WeightsError(
            f"{path} holds the network {metadata.network!r}, not {network!r}: "
            "leave the network out, or give the other file"
        )
    if num_features is not None and num_features != metadata.num_features:
        raise WeightsError(
            f"{path} holds embeddings of size {metadata.num_features}, not {num_features}: "
            "leave num_features out, or give the other file"
        )
    with torch.device("meta"):  # no memory and no time for initial values that are overwritten
        backbone = get_model(
            metadata.network,
            num_features=metadata.num_features,
            input_size=metadata.input_size,
            in_channels=metadata.in_channels,
            **metadata.options,
        )
    wanted = backbone.state_dict()
    report = _compare(state, wanted)
    if report.skipped or report.missing or report.unexpected:
        raise WeightsError(f"{path} does not fit the network {metadata.network!r}: {report}")
    for key, tensor in state.items():
        state[key] = tensor.to(
            device, wanted[key].dtype, copy=True, memory_format=torch.contiguous_format
        )
    backbone.load_state_dict(state, assign=True)
    return backbone.eval(), metadata


def load_matching(backbone: nn.Module, path: str | os.PathLike[str]) -> MatchReport:
    """Load into `backbone`, in place, every tensor of the file that fits by name and shape.

    This serves fine-tuning: with another size of embedding or image, the layers whose shapes differ
    keep their initial values.

    Args:
        backbone: The network to load into.
        path: A file of weights or the folder of a run.

    Returns:
        The keys that were loaded and those that were not.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is refused, or not one parameter fits.
    """
    state, _ = read_state_dict(path)
    report = _compare(state, backbone.state_dict())
    parameters = {name for name, _ in backbone.named_parameters()}
    if parameters.isdisjoint(report.matched):
        raise WeightsError(
            f"nothing in {path} fits the backbone, so this would train from scratch: {report}. "
            "Give the weights of the same network, or take init_backbone out of the config"
        )
    backbone.load_state_dict({key: state[key] for key in report.matched}, strict=False)
    return report


def _find_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / MODEL_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"the folder {path} has no {MODEL_FILE}: give the output folder of a run that has "
                "saved its model, or the file itself"
            )
    elif not file.is_file():
        raise FileNotFoundError(f"there is no file or run folder {path}")
    return file


def _refusal(file: Path, error: Exception) -> WeightsError:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return WeightsError(
            f"{file} is refused: unpickling it would call {asked[1]}, and code in a file of "
            f"weights may do anything. Have {_SAVE_WEIGHTS}"
        )
    # None of torch's own text, which advises weights_only=False, is passed on.
    if "TorchScript" in str(error):
        return WeightsError(
            f"{file} is refused: it is a TorchScript program, and a program may do anything. "
            f"Have {_SAVE_WEIGHTS}"
        )
    return WeightsError(
        f"{file} is refused: it is no file of torch.save, or it is damaged "
        f"({type(error).__name__}). Copy it again, or have {_SAVE_WEIGHTS}"
    )


def _plain_state_dict(content: Any, where: str) -> OrderedDict[str, Tensor]:
    """Return `content` under plain keys, after a check that it holds names and tensors."""
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{where} holds {type(content).__name__}, not a state dict (names and tensors)"
        )
    state: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{where} is not a state dict: under {key!r} it has {type(value).__name__}, not a "
                f"tensor. Weights may be at the top or under {' or '.join(_NESTED)}"
            )
        plain = _plain_key(key)
        if plain in state:
            raise WeightsError(f"{where} has {plain!r} twice once prefixes are taken off")
        state[plain] = value
    return state


def _plain_key(key: str) -> str:
    key = key.replace("_orig_mod.", "")  # torch.compile's prefix may stand anywhere
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _plain_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    plain = {**asdict(metadata), "options": dict(metadata.options)}
    for name, value in [*plain.items(), *plain["options"].items()]:
        # Anything else, such as a NumPy number, would make `read_plain_file` refuse the file.
        numbers = value if name in ("mean", "std") and type(value) is tuple else (value,)
        kinds = (str, int, float, bool, type(None))
        if name != "options" and not all(type(number) in kinds for number in numbers):
            raise WeightsError(
                f"metadata {name}={value!r} is a {type(value).__name__}: make it a str, int, "
                "float, bool or None"
            )
    return {**plain, "format": _FORMAT}


def _metadata_of(content: Any, file: Path) -> ModelMetadata | None:
    plain = getattr(content, _ATTRIBUTE, None)
    if plain is None:
        return None
    if (
        not isinstance(plain, Mapping)
        or not isinstance(plain.get("network"), str)
        or not isinstance(plain.get("options", {}), Mapping)
    ):
        raise WeightsError(f"{file} has damaged metadata ({plain!r}): save the model again")
    if plain.get("format") != _FORMAT:
        raise WeightsError(
            f"{file} has metadata of format {plain.get('format')!r}, this version reads "
            f"{_FORMAT}: load it with the version that wrote it ({plain.get('trained_with')})"
        )
    known = {f.name for f in fields(ModelMetadata)}
    return ModelMetadata(**{key: value for key, value in plain.items() if key in known})


def _metadata_from_weights(
    state: Mapping[str, Tensor], network: str, path: str | os.PathLike[str]
) -> ModelMetadata:
    """Derive the sizes from weights without metadata; assume usual image size and normalization."""
    family = backbone_class(network)
    embedding, stem = state.get(family.EMBEDDING_KEY), state.get(family.STEM_KEY)
    if embedding is None or stem is None or embedding.ndim != 1 or stem.ndim != 4:
        raise WeightsError(
            f"{path} does not fit the network {network!r}, which has {family.STEM_KEY} and "
            f"{family.EMBEDDING_KEY}; {_list('keys are in the file', state)}. Is it another "
            f"network? Names: {', '.join(model_names())}"
        )
    return ModelMetadata(
        network,
        num_features=embedding.shape[0],
        input_size=family.INPUT_SIZE,
        in_channels=stem.shape[1],
        mean=family.MEAN,
        std=family.STD,
    )


def _compare(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> MatchReport:
    common = [key for key in wanted if key in state]
    return MatchReport(
        matched=tuple(key for key in common if state[key].shape == wanted[key].shape),
        skipped=tuple(
            (key, tuple(state[key].shape), tuple(wanted[key].shape))
            for key in common
            if state[key].shape != wanted[key].shape
        ),
        missing=tuple(key for key in wanted if key not in state),
        unexpected=tuple(key for key in state if key not in wanted),
    )


def _list(what: str, items: Any) -> str:
    items = list(items)
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {what}: {', '.join(items[:_SHOWN])}{more}"


def _show_shapes(skipped: tuple[str, tuple[int, ...], tuple[int, ...]]) -> str:
    key, in_file, in_model = skipped
    return f"{key} (file {list(in_file)}, model {list(in_model)})"
