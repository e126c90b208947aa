"""Margins that depend on the sample or on the progress of training: norms, draws, difficulty."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arcshard.margins.base import (
    BatchFacts,
    Context,
    Margin,
    angle_for_slope,
    at_least_fp32,
    cosine_with_linear_tail,
    monotone_cosine,
    refuse,
)


@dataclass(frozen=True)
class AdaFace(Margin):
    """The margin depends on image quality, which is read from the embedding's norm.

    Kim et al. 2022, arXiv:2204.00964, eqs. 9-12. The norm, clipped to [0.001, 100], is standardized
    by running batch statistics, multiplied by h and clipped to [-1, 1]; this is n. Then phi =
    cos(theta - m n) - (m + m n), with the angle kept in [eps, pi - eps]. The norm is a constant to
    the gradient. The statistics are those of the global batch.

    Args:
        margin: m, in [0, pi/2).
        h: Factor on the standardized norm before it is clipped, above 0.
        t_alpha: Weight of a batch in the running mean and standard deviation, in (0, 1].
        scale: s, above 0.

    Raises:
        ValueError: A value is outside its domain.
    """

    margin: float = 0.4
    h: float = 0.333
    t_alpha: float = 0.01
    scale: float = 64.0
    reads_norms: ClassVar[bool] = True
    reads_batch: ClassVar[bool] = True
    eps: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        refuse(
            (0 <= self.margin < math.pi / 2, f"margin={self.margin!r}: in [0, pi/2)"),
            (0 < self.h < math.inf, f"h={self.h!r}: above 0"),
            (0 < self.t_alpha <= 1, f"t_alpha={self.t_alpha!r}: in (0, 1]"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
        )

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        m = f"{self.margin:g}"
        return (
            f"AdaFace: s = {self.scale:g}, target cos(theta - {m} n) - ({m} + {m} n), "
            f"n = {self.h:g} x standardized norm in [-1, 1], t_alpha {self.t_alpha:g}"
        )

    def initial_state(self) -> dict[str, float]:
        """Returns the first running mean and standard deviation of norms, as published."""
        return {"norm_mean": 20.0, "norm_std": 100.0}

    def begin(
        self, facts: BatchFacts, state: Mapping[str, Tensor]
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Computes the standardized norms of the batch, and the statistics after it."""
        assert facts.norms is not None
        norms = facts.norms.detach().clamp(1e-3, 100.0)
        real = facts.real.to(norms.dtype)
        count = real.sum()
        mean = (norms * real).sum() / count
        variance = ((norms - mean).square() * real).sum() / (count - 1).clamp_min(1.0)
        a = self.t_alpha
        after = {
            "norm_mean": a * mean + (1 - a) * state["norm_mean"],
            "norm_std": a * variance.sqrt() + (1 - a) * state["norm_std"],
        }
        quality = self.h * (norms - after["norm_mean"]) / (after["norm_std"] + self.eps)
        return {"quality": quality.clamp(-1.0, 1.0)}, after

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dcos; the slope is 0 where the angle is clipped."""
        assert context is not None, "AdaFace needs the context of its batch"
        cosine = at_least_fp32(similarity)
        shift = -self.margin * context["quality"].to(cosine.dtype)
        low, high = self.eps, math.pi - self.eps
        angle = (torch.acos(cosine) + shift).clamp(low, high)
        phi = torch.cos(angle) - (self.margin - shift)
        theta = angle_for_slope(cosine)
        inside = (theta + shift > low) & (theta + shift < high)
        slope = torch.where(inside, torch.sin(theta + shift) / torch.sin(theta), 0.0)
        return phi.to(similarity.dtype), slope.to(similarity.dtype)


@dataclass(frozen=True)
class MagFace(Margin):
    """The norm measures quality: the margin grows with it, and a regularizer increases the norm.

    Meng et al. 2021, arXiv:2103.06627. With a the norm clipped to [l_a, u_a], m(a) = l_margin +
    (u_margin - l_margin) (a - l_a) / (u_a - l_a), phi = cos(theta + m(a)), and lambda_g (a / u_a^2
    + 1 / a) is added to each row's loss. Both have a gradient to the norm. Beyond theta + m = pi,
    phi is cos(theta) - m sin(m), as published.

    Args:
        l_a: Lower bound of the norm, above 0.
        u_a: Upper bound of the norm, above l_a.
        l_margin: Margin at l_a, in [0, u_margin].
        u_margin: Margin at u_a, below pi/2.
        lambda_g: Weight of the regularizer, at least 0.
        scale: s, above 0.

    Raises:
        ValueError: A value is outside its domain.
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_margin: float = 0.45
    u_margin: float = 0.8
    lambda_g: float = 20.0
    scale: float = 64.0
    reads_norms: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse(
            (
                0 < self.l_a < self.u_a < math.inf,
                f"l_a={self.l_a!r}, u_a={self.u_a!r}: 0 < l_a < u_a",
            ),
            (
                0 <= self.l_margin <= self.u_margin < math.pi / 2,
                f"l_margin={self.l_margin!r}, u_margin={self.u_margin!r}: "
                "0 <= l_margin <= u_margin < pi/2",
            ),
            (0 <= self.lambda_g < math.inf, f"lambda_g={self.lambda_g!r}: at least 0"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
        )

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        return (
            f"MagFace: s = {self.scale:g}, target cos(theta + m(a)), m from {self.l_margin:g} to "
            f"{self.u_margin:g} as the norm a goes from {self.l_a:g} to {self.u_a:g}, plus "
            f"{self.lambda_g:g} (a / {self.u_a:g}^2 + 1 / a)"
        )

    def begin(
        self, facts: BatchFacts, state: Mapping[str, Tensor]
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Computes the margin of each row and its slope to the norm."""
        assert facts.norms is not None
        norms = facts.norms.detach()
        slope = (self.u_margin - self.l_margin) / (self.u_a - self.l_a)
        margin = self.l_margin + slope * (norms.clamp(self.l_a, self.u_a) - self.l_a)
        return {"margin": margin, "slope": slope * self._unclipped(norms)}, state

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dcos."""
        assert context is not None, "MagFace needs the context of its batch"
        cosine = at_least_fp32(similarity)
        phi, slope, _ = cosine_with_linear_tail(cosine, context["margin"].to(cosine.dtype))
        return phi.to(similarity.dtype), slope.to(similarity.dtype)

    def norm_slope(self, similarity: Tensor, context: Context) -> Tensor:
        """Computes dphi/da = dphi/dm dm/da."""
        cosine = at_least_fp32(similarity)
        _, _, slope = cosine_with_linear_tail(cosine, context["margin"].to(cosine.dtype))
        return slope.to(similarity.dtype) * context["slope"]

    def penalty(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Computes lambda_g g(a) and its slope, which is 0 for norms outside the bounds."""
        norms = norms.detach()
        a = norms.clamp(self.l_a, self.u_a)
        value = self.lambda_g * (a / self.u_a**2 + 1 / a)
        slope = self.lambda_g * (1 / self.u_a**2 - 1 / a.square()) * self._unclipped(norms)
        return value, slope

    def _unclipped(self, norms: Tensor) -> Tensor:
        return ((norms >= self.l_a) & (norms <= self.u_a)).to(norms.dtype)


@dataclass(frozen=True)
class CurricularFace(Margin):
    """Hard negatives have a small weight early and a large weight late in training.

    Huang et al. 2020, arXiv:2004.00288, eqs. 7-9. phi = cos(theta + m). Another class with cos_j >
    cos(theta_y + m) counts as cos_j (t + cos_j), where t is the running mean of the target cosines
    (global batch), updated before it is used. Beyond theta + m = pi, phi is cos(theta) - m sin(m),
    as published.

    Args:
        margin: m, radians in [0, pi/2).
        alpha: Weight of a batch in t, in (0, 1].
        scale: s, above 0.

    Raises:
        ValueError: A value is outside its domain.
    """

    margin: float = 0.5
    alpha: float = 0.01
    scale: float = 64.0
    reads_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse(
            (0 <= self.margin < math.pi / 2, f"margin={self.margin!r}: radians in [0, pi/2)"),
            (0 < self.alpha <= 1, f"alpha={self.alpha!r}: in (0, 1]"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
        )

    @property
    def reads_all_targets(self) -> bool:
        """True, because t is the running mean of the target cosines."""
        return True

    @property
    def touches_others(self) -> bool:
        """True, because harder classes are reweighted."""
        return True

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        return (
            f"CurricularFace: s = {self.scale:g}, target cos(theta + {self.margin:g}), harder "
            f"classes cos (t + cos), t the running mean of target cosines (alpha {self.alpha:g})"
        )

    def initial_state(self) -> dict[str, float]:
        """Returns t = 0."""
        return {"t": 0.0}

    def begin(
        self, facts: BatchFacts, state: Mapping[str, Tensor]
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Computes the threshold of each row, cos(theta_y + m), and t."""
        assert facts.targets is not None
        cosine = at_least_fp32(facts.targets)
        mean = (cosine * facts.real).sum() / facts.real.sum()
        t = self.alpha * mean + (1 - self.alpha) * state["t"]
        return {"threshold": torch.cos(torch.acos(cosine) + self.margin), "t": t}, {"t": t}

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dcos."""
        phi, slope, _ = cosine_with_linear_tail(at_least_fp32(similarity), self.margin)
        return phi.to(similarity.dtype), slope.to(similarity.dtype)

    def others(self, similarities: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Computes cos_j, or cos_j (t + cos_j) for classes harder than the target."""
        t = context["t"].to(similarities.dtype)
        hard = similarities > context["threshold"].to(similarities.dtype)[:, None]
        slope = torch.where(hard, t + 2 * similarities, 1.0)
        return torch.where(hard, similarities * (t + similarities), similarities), slope


@dataclass(frozen=True)
class ElasticFace(Margin):
    """Every sample draws its margin from a normal distribution.

    Boutros et al. 2022, arXiv:2109.09416. m_i ~ N(margin, std), and phi = cos(theta + m_i) ("arc")
    or cos(theta) - m_i ("cos"). With plus=True (ElasticFace+, section 3.3 there) the draws of a
    batch are assigned by difficulty: the smaller the target cosine, the larger the margin. The
    draws depend on the run's seed, the step and the row of the global batch only.

    Args:
        kind: "arc" or "cos".
        margin: Mean of the draws, in [0, pi/2); in the paper 0.5 for arc, 0.35 for cos.
        std: Standard deviation of the draws, at least 0.
        plus: Whether the draws are assigned by difficulty.
        scale: s, above 0.

    Raises:
        ValueError: A value is outside its domain.
    """

    kind: str = "arc"
    margin: float = 0.5
    std: float = 0.0125
    plus: bool = False
    scale: float = 64.0
    reads_batch: ClassVar[bool] = True  # the draw of a row follows from its place in the batch

    def __post_init__(self) -> None:
        refuse(
            (self.kind in ("arc", "cos"), f"kind={self.kind!r}: arc or cos"),
            (0 <= self.margin < math.pi / 2, f"margin={self.margin!r}: in [0, pi/2)"),
            (0 <= self.std < math.inf, f"std={self.std!r}: at least 0"),
            (0 < self.scale < math.inf, f"scale={self.scale!r}: above 0"),
        )

    @property
    def reads_all_targets(self) -> bool:
        """True for ElasticFace+, which sorts the batch by its target cosines."""
        return self.plus

    def describe(self) -> str:
        """Describes the formula in force, for the log."""
        target = "cos(theta + m)" if self.kind == "arc" else "cos(theta) - m"
        return (
            f"ElasticFace-{self.kind.capitalize()}{'+' if self.plus else ''}: s = {self.scale:g}, "
            f"target {target}, m ~ N({self.margin:g}, {self.std:g})"
        )

    def begin(
        self, facts: BatchFacts, state: Mapping[str, Tensor]
    ) -> tuple[Context, Mapping[str, Tensor]]:
        """Draws the margin of each row of the global batch."""
        generator = torch.Generator().manual_seed(facts.draw)  # CPU: the same on every device
        draws = torch.randn(len(facts.real), generator=generator, dtype=torch.float64)
        margins = (self.margin + self.std * draws).to(facts.real.device, non_blocking=True)
        if self.plus:
            assert facts.targets is not None
            # Rows in descending order of the cosine get the margins in ascending order; padding
            # rows and their draws come last.
            cosine = torch.where(facts.real, facts.targets, -math.inf)
            order = torch.argsort(cosine, descending=True, stable=True)
            rising = torch.where(facts.real, margins, math.inf).sort().values
            margins = torch.empty_like(margins).scatter_(0, order, rising)
            margins = torch.where(facts.real, margins, self.margin)
        return {"margin": margins}, state

    def target(self, similarity: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """Computes phi and dphi/dcos."""
        assert context is not None, "ElasticFace needs the context of its batch"
        cosine = at_least_fp32(similarity)
        margin = context["margin"].to(cosine.dtype)
        if self.kind == "cos":
            return (cosine - margin).to(similarity.dtype), torch.ones_like(similarity)
        phi, _ = monotone_cosine(torch.acos(cosine) + margin)
        theta = angle_for_slope(cosine)
        _, angle_slope = monotone_cosine(theta + margin)
        slope = -angle_slope / torch.sin(theta)
        return phi.to(similarity.dtype), slope.to(similarity.dtype)
