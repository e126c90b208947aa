"""Margins: what happens to the cosine of an embedding with its own class centre.

Pure functions of cosines and labels; they know nothing of ranks. A margin serves one shard
of classes as well as all of them, because only the target column is special.

The loss over C classes (design section 4), for cosines cos_ij of embedding i and class j:

    z_ij = s cos_ij,   z_iy = s phi(cos_iy),   loss = mean_i (logsumexp_j z_ij - z_iy)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GradientMode = Literal["exact", "straight_through"]
FilterMode = Literal["remove", "legacy"]

# Inside the derivative the cosine stays this far from +-1, where ArcFace's is infinite.
DERIVATIVE_CLAMP = 1e-6


@dataclass(frozen=True)
class CombinedMargin:
    """phi(cos theta) = cos(m1 theta + m2) - m3, continued monotonously past pi.

    With a = m1 theta + m2 and k = floor(a / pi): phi = (-1)^k cos(a) - 2k - m3.
    ArcFace (1, m, 0) is Deng et al. 2019 (arXiv:1801.07698), CosFace (1, 0, m) Wang et al.
    2018 (arXiv:1801.09414), SphereFace (m, 0, 0) Liu et al. 2017 (arXiv:1704.08063, eq. 7).

    Args:
        m1: factor on the angle, above 0.
        m2: added to the angle, radians in [0, pi).
        m3: taken off the cosine, in [0, 2].
        scale: s, above 0.
        gradient: "exact" differentiates phi, the cosine clamped to +-(1 - 1e-6) inside the
            derivative; "straight_through" uses dphi/dcos = 1, as the published head does.
        interclass_filtering_threshold: cosine above which another class is taken for label
            noise; 0 is off (PartialFC, An et al. 2022, arXiv:2203.15565, section 3.3).
        interclass_filtering_mode: "remove" takes such classes out of the softmax; "legacy"
            sets their cosine to 0, which leaves exp(0) in the sum, as the published code did.

    Raises:
        ValueError: a value outside its domain.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    scale: float = 64.0
    gradient: GradientMode = "exact"
    interclass_filtering_threshold: float = 0.0
    interclass_filtering_mode: FilterMode = "remove"

    def __post_init__(self) -> None:
        for ok, sentence in (
            (0 < self.m1 < math.inf, f"m1={self.m1!r}: a factor above 0"),
            (0 <= self.m2 < math.pi, f"m2={self.m2!r}: radians in [0, pi)"),
            (0 <= self.m3 <= 2, f"m3={self.m3!r}: a cosine in [0, 2]"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
            (
                self.gradient in ("exact", "straight_through"),
                f"gradient={self.gradient!r}: exact or straight_through",
            ),
            (
                -1 <= self.interclass_filtering_threshold <= 1,
                f"interclass_filtering_threshold={self.interclass_filtering_threshold!r}: "
                "a cosine in [-1, 1], 0 for off",
            ),
            (
                self.interclass_filtering_mode in ("remove", "legacy"),
                f"interclass_filtering_mode={self.interclass_filtering_mode!r}: remove or legacy",
            ),
        ):
            if not ok:
                raise ValueError(sentence)

    def describe(self) -> str:
        """The formula in force, for the log."""
        angle = "theta" if self.m1 == 1 else f"{self.m1:g} theta"
        angle = angle if self.m2 == 0 else f"{angle} + {self.m2:g}"
        phi = "cos(theta)" if angle == "theta" else f"cos({angle})"
        phi = phi if self.m3 == 0 else f"{phi} - {self.m3:g}"
        text = f"s = {self.scale:g}, target {phi}, gradient {self.gradient}"
        if self.interclass_filtering_threshold > 0:
            text += (
                f", classes with cosine above {self.interclass_filtering_threshold:g} "
                f"{'removed' if self.interclass_filtering_mode == 'remove' else 'set to 0'}"
            )
        return text

    def target(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """phi and dphi/dcos of target cosines.

        Args:
            cosine: any shape, floating; taken as constants (no graph is built). Values a
                rounding error outside [-1, 1] count as +-1.

        Returns:
            (phi, derivative), each of the shape and dtype of `cosine`.
        """
        dtype = cosine.dtype
        # 1 - 1e-6 is 1 in half precision, so angles are taken in fp32 at least.
        cosine = cosine.detach().to(torch.promote_types(dtype, torch.float32)).clamp(-1.0, 1.0)
        if self.m1 == 1.0 and self.m2 == 0.0:
            phi, derivative = cosine - self.m3, torch.ones_like(cosine)
        else:
            angle = self.m1 * torch.acos(cosine) + self.m2
            turns = torch.floor(angle / math.pi)
            sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
            phi = sign * torch.cos(angle) - 2.0 * turns - self.m3

            inner = cosine.clamp(-1.0 + DERIVATIVE_CLAMP, 1.0 - DERIVATIVE_CLAMP)
            theta = torch.acos(inner)
            angle = self.m1 * theta + self.m2
            sign = 1.0 - 2.0 * torch.remainder(torch.floor(angle / math.pi), 2.0)
            derivative = sign * self.m1 * torch.sin(angle) / torch.sin(theta)
        if self.gradient == "straight_through":
            derivative = torch.ones_like(cosine)
        return phi.to(dtype), derivative.to(dtype)

    def logits(self, cosines: Tensor, target_column: Tensor) -> Tensor:
        """Scaled logits of one shard, differentiable with respect to `cosines`.

        Args:
            cosines: [B, S] cosines of the global batch with S of this rank's class centres.
            target_column: [B] int64, the column of each row's own class, -1 where that class
                is not among these columns.

        Returns:
            [B, S]; a removed class is -inf.
        """
        if cosines.shape[1] == 0:
            return cosines
        # Gather and scatter rather than boolean indexing, which would wait for the device.
        here = (target_column >= 0)[:, None]
        column = target_column.clamp_min(0)[:, None]
        targets = cosines.gather(1, column)
        phi, derivative = self.target(targets)
        # The value is phi, the slope is `derivative`: the bracket is zero but differentiable.
        phi = phi + derivative * (targets - targets.detach())

        if self.interclass_filtering_threshold > 0:
            filtered = cosines.detach() > self.interclass_filtering_threshold
            filtered.scatter_(1, column, filtered.gather(1, column) & ~here)
            value = -math.inf if self.interclass_filtering_mode == "remove" else 0.0
            cosines = cosines.masked_fill(filtered, value)
            targets = cosines.gather(1, column)
        return self.scale * cosines.scatter(1, column, torch.where(here, phi, targets))


def ArcFace(margin: float = 0.5, scale: float = 64.0, **options: object) -> CombinedMargin:
    """Additive angular margin: cos(theta + margin). Deng et al. 2019, arXiv:1801.07698."""
    return CombinedMargin(1.0, margin, 0.0, scale, **options)  # type: ignore[arg-type]


def CosFace(margin: float = 0.4, scale: float = 64.0, **options: object) -> CombinedMargin:
    """Additive cosine margin: cos(theta) - margin. Wang et al. 2018, arXiv:1801.09414."""
    return CombinedMargin(1.0, 0.0, margin, scale, **options)  # type: ignore[arg-type]


def SphereFace(margin: float = 1.7, scale: float = 64.0, **options: object) -> CombinedMargin:
    """Multiplicative angular margin: cos(margin theta). Liu et al. 2017, arXiv:1704.08063."""
    return CombinedMargin(margin, 0.0, 0.0, scale, **options)  # type: ignore[arg-type]
