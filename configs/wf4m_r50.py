"""Published: WebFace4M, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import VAL_TARGETS, WEBFACE4M

config = EasyDict(
    WEBFACE4M,
    margin_list=(1.0, 0.0, 0.4),
    fp16=True,
    val_targets=VAL_TARGETS,
)
