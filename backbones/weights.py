"""model.pt: a plain state dict any tool can load, that also knows which network it belongs to.

The file is what arcface_torch writes, an ordered dict of tensors under the published names, so
`net.load_state_dict(torch.load("model.pt"))` works anywhere. What the network is and what images it
wants rides along as an attribute of that dict, which foreign tools do not see.
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

logger = logging.getLogger(__name__)

MODEL_FILE = "model.pt"  # its name inside a run folder
_ATTRIBUTE = "_arcshard"  # of the saved dict; torch.load(weights_only=True) keeps it
_FORMAT = 1
# Where checkpoints of arcface_torch and of common trainers keep the weights.
_NESTED = ("state_dict", "state_dict_backbone")
# DDP's, and those of models that hold backbone and head. "features." alone is no such prefix:
# IResNet has a layer of that name.
_PREFIXES = ("module.", "backbone.", "features.module.")
_CLASSIFIERS = ("arcface_linear.",)  # of TorchShard's checkpoints: the classes' layer behind it
_SHOWN = 4  # keys named in an error
_SAVE_WEIGHTS = "the weights alone saved, as torch.save(net.state_dict(), path)"


class WeightsError(RuntimeError):
    """A file of weights cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class ModelMetadata:
    """What one must know beside the weights to use them.

    Attributes:
        network: a name of `backbones.model_names()`.
        num_features: size of the embedding.
        input_size: height and width of the images, pixels.
        in_channels: channels of the images.
        mean: subtracted from every pixel (0..255); one number, or one per RGB channel.
        std: then divided by; likewise.
        color: order of the channels.
        step: optimizer steps of the training so far.
        epoch: epochs finished.
        config: name of the run's config.
        trained_with: name and version of the trainer.
        options: further arguments of `get_model`, where the network was built with any.
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

    @property
    def embedding_size(self) -> int:
        """The same as `num_features`, by the config's name."""
        return self.num_features


@dataclass(frozen=True)
class MatchReport:
    """What `load_matching` did, key by key.

    Attributes:
        matched: keys loaded.
        skipped: (key, shape in the file, shape in the model) where the two shapes differ.
        missing: keys of the model that the file does not have: they keep their initial values.
        unexpected: keys of the file that the model does not have.
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
    """Write weights and metadata to `path`, whole or not at all.

    The file appears under its name only when it is complete and on disk. Prefixes of DDP and
    torch.compile are taken off the keys; every tensor is a contiguous CPU copy with its own
    storage. The folder is made if it is not there.

    Returns:
        The path written.

    Raises:
        WeightsError: the state dict holds something else than tensors, or the metadata something
            else than plain values.
        OSError: the file cannot be written.
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
    # In the same folder, because a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            _serialize(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # gone already unless something failed
    return path


def _serialize(state: OrderedDict[str, Tensor], file: BinaryIO) -> None:
    """torch.save, whose errors say why the disk refused: torch's writer turns an OSError into a
    RuntimeError about positions.
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
    """The weights in a file or run folder, on the CPU under plain keys, and their metadata if any.

    Only tensors and plain values are ever unpickled: a file that asks for more is refused, because
    unpickling it could run code. Checkpoints that keep the weights under `state_dict` or
    `state_dict_backbone` are opened; `module.`, `backbone.`, `features.module.`, `_orig_mod.` are
    taken off the keys; a classifier that TorchShard kept beside the network is left out.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no model.pt.
        WeightsError: the file is broken, hostile, or no file of weights.
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
    """What torch.save wrote, if it is tensors and plain values; on the CPU.

    Args:
        mmap: leave the tensors on the disk until they are used (files of torch 1.6 and later).

    Raises:
        WeightsError: the file is broken or hostile.
        OSError: it cannot be read.
    """
    with open(file, "rb") as stream:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is no file of ours; refused below
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
    """The backbone of a model.pt (a file or a run folder), fp32 on `device`, in eval mode.

    Args:
        path: ours, or any state dict of arcface_torch.
        network: needed where the file has no metadata; elsewhere it must agree with it.
        num_features: embedding size, if it shall be checked; it is read off the weights.
        device: where the backbone goes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `network` is no backbone.
        WeightsError: the file is refused, says nothing about its network, or does not fit it.
    """
    if network is not None:
        backbone_class(network)  # a wrong name is said before a large file is read
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
    with torch.device("meta"):  # no memory and no time for initial values nobody will see
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

    For fine-tuning: another embedding size or image size leaves the layers it changes as they are.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is refused, or not one parameter fits.
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
    """`content` under plain keys, once it is known to be names and tensors."""
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
    key = key.replace("_orig_mod.", "")  # torch.compile's; it may stand anywhere
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _plain_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    plain = {**asdict(metadata), "options": dict(metadata.options)}
    for name, value in [*plain.items(), *plain["options"].items()]:
        # Anything else, a NumPy number for one, would make the file one that is refused.
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
    """The sizes a foreign file shows; image size and normalization are the usual ones."""
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
