"""Published: WebFace42M, r100, CosFace, 20 % of classes, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import VAL_TARGETS, WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="r100",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.2,
    fp16=True,
    val_targets=VAL_TARGETS,
    verbose=10000,
)
