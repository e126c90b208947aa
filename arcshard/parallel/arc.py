"""ArcFace and its family as a parallel layer of cosines and a loss with the margin.

PartialFC is the column-parallel head for training: bounded memory, sampling, row updates. These two
classes are its simple form as layers of any model, equal to it in loss and gradients. They can also
split the embedding instead of the classes (dim=0), which PartialFC cannot. Every rank then has all
classes with D / n numbers each, and the norm of a center is the sum of its ranks' squares: one
all-reduce of C numbers beside that of the logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from arcshard.head.cross_entropy import sharded_cross_entropy
from arcshard.margins.base import Margin
from arcshard.parallel.collectives import copy, reduce
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.linear import ParallelLinear
from arcshard.parallel.loss import local_columns, split_for, unknown_labels
from arcshard.parallel.split import ParallelDim, Split, check_sizes, local_part, mark_split

NORM_FLOOR = 1e-12  # as torch.nn.functional.normalize


class ParallelArcLinear(ParallelLinear):
    """Cosines of embeddings [B, D] with class centers [C, D], without a bias.

    Args:
        embedding_size: D.
        num_classes: C.
        dim: None for replicated, 0 for row parallel (the embedding is split), 1 or -1 for column
            parallel (the classes are split, as in PartialFC).
        process_group: Ranks that share the layer; None for the default group.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: `dim` or a size is outside its domain.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        dim: ParallelDim = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embedding_size,
            num_classes,
            False,
            dim,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Computes the cosines [B, C] of x [B, D]; for dim=1 those of this rank's classes."""
        unit, weight = normalize(x, dim=-1), local_part(self.weight)
        if self.dim is None:
            return mark_split(linear(unit, normalize(weight)), None)
        if self.dim == 1:
            return self.finish_columns(linear(copy(unit, self.group), normalize(weight)))
        products = reduce(linear(self.my_features(unit), weight), self.group)
        squares = reduce(weight.square().sum(dim=1), self.group)  # [C]
        # Clamped before the root, whose slope at 0 is infinite.
        norms = squares.clamp_min(NORM_FLOOR**2).sqrt()
        return mark_split((products / norms).to(products.dtype), None)


class ParallelArcLoss(nn.Module):
    """Margin softmax on the cosines of ParallelArcLinear, as the mean over the rows.

    Args:
        margin: A margin that reads only cosines, such as ArcFace or CosFace (losses.py).
        num_classes: C. Needed where the cosines do not come directly from a parallel layer.
        process_group: Group that belongs to num_classes; None for the default group.

    Raises:
        ValueError: The margin reads norms or the batch, does not normalize, or has a bias.
    """

    def __init__(
        self,
        margin: Margin,
        *,
        num_classes: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if margin.reads_norms or margin.reads_batch or not margin.normalize or margin.bias:
            raise ValueError(
                f"{type(margin).__name__} needs more than cosines (norms, the batch or a bias): "
                "PartialFC serves it; here ArcFace, CosFace, SphereFace or NormFace"
            )
        self.margin = margin
        self.split: Split | None = None
        if num_classes is not None:
            check_sizes(num_classes=num_classes)
            self.split = Split(1, num_classes, resolve_group(process_group))

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Computes the mean loss, the same on every rank.

        Args:
            cosines: [B, C], or this rank's columns of it.
            labels: [B] int64 in [0, C).

        Raises:
            ValueError: As in ParallelCrossEntropyLoss.
        """
        split = split_for(cosines, labels, self.split)
        mine = range(cosines.shape[1]) if split is None else split.mine
        num_classes = len(mine) if split is None else split.size
        unknown = unknown_labels(labels, num_classes, torch.zeros_like(labels, dtype=torch.bool))
        column = local_columns(labels, mine)
        with torch.autocast(cosines.device.type, enabled=False):
            wide = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
            logits = self.margin.logits(wide, column)
        group = None if split is None else split.several
        rows = sharded_cross_entropy(logits, column, group)
        return rows.masked_fill(unknown, torch.nan).mean()
