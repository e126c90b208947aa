"""Losses by name: what each does to the similarity of an embedding with its class centers.

Every loss is a `Margin` (arcshard/margins/base.py): pure functions of cosines, norms and the batch,
which know nothing of ranks. One fused path (arcshard/head/fused.py) serves them all, and it is
tested against one reference path (arcshard/head/reference.py).

    arcshard/margins/fixed.py      Softmax, NormFace, ArcFace, CosFace, SphereFace; filtering
    arcshard/margins/adaptive.py   AdaFace, MagFace, CurricularFace, ElasticFace

Sub-center ArcFace (Deng et al. 2020, "Sub-center ArcFace", ECCV) is any of them on a head with
several centers per class: PartialFC(..., centers_per_class=3).

ArcFace, CosFace and SphereFace pass further options on to CombinedMargin.
"""

from __future__ import annotations

from typing import Any

from arcshard.margins.adaptive import AdaFace, CurricularFace, ElasticFace, MagFace
from arcshard.margins.base import DERIVATIVE_CLAMP, BatchFacts, Margin
from arcshard.margins.fixed import CombinedMargin, Softmax

__all__ = [
    "DERIVATIVE_CLAMP",
    "AdaFace",
    "ArcFace",
    "BatchFacts",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "MagFace",
    "Margin",
    "NormFace",
    "Softmax",
    "SphereFace",
]


def ArcFace(margin: float = 0.5, scale: float = 64.0, **options: Any) -> CombinedMargin:
    """Makes the additive angular margin cos(theta + margin). Deng et al. 2019, arXiv:1801.07698."""
    return CombinedMargin(1.0, margin, 0.0, scale, **options)


def CosFace(margin: float = 0.4, scale: float = 64.0, **options: Any) -> CombinedMargin:
    """Makes the additive cosine margin cos(theta) - margin. Wang et al. 2018, arXiv:1801.09414."""
    return CombinedMargin(1.0, 0.0, margin, scale, **options)


def SphereFace(margin: float = 1.7, scale: float = 64.0, **options: Any) -> CombinedMargin:
    """Makes the multiplicative margin cos(margin theta). Liu et al. 2017, arXiv:1704.08063."""
    return CombinedMargin(margin, 0.0, 0.0, scale, **options)


def NormFace(scale: float = 64.0) -> Softmax:
    """Makes the softmax of scaled cosines without a margin. Wang et al. 2017, arXiv:1704.06369."""
    return Softmax(scale=scale, normalize=True)
