"""Published: WebFace42M, vit_t, CosFace, 30 % of classes, 8 GPUs, global batch 4,096."""

from easydict import EasyDict

from configs.datasets import WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="vit_t_dp005_mask0",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.3,
    optimizer="adamw",
    lr=0.001,
    weight_decay=0.1,
    batch_size=512,
    num_epoch=40,
    warmup_epoch=4,
    fp16=True,
)
