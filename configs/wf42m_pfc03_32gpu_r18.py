"""Published: WebFace42M, r18, CosFace, 30 % of classes, 32 GPUs, global batch 4,096."""

from easydict import EasyDict

from configs.datasets import VAL_TARGETS, WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="r18",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.3,
    lr=0.4,
    warmup_epoch=2,
    fp16=True,
    val_targets=VAL_TARGETS,
)
