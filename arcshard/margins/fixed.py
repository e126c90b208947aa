"""Margins that are the same for every sample: softmax, NormFace, and the combined margin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arcshard.margins.base import (
    Context,
    GradientMode,
    Margin,
    angle_for_slope,
    at_least_fp32,
    monotone_cosine,
    refuse,
)

FilterMode = Literal["remove", "legacy"]


@dataclass(frozen=True)
class Softmax(Margin):
    """No margin: z_ij = s (<e_i, w_j> + b_j), the baseline of every margin.

    With normalize=True it is NormFace: s times the cosine (Wang et al. 2017, arXiv:1704.06369, with
    a fixed s).

    Args:
        scale: s, above 0; 1 is the plain softmax.
        normalize: Whether embeddings and class centers are divided by their norms.
        bias: Whether a bias b_j is learned.

    Raises:
        ValueError: `scale` is outside its domain.
    """

    scale: float = 1.0
    normalize: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        refuse((0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"))

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        similarity = "cos(theta)" if self.normalize else "<e, w>"
        bias = " + b" if self.bias else ""
        return f"s = {self.scale:g}, softmax of {similarity}{bias}, no margin"

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Returns the similarity itself and slope 1."""
        return similarity.detach(), torch.ones_like(similarity)


@dataclass(frozen=True)
class CombinedMargin(Margin):
    """phi(cos theta) = cos(m1 theta + m2) - m3, continued monotonically past pi.

    With a = m1 theta + m2 and k = floor(a / pi), phi = (-1)^k cos(a) - 2k - m3. ArcFace (1, m, 0)
    is Deng et al. 2019 (arXiv:1801.07698), CosFace (1, 0, m) Wang et al. 2018 (arXiv:1801.09414),
    SphereFace (m, 0, 0) Liu et al. 2017 (arXiv:1704.08063, eq. 7).

    Args:
        m1: Factor on the angle, above 0.
        m2: Added to the angle, radians in [0, pi).
        m3: Subtracted from the cosine, in [0, 2].
        scale: s, above 0.
        gradient: "exact" differentiates phi, with the cosine clamped to +-(1 - 1e-6) inside the
            derivative. "straight_through" uses dphi/dcos = 1, as the published head does.
        interclass_filtering_threshold: Cosine above which another class is taken for label noise; 0
            is off (PartialFC, An et al. 2022, arXiv:2203.15565, section 3.3).
        interclass_filtering_mode: "remove" removes such classes from the softmax. "legacy" sets
            their cosine to 0, which leaves exp(0) in the sum, as the published code did.

    Raises:
        ValueError: A value is outside its domain.
    """

    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    scale: float = 64.0
    gradient: GradientMode = "exact"
    interclass_filtering_threshold: float = 0.0
    interclass_filtering_mode: FilterMode = "remove"

    def __post_init__(self) -> None:
        refuse(
            (0 < self.m1 < math.inf, f"m1={self.m1!r}: a factor above 0"),
            (0 <= self.m2 < math.pi, f"m2={self.m2!r}: radians in [0, pi)"),
            (0 <= self.m3 <= 2, f"m3={self.m3!r}: a cosine in [0, 2]"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
            (
                self.gradient in ("exact", "straight_through"),
                f"gradient={self.gradient!r}: exact or straight_through",
            ),
            (
                0 <= self.interclass_filtering_threshold <= 1,
                f"interclass_filtering_threshold={self.interclass_filtering_threshold!r}: "
                "a cosine in (0, 1], 0 for off",
            ),
            (
                self.interclass_filtering_mode in ("remove", "legacy"),
                f"interclass_filtering_mode={self.interclass_filtering_mode!r}: remove or legacy",
            ),
        )

    @property
    def touches_others(self) -> bool:
        """True with inter-class filtering."""
        return self.interclass_filtering_threshold > 0

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        angle = "theta" if self.m1 == 1 else f"{self.m1:g} theta"
        angle = angle if self.m2 == 0 else f"{angle} + {self.m2:g}"
        phi = "cos(theta)" if angle == "theta" else f"cos({angle})"
        phi = phi if self.m3 == 0 else f"{phi} - {self.m3:g}"
        text = f"s = {self.scale:g}, target {phi}, gradient {self.gradient}"
        if self.touches_others:
            text += (
                f", classes with cosine above {self.interclass_filtering_threshold:g} "
                f"{'removed' if self.interclass_filtering_mode == 'remove' else 'set to 0'}"
            )
        return text

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dcos of target cosines of any shape."""
        cosine = at_least_fp32(similarity)
        phi, slope = cosine, torch.ones_like(cosine)
        if self.m1 != 1.0 or self.m2 != 0.0:
            phi, _ = monotone_cosine(self.m1 * torch.acos(cosine) + self.m2)
            if self.gradient == "exact":
                theta = angle_for_slope(cosine)
                _, angle_slope = monotone_cosine(self.m1 * theta + self.m2)
                slope = -self.m1 * angle_slope / torch.sin(theta)
        phi = phi - self.m3
        return phi.to(similarity.dtype), slope.to(similarity.dtype)

    def others(self, similarities: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Filters classes whose cosine exceeds the threshold: they are removed, or set to 0."""
        if not self.touches_others:
            return similarities, None
        filtered = similarities > self.interclass_filtering_threshold
        slope = (~filtered).to(similarities.dtype)
        value = -math.inf if self.interclass_filtering_mode == "remove" else 0.0
        return similarities.masked_fill_(filtered, value), slope
