"""Published: WebFace42M, r50, CosFace, 20 % of classes, 16 GPUs, global batch 8,192."""

from easydict import EasyDict

from configs.datasets import VAL_TARGETS, WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.2,
    lr=0.6,
    batch_size=512,
    warmup_epoch=4,
    fp16=True,
    val_targets=VAL_TARGETS,
    verbose=10000,
)
