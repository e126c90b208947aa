"""Losses by name: what each does to the cosine of an embedding with its class center.

The functions and classes are in arcshard/losses.py, the formulas in arcshard/margins/.
"""

from arcshard.losses import (
    DERIVATIVE_CLAMP,
    AdaFace,
    ArcFace,
    BatchFacts,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
    SphereFace,
)

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
