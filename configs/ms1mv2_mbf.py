"""Published: MS1MV2, mbf, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import MS1MV2, VAL_TARGETS

config = EasyDict(
    MS1MV2,
    network="mbf",
    margin_gradient="straight_through",
    weight_decay=0.0001,
    num_epoch=40,
    fp16=True,
    val_targets=VAL_TARGETS,
)
