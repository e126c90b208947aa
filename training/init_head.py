"""`init_head=RUN`: class centers of an earlier run, matched by name, for a new set of classes.

    kept      both runs know the name     its K centers and their optimizer state, bit for bit
    new       only this run does          the mean of its images' normalized embeddings, as long as
                                          the kept centers are on average; state zero
    dropped   only the earlier run did    nothing

A class without images, or without a name (padding), keeps its random center. Two equal sub-centers
would stay equal, so the K centers of a new class are the mean, each tilted in its own direction by
about SUB_CENTER_TILT radians.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcshard.partial_fc import PartialFC
from arcshard.shard import class_range
from data.prefetch import OrderedPrefetch
from dataset import DataLoader
from training.build import TrainComponents
from training.checkpoint.checkpointer import RankGroup
from training.checkpoint.class_centers import (
    SavedClassCenters,
    match_names,
    names_of_this_run,
    open_class_centers,
    rows_of,
)
from utils.errors import UserError

logger = logging.getLogger("train")

IMAGES_PER_CLASS = 16  # the mean of 16 embeddings is close to that of all, at less cost
SUB_CENTER_TILT = 0.1
CLASSES_PER_ROUND = 1024  # all ranks embed these together, then the owners get the means
SECONDS_BETWEEN_LINES = 10.0


def init_head(
    path: str,
    parts: TrainComponents,
    ranks: RankGroup,
    *,
    has_backbone: bool,
    batch_size: int,
    num_workers: int,
) -> None:
    """Fill the head of a new run; all ranks call this together.

    Args:
        path: The earlier run, or one of its checkpoints.
        parts: Parts of this run, with the backbone as it will start.
        ranks: The ranks.
        has_backbone: Whether the backbone has trained weights (init_backbone).
        batch_size: Images that are embedded at a time.
        num_workers: Threads that decode them.

    Raises:
        UserError: The head or its sizes do not fit, or no class is known. Raised on every rank.
        CheckpointError: The checkpoint cannot be used.
        DataError: Classes have no names, or a name stands for two classes.
    """
    head = parts.head
    if not isinstance(head, PartialFC):
        raise UserError(
            f"init_head={path!r}: this head is a layer of its own (parallel_dim or label_smoothing)"
            " and has no rows per class to fill: parallel_dim=1 and label_smoothing=0 have them"
        )
    if not has_backbone:
        logger.warning(
            "init_head=%r without init_backbone: its class centers belong to that run's backbone, "
            "and this one starts at random; you probably want init_backbone=%r too",
            path,
            path,
        )
    names = names_of_this_run(parts.loader.source, f"init_head={path!r}")
    saved = open_class_centers(path, "init_head", ranks)
    _check_sizes(path, head, saved)
    of_class = match_names(names, saved.names, ("this run", path))
    is_kept = of_class >= 0
    has_name = np.array([bool(name) for name in names])
    if not is_kept.any():
        raise UserError(
            f"init_head={path!r}: no class of this run is one of that run (here {_few(names)}; "
            f"there {_few(saved.names)}), so every center would be a new one. Give the run whose "
            "classes these are, or take init_head out of the config"
        )
    ranks.run_on_all_ranks(lambda: _take_over(head, saved, of_class))
    new = np.flatnonzero(has_name & ~is_kept)
    kept_names = sum(map(bool, saved.names)) - int(is_kept.sum())
    logger.info(
        "init_head %s: %d kept, %d new, %d dropped", path, is_kept.sum(), len(new), kept_names
    )
    if len(new):
        length = _mean_length(head, is_kept, ranks)
        means = _Means(parts, new, ranks, batch_size, num_workers)
        without = sum(_fill(head, classes, found, length) for classes, found in means)
        if without:
            logger.warning(
                "init_head: %d new classes have no image and keep a random center", without
            )


def _check_sizes(path: str, head: PartialFC, saved: SavedClassCenters) -> None:
    wanted = [head.embedding_size, head.centers_per_class]
    found = [saved.embedding_size, saved.centers_per_class]
    if found != wanted:
        raise UserError(
            f"init_head={path!r}: its class centers have embedding_size={found[0]}, "
            f"sub_centers={found[1]}; this run has embedding_size={wanted[0]}, sub_centers="
            f"{wanted[1]}: set them as they were, or take init_head out of the config"
        )


def _take_over(head: PartialFC, saved: SavedClassCenters, of_class: np.ndarray) -> None:
    """Copy this rank's kept rows, and their optimizer state where the keys are the same."""
    mine = head.class_range
    there = of_class[mine.start : mine.stop]  # there may be fewer names than classes
    here = np.flatnonzero(there >= 0)
    rows_here, rows_there = (rows_of(each, head.centers_per_class) for each in (here, there[here]))
    for parameter, rule in head.optimized_parameters():
        name = "head/weight" if parameter is head.weight else "head/bias"
        if name not in saved.tensors:
            logger.warning("init_head: %s has no %s: it starts at zero", saved.path, name)
            continue
        targets = {name: parameter.detach()}
        state = rule.state(parameter)
        if saved.state_keys(name) >= state.keys():
            targets |= {f"{name}/{key}": value for key, value in state.items()}
        else:
            logger.warning(
                "init_head: this run's optimizer keeps %s of %s, that of %s kept %s: the centers "
                "are taken over, their optimizer state starts at zero",
                sorted(state),
                name,
                saved.path,
                sorted(saved.state_keys(name)) or "nothing",
            )
        saved.copy_rows(targets, rows_there, rows_here)


def _mean_length(head: PartialFC, is_kept: np.ndarray, ranks: RankGroup) -> float:
    """Return the mean norm of all kept centers."""
    mine = head.class_range
    here = np.flatnonzero(is_kept[mine.start : mine.stop])
    total, count = 0.0, len(here) * head.centers_per_class
    for part in np.array_split(here, -(-len(here) // 65_536) or 1):
        rows = torch.from_numpy(rows_of(part, head.centers_per_class)).to(head.weight.device)
        norms = torch.linalg.vector_norm(head.weight.detach()[rows].double(), dim=1)
        total += float(norms.sum())
    totals, counts = zip(*ranks.gather((total, count)), strict=True)
    return float(sum(totals) / sum(counts))


@torch.no_grad()
def _fill(head: PartialFC, classes: np.ndarray, means: Tensor, length: float) -> int:
    """Write the centers of this rank's share of new classes.

    Args:
        head: The head.
        classes: New classes of all ranks, int64 [n].
        means: Means of their normalized embeddings [n, D], zero where a class has no image.
        length: Norm of the new centers.

    Returns:
        The number of these classes that have no image.
    """
    has_image = means.abs().sum(dim=1) > 0
    mine = (classes >= head.class_range.start) & (classes < head.class_range.stop)
    chosen = has_image & torch.from_numpy(mine)
    local = classes[chosen.numpy()] - head.class_range.start
    k, width = head.centers_per_class, head.embedding_size
    rows = torch.from_numpy(rows_of(local, k)).to(head.weight.device)
    centers = normalize(means[chosen])[:, None].expand(-1, k, -1).reshape(-1, width)
    if k > 1:
        apart = normalize(head.weight.detach()[rows].to("cpu", centers.dtype))
        centers = normalize(centers + SUB_CENTER_TILT * apart)
    filled = (centers * length).to(head.weight.device, head.weight.dtype)
    head.weight.detach().index_copy_(0, rows, filled)
    return int((~has_image).sum())


class _Means:
    """Mean normalized embeddings of the new classes, a round of classes at a time, on all ranks.

    New classes mostly come at the end of a set, where one rank would own all of them. Therefore all
    ranks share every round.
    """

    def __init__(
        self,
        parts: TrainComponents,
        classes: np.ndarray,
        ranks: RankGroup,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.parts, self.classes, self.ranks = parts, classes, ranks
        self.batch_size, self.num_workers = batch_size, num_workers

    def __iter__(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield classes and their means [n, D]; a mean is zero where a class has no image."""
        starts = range(0, len(self.classes), CLASSES_PER_ROUND)
        rounds = [self.classes[start : start + CLASSES_PER_ROUND] for start in starts]
        shares = [self._share(each) for each in rounds]
        images = _images_of(np.concatenate(shares), self.parts.loader)
        last = time.monotonic()
        done = 0
        for classes, share in zip(rounds, shares, strict=True):
            mine = [images[label] for label in share.tolist()]
            yield classes, torch.cat(self.ranks.run_on_all_ranks(partial(self._embed, mine)))
            done += len(classes)
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                logger.info("init_head: %d of %d new classes embedded", done, len(self.classes))

    def _share(self, classes: np.ndarray) -> np.ndarray:
        mine = class_range(len(classes), self.ranks.rank, self.ranks.world_size)
        return classes[mine.start : mine.stop]

    def _embed(self, images: list[np.ndarray]) -> Tensor:
        """Compute the sums [n, D] of the normalized embeddings of each class, in host memory."""
        numbers = np.concatenate([np.empty(0, np.int64), *images])
        owner = np.repeat(np.arange(len(images)), [len(each) for each in images])
        width = self.parts.head.embedding_size
        sums = torch.zeros(len(images), width, dtype=torch.float64)
        starts = range(0, len(numbers), self.batch_size)
        loader = self.parts.loader

        def load(step: int) -> tuple[list[int], list[np.ndarray]]:
            begin = step * self.batch_size
            rows = range(begin, min(begin + self.batch_size, len(numbers)))
            read = [(row, _read(loader, int(numbers[row]))) for row in rows]
            there = [(row, image) for row, image in read if image is not None]
            return [row for row, _ in there], [image for _, image in there]

        for rows, pixels in OrderedPrefetch(load, range(len(starts)), self.num_workers):
            if rows:
                batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
                unit = normalize(self.parts.embedder(batch).double()).cpu()
                sums.index_add_(0, torch.from_numpy(owner[rows]), unit)
        if not bool(torch.isfinite(sums).all()):
            raise UserError(
                "init_head: the backbone gives embeddings that are not finite; is init_backbone "
                "what it should be?"
            )
        return sums  # the means up to their lengths, which are set later


def _images_of(classes: np.ndarray, loader: DataLoader) -> dict[int, np.ndarray]:
    """Return the first IMAGES_PER_CLASS images of each class, by class."""
    wanted = np.zeros(loader.num_classes, bool)
    wanted[classes] = True
    labels = loader.source.labels()
    images = np.flatnonzero(wanted[labels])
    its_label = np.asarray(labels[images])
    order = np.argsort(its_label, kind="stable")
    images, its_label = images[order], its_label[order]
    starts = np.searchsorted(its_label, classes)
    ends = np.searchsorted(its_label, classes, side="right")
    return {
        label: images[start : min(end, start + IMAGES_PER_CLASS)]
        for label, start, end in zip(classes.tolist(), starts.tolist(), ends.tolist(), strict=True)
    }


def _read(loader: DataLoader, index: int) -> np.ndarray | None:
    """Read an image without augmentation; None for a bad record that is skipped."""
    try:
        return loader.plain_image(index)
    except UserError as error:
        if not loader.skips_bad_records:
            raise
        logger.error("init_head: bad record skipped: %s", error)
        return None


def _few(names: list[str]) -> str:
    shown = [repr(name) for name in names if name][:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")
