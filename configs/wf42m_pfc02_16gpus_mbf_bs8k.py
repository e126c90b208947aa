"""Published: WebFace42M, mbf, CosFace, 20 % of classes, 16 GPUs, global batch 8,192."""

from easydict import EasyDict

from configs.datasets import WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="mbf",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.2,
    lr=0.4,
    weight_decay=0.0001,
    batch_size=512,
    warmup_epoch=2,
    fp16=True,
    verbose=10000,
)
