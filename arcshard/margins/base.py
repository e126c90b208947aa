"""The interface of a margin: a formula for the target's similarity, and one for the others'.

The loss over C classes, for similarities c_ij of embedding i and class j (cosines, or plain
products where a loss does not normalize):

    z_ij = s f(c_ij) for j != y_i,   z_iy = s phi(c_iy),   loss = mean_i (logsumexp_j z_ij - z_iy)

A margin defines phi with its slopes and, where it touches the other classes, f with its slope.
Nothing here knows of ranks, shards or blocks: the head calls `begin` and `target` once per batch
and `others` once per block of classes.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

GradientMode = Literal["exact", "straight_through"]
Context = Mapping[str, Tensor]

# Inside the derivative the cosine stays this far from +-1, where ArcFace's derivative is infinite.
DERIVATIVE_CLAMP = 1e-6


class BatchFacts(NamedTuple):
    """What a margin may know of the global batch before its classes are visited.

    Attributes:
        norms: [B] norms of the embeddings, None unless `reads_norms`.
        targets: [B] similarity of every row with its own class, None unless `reads_all_targets`.
        real: [B] boolean, False for padding rows.
        draw: Key of this step's random draws, the same on all ranks.
    """

    norms: Tensor | None
    targets: Tensor | None
    real: Tensor
    draw: int


class Margin(ABC):
    """A loss of the softmax family; the subclasses are frozen dataclasses of their settings.

    Attributes:
        scale: s.
        normalize: Whether embeddings and class centers are divided by their norms.
        bias: Whether every class has a bias that is added to its similarity.
        reads_norms: Whether `begin` needs the embeddings' norms.
        reads_all_targets: Whether `begin` needs every row's target similarity (one more
            collective).
        touches_others: Whether `others` is not the identity.
        reads_batch: Whether a row's loss depends on the other rows of the global batch.
    """

    scale: float
    normalize: bool = True
    bias: bool = False
    reads_norms: ClassVar[bool] = False
    reads_batch: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuses the first spelling of `normalize`, which nothing reads.

        Raises:
            TypeError: The class has an attribute `normalise`.
        """
        super().__init_subclass__(**options)
        if "normalise" in cls.__dict__ or "normalise" in inspect.get_annotations(cls):
            raise TypeError(f"{cls.__name__}.normalise is called normalize now: rename it")

    @property
    def reads_all_targets(self) -> bool:
        """False, unless a subclass overrides it."""
        return False

    @property
    def touches_others(self) -> bool:
        """False, unless a subclass overrides it."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """Describes the formula in force, for the log."""

    def initial_state(self) -> dict[str, float]:
        """Returns the running values that the margin keeps between steps, saved with the head."""
        return {}

    def begin(
        self, facts: BatchFacts, state: Mapping[str, Tensor]
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Computes what this batch fixes for all classes.

        Args:
            facts: What is known of the global batch.
            state: Running values before this batch.

        Returns:
            (context, running values after this batch).
        """
        return {}, state

    @abstractmethod
    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dsimilarity of target similarities.

        Args:
            similarity: [B] floating, taken as constants (no graph is built). Cosines a rounding
                error outside [-1, 1] count as +-1.
            context: What `begin` returned for this batch. It may be left out where `begin` returns
                nothing.

        Returns:
            (phi, slope), each of the shape and dtype of `similarity`.
        """

    def norm_slope(self, similarity: Tensor, context: Context) -> Tensor | None:
        """Returns dphi/dnorm [B] where phi has a gradient to the embedding's norm, else None."""
        return None

    def others(self, similarities: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Computes f and df/dsimilarity of classes that are not the target.

        Args:
            similarities: [B, n]; may be overwritten.
            context: What `begin` returned for this batch.

        Returns:
            (values [B, n], -inf where a class is removed from the softmax; slope [B, n], None for
            1).
        """
        return similarities, None

    def penalty(self, norms: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns a term added to each row's loss, (value [B], d/dnorm [B]), or None."""
        return None

    def logits(
        self,
        similarities: Tensor,
        target_column: Tensor,
        context: Context | None = None,
        norms: Tensor | None = None,
    ) -> Tensor:
        """Computes the scaled logits of one shard, differentiable by autograd.

        Args:
            similarities: [B, S] similarities of the global batch with S of this rank's classes.
            target_column: [B] int64 column of each row's own class, -1 where that class is not
                among these columns.
            context: What `begin` returned for this batch, None where it returns nothing.
            norms: [B] norms of the embeddings, where phi has a slope to them.

        Returns:
            [B, S], -inf for a class that is removed from the softmax.
        """
        context = context or {}
        if similarities.shape[1] == 0:
            return similarities
        # Gather and scatter rather than boolean indexing, which would wait for the device.
        here = (target_column >= 0)[:, None]
        column = target_column.clamp_min(0)[:, None]
        targets = similarities.gather(1, column)
        constant = targets.detach().squeeze(1)
        phi, slope = self.target(constant, context)
        # The value is phi and the slopes are the margin's: each bracket is zero but differentiable.
        phi = phi[:, None] + slope[:, None] * (targets - targets.detach())
        norm_slope = self.norm_slope(constant, context)
        if norm_slope is not None and norms is not None:
            phi = phi + (norm_slope * (norms - norms.detach()))[:, None]

        if self.touches_others:
            value, others_slope = self.others(similarities.detach().clone(), context)
            change = similarities - similarities.detach()
            similarities = value + (change if others_slope is None else others_slope * change)
            targets = similarities.gather(1, column)
        return self.scale * similarities.scatter(1, column, torch.where(here, phi, targets))


def refuse(*checks: tuple[bool, str]) -> None:
    """Checks settings.

    Args:
        checks: Pairs of a condition and the message for the case that it does not hold.

    Raises:
        ValueError: A condition does not hold. The message is that of the first one.
    """
    for ok, sentence in checks:
        if not ok:
            raise ValueError(sentence)


def at_least_fp32(cosine: Tensor) -> Tensor:
    """Returns cosines as constants in [-1, 1], in fp32 at least, as fp16 rounds 1 - 1e-6 to 1."""
    dtype = torch.promote_types(cosine.dtype, torch.float32)
    return cosine.detach().to(dtype).clamp(-1.0, 1.0)


def angle_for_slope(cosine: Tensor) -> Tensor:
    """Returns theta of the cosine clamped to +-(1 - 1e-6), for use inside derivatives only."""
    return torch.acos(cosine.clamp(-1.0 + DERIVATIVE_CLAMP, 1.0 - DERIVATIVE_CLAMP))


def monotone_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Computes cos(angle), continued monotonically past pi, and its slope.

    With k = floor(angle / pi) it is (-1)^k cos(angle) - 2k (Liu et al. 2017, arXiv:1704.08063, eq.
    7).

    Args:
        angle: Angles of any shape, in radians.

    Returns:
        (value, slope with respect to the angle).
    """
    turns = torch.floor(angle / math.pi).clamp_min(0.0)
    sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
    return sign * torch.cos(angle) - 2.0 * turns, -sign * torch.sin(angle)


def cosine_with_linear_tail(
    cosine: Tensor, margin: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes cos(theta + m) while theta + m <= pi, and cos(theta) - m sin(m) beyond.

    MagFace and CurricularFace were published with this form.

    Args:
        cosine: cos(theta), any shape.
        margin: m in radians, one number or one per cosine.

    Returns:
        (value, slope to the cosine, slope to the margin), each of the shape of `cosine`.
    """
    m = margin if isinstance(margin, Tensor) else torch.full_like(cosine, margin)
    inside = cosine > torch.cos(math.pi - m)
    theta = torch.acos(cosine)
    value = torch.where(inside, torch.cos(theta + m), cosine - m * torch.sin(m))
    theta = angle_for_slope(cosine)
    slope = torch.where(inside, torch.sin(theta + m) / torch.sin(theta), 1.0)
    margin_slope = torch.where(
        inside, -torch.sin(torch.acos(cosine) + m), -torch.sin(m) - m * torch.cos(m)
    )
    return value, slope, margin_slope
