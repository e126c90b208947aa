"""Published: WebFace42M, vit_h, CosFace, 50 % of classes, batch 768 per GPU."""

from easydict import EasyDict

from configs.datasets import WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="vit_h",
    gradient_checkpointing=True,  # as the published model always does
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.5,
    optimizer="adamw",
    lr=0.001,
    weight_decay=0.1,
    batch_size=768,
    num_epoch=16,
    warmup_epoch=2,
    fp16=True,
    dali=True,
    dali_aug=True,
)
