"""ArcShard: a sharded margin softmax for millions of classes, and layers split over ranks.

    from arcshard import ArcFace, PartialFC, SGDRows

    head = PartialFC(ArcFace(), 512, num_classes, row_optimizer=SGDRows(momentum=0.9))
    loss = head(embeddings, labels)
    loss.backward()
    head.step(learning_rate)

It needs PyTorch and nothing else. `arcshard.parallel` has linear layers, embeddings and losses that
are split over ranks.
"""

from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.losses import (
    AdaFace,
    ArcFace,
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
from arcshard.partial_fc import PartialFC

__version__ = "0.1.0"

__all__ = [
    "AdaFace",
    "AdamWRows",
    "ArcFace",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "MagFace",
    "Margin",
    "NormFace",
    "PartialFC",
    "SGDRows",
    "Softmax",
    "SphereFace",
    "__version__",
]
