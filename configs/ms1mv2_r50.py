"""Published: MS1MV2, r50, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import MS1MV2, VAL_TARGETS

config = EasyDict(
    MS1MV2,
    margin_gradient="straight_through",
    fp16=True,
    val_targets=VAL_TARGETS,
)
