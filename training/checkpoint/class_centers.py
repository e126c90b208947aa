"""The class centers of another run, matched by the names of its classes.

A class's number has a meaning only inside its run, so classes are matched by name. A run saves its
names in label_map.txt. For a run without that file, the names are those of its training set, if
that is still the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.class_names import LABEL_MAP, class_names, label_map_text, read_label_map
from data.datasets import DataError, ImageDataset
from data.fingerprint import join_samples
from dataset import open_datasets
from training.checkpoint import sharded_io
from training.checkpoint.checkpointer import Checkpoint, CheckpointError, RankGroup
from training.checkpoint.resume import find_at
from training.checkpoint.sharded_io import StorageError, TensorShard
from utils.files import atomic_write

logger = logging.getLogger("train")

BLOCK_BYTES = 32 * 2**20
"""Most bytes of each tensor in memory at a time while rows are read."""


@dataclass(frozen=True)
class SavedClassCenters:
    """The head of a checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        names: Names of its classes by label, "" where a class has none.
        num_classes: Number of classes, padding included.
        tensors: Shape and dtype of every saved tensor of the head, by name.
        config: Config of its run.
    """

    path: Path
    names: list[str]
    num_classes: int
    tensors: Mapping[str, tuple[torch.Size, torch.dtype]]
    config: Mapping[str, Any]

    @property
    def centers_per_class(self) -> int:
        """Number K of centers per class."""
        return self.tensors["head/weight"][0][0] // self.num_classes

    @property
    def embedding_size(self) -> int:
        """Size D of the embedding."""
        return self.tensors["head/weight"][0][1]

    def state_keys(self, parameter: str) -> set[str]:
        """Return the keys of the optimizer state saved for a parameter ("head/weight")."""
        prefix = f"{parameter}/"
        return {name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)}

    @torch.no_grad()
    def copy_rows(
        self, targets: Mapping[str, Tensor], rows_there: np.ndarray, rows_here: np.ndarray
    ) -> None:
        """Copy saved rows into tensors of this run, each in the dtype it has here.

        This reads the blocks of rows that hold any wanted one, BLOCK_BYTES at a time. There is no
        collective: every rank reads for itself.

        Args:
            targets: Tensors [rows, ...] by the names of the saved ones.
            rows_there: Saved rows to read, int64 [n].
            rows_here: Rows of the targets that they go to, int64 [n].

        Raises:
            StorageError: The checkpoint cannot be read, or its rows have another size.
        """
        for name, target in targets.items():
            shape, _ = self.tensors[name]
            if shape[1:] != target.shape[1:] or shape[0] != self.tensors["head/weight"][0][0]:
                raise StorageError(
                    f"{self.path}: {name} was saved as {list(shape)}, which does not fit rows of "
                    f"{list(target.shape[1:])}"
                )
        order = np.argsort(rows_there, kind="stable")
        there, here = rows_there[order], rows_here[order]
        row_bytes = max(
            shape[1:].numel() * dtype.itemsize
            for shape, dtype in (self.tensors[name] for name in targets)
        )
        block = there // max(BLOCK_BYTES // row_bytes, 1)
        ends = [*(np.flatnonzero(np.diff(block)) + 1).tolist(), len(there)]
        for begin, end in zip([0, *ends], ends, strict=False):
            if begin == end:
                continue
            low, high = int(there[begin]), int(there[end - 1]) + 1
            read = {}
            for name in targets:
                shape, dtype = self.tensors[name]
                read[name] = TensorShard(
                    torch.empty(high - low, *shape[1:], dtype=dtype), low, shape[0]
                )
            sharded_io.read(self.path, read, None, is_alone=True)
            picked = torch.from_numpy(there[begin:end] - low)
            into = torch.from_numpy(here[begin:end])
            for name, target in targets.items():
                rows = read[name].local[picked].to(target.device, target.dtype)
                target.index_copy_(0, into.to(target.device), rows)


def open_class_centers(path: str, key: str, ranks: RankGroup) -> SavedClassCenters:
    """Open the head of a run's newest intact checkpoint, or of a given checkpoint.

    All ranks call this together.

    Args:
        path: A run's folder, its checkpoints folder or one checkpoint.
        key: Key of the config that named it, for errors.
        ranks: The ranks.

    Returns:
        The description of the head; its rows are not read yet.

    Raises:
        CheckpointError: There is none, or the names of its classes are not known.
        DataError: Its label map is damaged.
    """
    found = find_at(Path(path), ranks)
    if found is None:
        raise CheckpointError(
            f"{key}={path!r}: no usable checkpoint there. Give the folder of a run with "
            "checkpoints/ in it, or one step_... folder; model.pt alone has no class centers"
        )
    num_classes = int(found.manifest.facts["data"]["num_classes"])
    tensors = {n: t for n, t in sharded_io.describe(found.path).items() if n.startswith("head/")}
    shape, _ = tensors.get("head/weight", (torch.Size(), None))
    if len(shape) != 2 or num_classes < 1 or shape[0] % num_classes:
        raise CheckpointError(
            f"{key}={path!r}: {found.path} holds class centers {list(shape)} for {num_classes} "
            "classes, which does not fit"
        )
    names = _names(found, f"{key}={path!r}")
    if len(names) > num_classes:
        raise CheckpointError(
            f"{key}={path!r}: {found.path} has {num_classes} classes, and its label map names "
            f"{len(names)}: it belongs to another run"
        )
    return SavedClassCenters(
        found.path, names, num_classes, tensors, found.manifest.facts["config"]
    )


def match_names(here: Sequence[str], there: Sequence[str], whose: tuple[str, str]) -> np.ndarray:
    """Find for each class here the class of the same name there.

    Args:
        here: Class names of this run by label, "" for none.
        there: Class names of the other run by label, "" for none.
        whose: Names of both runs, for errors.

    Returns:
        Labels in the other run, int64 [len(here)], -1 for none.

    Raises:
        DataError: A name stands for two classes.
    """
    for names, owner in zip((here, there), whose, strict=True):
        first: dict[str, int] = {}
        for label, name in enumerate(names):
            if name and first.setdefault(name, label) != label:
                raise DataError(
                    f"the name {name!r} stands for classes {first[name]} and {label} of {owner}: "
                    "classes are matched by name, so names have to differ; rename one of them"
                )
    place = {name: label for label, name in enumerate(there) if name}
    return np.array([place.get(name, -1) for name in here], np.int64)


def rows_of(classes: np.ndarray, centers_per_class: int) -> np.ndarray:
    """Return the rows of a weight that hold the K centers of these classes, int64 [n K]."""
    return (classes[:, None] * centers_per_class + np.arange(centers_per_class)).reshape(-1)


def names_of_this_run(source: ImageDataset, key: str) -> list[str]:
    """Return the class names of a training set.

    Raises:
        DataError: It has none.
    """
    names = class_names(source)
    if names is None:
        raise DataError(
            f"{key} matches classes by name, and this run's training set names none: records need "
            f"{LABEL_MAP} (label, tab, name) beside them; class folders have their names"
        )
    return names


def remember_class_names(source: ImageDataset, folder: Path) -> None:
    """Write label_map.txt into a run's folder, if the set has names that can be written."""
    try:
        names = class_names(source)
        text = None if names is None else label_map_text(names)
    except DataError as error:
        logger.warning("this run will not know the names of its classes: %s", error)
        return
    if text is not None:
        with atomic_write(folder / LABEL_MAP) as file:
            file.write(text.encode())


def _names(found: Checkpoint, said: str) -> list[str]:
    """Return the class names of the run's label map, or else of its training set."""
    run = found.path.parent.parent
    names = read_label_map(run)
    if names is not None:
        return names
    rec = found.manifest.facts["config"].get("rec")
    why = f"and its training set, {rec}, names no class"
    try:
        source = _open_set(found.manifest.facts["config"])
        if join_samples(source.samples()) != found.manifest.facts["data set"]:
            why = f"and its training set, {rec}, has changed since"
        elif (names := class_names(source)) is not None:
            logger.info(
                "%s has no %s: the names of its classes are those of %s", run, LABEL_MAP, rec
            )
            return names
    except (DataError, OSError) as error:
        why = f"and its training set cannot be asked ({error})"
    raise CheckpointError(
        f"{said}: what its classes are called is not known: there is no {run / LABEL_MAP}, {why}. "
        f"Write that file, a line 'label<tab>name' for every class, in the order of its labels"
    )


def _open_set(config: Mapping[str, Any]) -> ImageDataset:
    """Open the training set of a run as the run did."""
    rec, exclude = config["rec"], config.get("exclude")
    roots = rec if isinstance(rec, list) else [rec]
    if config.get("task") == "classification" and rec != "synthetic":
        roots = [str(Path(rec) / "train")]
    lists = exclude if isinstance(exclude, list) else [exclude or "-"]
    num_classes, num_images = (
        None if config[key] == "auto" else int(config[key]) for key in ("num_classes", "num_image")
    )
    exclusions = [None if path == "-" else path for path in lists]
    return open_datasets(roots, config["input_size"], num_classes, num_images, exclusions)
