"""Published: WebFace42M, r100, CosFace, batch classes only, 32 GPUs, global batch 16,384."""

from easydict import EasyDict

from configs.datasets import VAL_TARGETS, WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="r100",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0,
    lr=0.4,
    batch_size=512,
    warmup_epoch=2,
    fp16=True,
    val_targets=VAL_TARGETS,
)
