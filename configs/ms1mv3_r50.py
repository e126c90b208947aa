"""Published: MS1MV3, r50, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import MS1MV3, VAL_TARGETS

config = EasyDict(
    MS1MV3,
    margin_gradient="straight_through",
    fp16=True,
    val_targets=VAL_TARGETS,
)
