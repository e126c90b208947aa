"""Knowledge distillation: the run also learns from a frozen teacher (docs/distillation.md).

    cosine   mean of 1 - cos(student's embedding, teacher's)
    logits   T^2 KL of the student's class probabilities from the teacher's
             (arcshard/head/distillation.py)

Both are means over the global batch. As with the heads, `local_embeddings.grad` is the gradient of
that mean, without a factor of the world size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcshard.collectives import sum_over_ranks
from arcshard.head.distillation import DistillationInputs, TeacherCenters, sharded_divergence
from arcshard.head.workspace import Workspace
from arcshard.partial_fc import PartialFC
from backbones.weights import ModelMetadata, WeightsError, load_model
from data.datasets import ImageDataset
from training.checkpoint.checkpointer import FOLDER, CheckpointError, RankGroup
from training.checkpoint.class_centers import (
    match_names,
    names_of_this_run,
    open_class_centers,
    rows_of,
)
from training.precision import MixedPrecisionBackbone, Precision
from utils.distributed import DistContext
from utils.errors import UserError

logger = logging.getLogger("train")

WORK_SHARE = 1 / 8  # fraction of the head's workspace that the block of classes in work may use


class Teacher:
    """A frozen network that maps uint8 images to embeddings of length 1, in the run's precision.

    Args:
        path: A run's folder, or its model.pt.
        precision: The precision policy of the run.
        device: Device of this rank.

    Raises:
        WeightsError: The file is refused, or does not name its network.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: str, precision: Precision, device: torch.device) -> None:
        try:
            backbone, self.metadata = load_model(path)
        except WeightsError as error:
            raise WeightsError(
                f"teacher={path!r}: {error}. (A teacher's file has to say its network itself: "
                "backbones.weights.save_model writes such files)"
            ) from error
        self.path, self.precision = path, precision
        mean, std = self.metadata.mean, self.metadata.std
        model = MixedPrecisionBackbone(backbone, precision, mean=mean, std=std)
        model.place(device)
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 RGB images [b, 3, H, W] to embeddings [b, D]."""
        images = images.flip(1) if self.metadata.color == "BGR" else images
        return normalize(self.model(images))


class CosineDistillation:
    """Mean of 1 - cosine over the global batch.

    Args:
        teacher: The teacher, whose embeddings have the size of the student's.
        head: The head of the run, which knows the ranks.
        weight: Weight of this loss in the sum.
    """

    def __init__(self, teacher: Teacher, head: PartialFC, weight: float) -> None:
        self.teacher, self.head, self.weight = teacher, head, weight

    def __call__(self, images: Sequence[Tensor], local_embeddings: Tensor) -> Tensor:
        """Compute the loss without its weight; it is the same number on every rank.

        Args:
            images: The micro-batches, uint8 [b_i, 3, H, W].
            local_embeddings: Their embeddings one after the other, [b, D].
        """
        taught = torch.cat([self.teacher(each) for each in images])
        unit = normalize(local_embeddings.to(self.head.work_dtype))
        apart = 1 - (unit * taught.to(unit.dtype)).sum(dim=1)
        mine = torch.stack([apart.detach().sum(), apart.new_full((), len(apart))])
        total, count = sum_over_ranks(mine, self.head.group)
        local = apart.sum() / count
        return local + (total / count - local.detach())  # the global value, the local gradient


class LogitsDistillation:
    """Divergence of class probabilities over the classes that the teacher knows.

    Args:
        teacher: Maps images to embeddings of any size, of length 1.
        centers: The teacher's class centers for this rank's classes.
        head: The head of the run. Its sampled centers are compared with those of the teacher.
        weight: Weight of this loss in the sum.
        scale: Scale s of both logits.
        temperature: Temperature T.
        budget_bytes: Bytes of the block of classes in work.
        half: dtype of the operands of the large matmuls, None for full precision.
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Tensor],
        centers: TeacherCenters,
        head: PartialFC,
        *,
        weight: float,
        scale: float,
        temperature: float,
        budget_bytes: int,
        half: torch.dtype | None,
    ) -> None:
        self.teacher, self.centers, self.head, self.weight = teacher, centers, head, weight
        self.scale, self.temperature = scale, temperature
        self.budget_bytes, self.half = budget_bytes, half

    def __call__(self, images: Sequence[Tensor], local_embeddings: Tensor) -> Tensor:
        """Compute the loss as CosineDistillation does, over class probabilities.

        Call it between the head's forward, which samples the classes of the step, and its backward,
        which may update their centers.
        """
        taught = torch.cat([self.teacher(each) for each in images])
        unit = normalize(local_embeddings.to(self.head.work_dtype))
        student, classes = self.head.sampled_centers()
        assert self.head.batch_size_per_rank is not None
        sides = DistillationInputs(
            student,
            self.head.centers_per_class,
            classes,
            self.centers,
            self.scale,
            self.temperature,
            self.head.batch_size_per_rank,
            self.head.group,
            self.budget_bytes,
            self.half,
        )
        return sharded_divergence(unit, taught, sides)


def block_budget(workspace: Workspace) -> int:
    """Return the bytes that `logits` may use for the block of classes in work."""
    return int(workspace.budget_bytes * WORK_SHARE)


Distillation = CosineDistillation | LogitsDistillation


def load_teacher(
    path: str,
    kind: str,
    precision: Precision,
    device: torch.device,
    *,
    input_size: int,
    embedding_size: int,
) -> Teacher:
    """Load the teacher at `path`, if this run can learn from it.

    Args:
        path: A run's folder, or its model.pt.
        kind: "cosine" or "logits".
        precision: The precision policy of the run.
        device: Device of this rank.
        input_size: Height and width of the run's images in pixels.
        embedding_size: Size of the run's embeddings.

    Returns:
        The teacher on `device`.

    Raises:
        UserError: The teacher's images or embeddings are not those of the run.
        WeightsError: The file is refused, or does not name its network.
        FileNotFoundError: There is no such file.
    """
    teacher = Teacher(path, precision, device)
    meta = teacher.metadata
    if (meta.input_size, meta.in_channels) != (input_size, 3):
        raise UserError(
            f"teacher={path!r} takes images of {meta.input_size} pixels, {meta.in_channels} "
            f"channels; this run has {input_size} pixels, 3 channels: both see the same images, so "
            f"set input_size={meta.input_size} or choose another teacher"
        )
    if kind == "cosine" and meta.num_features != embedding_size:
        raise UserError(
            f"teacher={path!r} has embeddings of size {meta.num_features}, this run "
            f"{embedding_size}: cosines need one size; set embedding_size="
            f"{meta.num_features}, or distillation=logits, which compares class probabilities"
        )
    return teacher


def make_distillation(
    kind: str,
    teacher: Teacher,
    head: PartialFC,
    source: ImageDataset,
    world: DistContext,
    *,
    weight: float,
    scale: float,
    temperature: float,
    workspace: Workspace,
) -> Distillation:
    """Make the loss by which the run learns from the teacher; all ranks call this together.

    Args:
        kind: "cosine" or "logits".
        teacher: The teacher.
        head: The head of the run.
        source: The training set, for the names of its classes.
        world: This process among the ranks.
        weight: Weight of the loss, from the config.
        scale: Scale s of the logits, from the config.
        temperature: Temperature T, from the config.
        workspace: Workspace of the head.

    Returns:
        The loss.

    Raises:
        CheckpointError: The teacher has no class centers, or they do not fit.
        DataError: Classes have no names, or a name stands for two classes.
    """
    path, network = teacher.path, teacher.metadata.network
    if kind == "cosine":
        logger.info("teacher %s (%s): cosine, weight %g", path, network, weight)
        return CosineDistillation(teacher, head, weight)
    centers, num_known = _centers_of(path, teacher.metadata, head, source, world)
    logger.info(
        "teacher %s (%s): logits, temperature %g, weight %g; it knows %d of the classes",
        path,
        network,
        temperature,
        weight,
        num_known,
    )
    return LogitsDistillation(
        teacher,
        centers,
        head,
        weight=weight,
        scale=scale,
        temperature=temperature,
        budget_bytes=block_budget(workspace),
        half=teacher.precision.head_matmul,
    )


def _centers_of(
    path: str, meta: ModelMetadata, head: PartialFC, source: ImageDataset, world: DistContext
) -> tuple[TeacherCenters, int]:
    """Load the teacher's centers for this rank's classes by name, and count all known classes."""
    run = Path(path)
    own = run / FOLDER / f"step_{meta.step or 0:08d}"  # the checkpoint of the weights in model.pt
    names = names_of_this_run(source, "distillation='logits'")
    ranks = RankGroup(world)
    saved = open_class_centers(str(own if own.is_dir() else run), "teacher", ranks)
    if saved.path.name != own.name:
        logger.warning(
            "teacher=%r: its weights are of step %s, its class centers of %s",
            path,
            meta.step,
            saved.path.name,
        )
    if saved.embedding_size != meta.num_features:
        raise CheckpointError(
            f"teacher={path!r}: its class centers have width {saved.embedding_size}, its "
            f"embeddings {meta.num_features}: they are not of one run"
        )
    of_class = match_names(names, saved.names, ("this run", path))
    if not (of_class >= 0).any():
        raise CheckpointError(
            f"teacher={path!r} knows no class of this run by name, so it has no class "
            "probabilities to teach: distillation=cosine compares embeddings instead"
        )
    mine = head.class_range
    there = of_class[mine.start : mine.stop]
    here = np.flatnonzero(there >= 0)
    k = saved.centers_per_class
    weight = torch.zeros(
        head.num_classes_local * k,
        meta.num_features,
        dtype=head.work_dtype,
        device=head.weight.device,
    )
    rows_there, rows_here = rows_of(there[here], k), rows_of(here, k)
    ranks.run_on_all_ranks(lambda: saved.copy_rows({"head/weight": weight}, rows_there, rows_here))
    known = torch.zeros(head.num_classes_local, dtype=torch.bool)
    known[torch.from_numpy(here)] = True
    unit = normalize(weight, out=weight).view(head.num_classes_local, k, meta.num_features)
    return TeacherCenters(unit, known.to(weight.device)), int((of_class >= 0).sum())
