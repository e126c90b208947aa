"""Published: Glint360K, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import GLINT360K, VAL_TARGETS

config = EasyDict(
    GLINT360K,
    margin_list=(1.0, 0.0, 0.4),
    weight_decay=0.0001,
    fp16=True,
    val_targets=VAL_TARGETS,
)
