"""The state of a run of arcface_torch, read from every rank's checkpoint_gpu_<rank>.pt.

Each of these files has the backbone of that rank, its part of the class centers, and the state of
one optimizer for both, by numbers: the parameters of the backbone in order, then the centers.

Older versions left rank_<rank>_softmax_weight.pt (and _mom.pt) beside a backbone.pth instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.weights import WeightsError, read_plain_file, read_state_dict

_CHECKPOINT = re.compile(r"checkpoint_gpu_(\d+)\.pt")
_CENTERS = re.compile(r"rank_(\d+)_softmax_weight\.pt")
_BACKBONES = ("backbone.pth", "model.pt")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_NOT_BY_ELEMENT = ("step",)  # one number per parameter, not a tensor of its shape


@dataclass(frozen=True)
class ArcfaceTorchRun:
    """The state that a run of arcface_torch saved.

    Attributes:
        world_size: Number of its ranks.
        epoch: Finished epochs, None if its files do not say.
        backbone: State dict by rank; a single one where the statistics of each rank were not saved.
        centers: Class centers by rank, fp32 [C_local, D].
        backbone_state: Name of a parameter -> {optimizer's key: tensor}. It is that of rank 0,
            because all are the same.
        center_state: {optimizer's key: tensor} by rank. It is empty where it does not fit the
            centers (a sampled head keeps that of its last sample only).
    """

    world_size: int
    epoch: int | None
    backbone: Sequence[Mapping[str, Tensor]]
    centers: list[Tensor]
    backbone_state: dict[str, dict[str, Tensor]]
    center_state: list[dict[str, Tensor]]

    @property
    def num_classes(self) -> int:
        """Classes over all ranks."""
        return sum(len(part) for part in self.centers)


def read_run(folder: Path) -> ArcfaceTorchRun:
    """Read all ranks' files of a run's folder; tensors stay on disk where the files allow that.

    Raises:
        WeightsError: Files are missing, damaged, unsafe, or do not belong together.
    """
    files = _by_rank(folder, _CHECKPOINT)
    run = _from_checkpoints(files) if files else _from_centers(folder)
    classes, width = run.num_classes, run.centers[0].shape[1]
    for rank, part in enumerate(run.centers):
        # arcface_torch cuts C // n classes per rank and one more on the first C % n
        share = classes // run.world_size + (rank < classes % run.world_size)
        if part.shape != (share, width):
            raise WeightsError(
                f"{folder}: rank {rank} of {run.world_size} holds centers of shape "
                f"{list(part.shape)}, but of {classes} classes in all it would hold "
                f"{[share, width]}: is a rank's file missing, or of another run?"
            )
    return run


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the files whose names match, ordered by rank; none in between may be missing."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder: give the output folder of the old run")
    found = {int(m[1]): path for path in folder.iterdir() if (m := pattern.fullmatch(path.name))}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys())
    if missing:
        raise WeightsError(
            f"{folder} has {len(found)} files like {found[max(found)].name}, but none of ranks "
            f"{missing[:8]}: every rank's class centers are needed. Copy them from all machines"
        )
    return [found[rank] for rank in sorted(found)]


def _from_checkpoints(files: list[Path]) -> ArcfaceTorchRun:
    backbones, centers, center_state, epochs = [], [], [], set()
    backbone_state: dict[str, dict[str, Tensor]] = {}
    for path in files:
        content = read_plain_file(path, mmap=True)
        backbone = _part(content, "state_dict_backbone", path)
        head = _part(content, "state_dict_softmax_fc", path)
        weight = _matrix(head.get("weight"), f"{path}: state_dict_softmax_fc/weight")
        by_name, of_head = _optimizer_state(content, backbone, weight, path)
        backbones.append({key: _tensor(value, f"{path}: {key}") for key, value in backbone.items()})
        centers.append(weight)
        center_state.append(of_head)
        backbone_state = backbone_state or by_name
        epochs.add(content.get("epoch"))
    if len(epochs) != 1 or not isinstance(next(iter(epochs)), int):
        raise WeightsError(
            f"the files {files[0].name} ... of {files[0].parent} are of epochs "
            f"{sorted(map(str, epochs))}: they were not written at the same moment"
        )
    if len({frozenset(state) for state in center_state}) > 1:
        center_state = [{} for _ in files]
    return ArcfaceTorchRun(
        len(files), next(iter(epochs)), backbones, centers, backbone_state, center_state
    )


def _from_centers(folder: Path) -> ArcfaceTorchRun:
    files = _by_rank(folder, _CENTERS)
    backbone = next((folder / name for name in _BACKBONES if (folder / name).exists()), None)
    if not files:
        hint = (
            f"; {backbone.name} alone has no class centers: start a new run with "
            f"init_backbone={backbone}"
            if backbone
            else ""
        )
        raise WeightsError(f"{folder} has no checkpoint_gpu_<rank>.pt{hint}")
    if backbone is None:
        raise WeightsError(f"{folder} has class centers but neither of {', '.join(_BACKBONES)}")
    centers, state = [], []
    for path in files:
        centers.append(_matrix(read_plain_file(path, mmap=False), str(path)))
        momentum = path.with_name(path.name.replace("weight.pt", "weight_mom.pt"))
        kept = {}
        if momentum.exists():
            kept["momentum_buffer"] = _matrix(read_plain_file(momentum), str(momentum))
            if kept["momentum_buffer"].shape != centers[-1].shape:
                raise WeightsError(f"{momentum} does not have the shape of {path}")
        state.append(kept)
    if len({frozenset(kept) for kept in state}) > 1:
        raise WeightsError(f"{folder} has the centers' momentum of some ranks only")
    return ArcfaceTorchRun(len(files), None, [read_state_dict(backbone)[0]], centers, {}, state)


def _optimizer_state(
    content: Mapping[str, Any], backbone: Mapping[str, Tensor], centers: Tensor, path: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the optimizer state of the backbone by names, and that of the centers.

    Parameters that were never stepped have none.
    """
    saved = _part(content, "state_optimizer", path)
    try:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states = dict(saved["state"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: state_optimizer is not of torch.optim") from error
    names = [name for name in backbone if name.rpartition(".")[2] not in _BUFFERS]
    if len(numbers) != len(names) + 1:
        raise WeightsError(
            f"{path}: its optimizer has {len(numbers)} parameters, its backbone {len(names)} and "
            "its head one: they do not belong together"
        )
    by_name: dict[str, dict[str, Tensor]] = {}
    for number, name in zip(numbers, names, strict=False):
        kept = _averages(states.get(number, {}), f"{path}: optimizer of {name}")
        for key, value in kept.items():
            if key not in _NOT_BY_ELEMENT and value.shape != backbone[name].shape:
                raise WeightsError(
                    f"{path}: {key} of {name} has the shape {list(value.shape)}, the parameter "
                    f"{list(backbone[name].shape)}"
                )
        if kept:
            by_name[name] = kept
    of_head = _averages(states.get(numbers[-1], {}), f"{path}: optimizer of the centers")
    fits = all(v.shape == centers.shape for k, v in of_head.items() if k not in _NOT_BY_ELEMENT)
    return by_name, of_head if fits else {}


def _averages(state: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise WeightsError(f"{where} is {type(state).__name__}, not a state of torch.optim")
    return {
        str(key): torch.as_tensor(value, dtype=torch.float32)
        for key, value in state.items()
        if isinstance(value, (Tensor, int, float))
    }


def _part(content: Any, key: str, path: Path) -> Mapping[str, Any]:
    part = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(part, Mapping) or not part:
        raise WeightsError(f"{path} has no {key}: it is no checkpoint_gpu file of arcface_torch")
    return part


def _tensor(value: Any, where: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise WeightsError(f"{where} is {type(value).__name__}, not a tensor")
    return value


def _matrix(value: Any, where: str) -> Tensor:
    matrix = _tensor(value, where)
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise WeightsError(
            f"{where} is {matrix.dtype} of shape {list(matrix.shape)}, not class centers [C, D]"
        )
    return matrix.float()
