"""Published: MS1MV3, r50, ArcFace, 1 GPU, global batch 128."""

from easydict import EasyDict

from configs.datasets import MS1MV3, VAL_TARGETS

config = EasyDict(
    MS1MV3,
    margin_gradient="straight_through",
    lr=0.02,
    fp16=True,
    val_targets=VAL_TARGETS,
)
