"""Published: WebFace42M, vit_b, CosFace, 30 % of classes, 64 GPUs, global batch 24,576."""

from easydict import EasyDict

from configs.datasets import WEBFACE42M

config = EasyDict(
    WEBFACE42M,
    network="vit_b_dp005_mask_005",
    gradient_checkpointing=True,  # as the published model always does
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.3,
    optimizer="adamw",
    lr=0.001,
    weight_decay=0.1,
    batch_size=384,
    num_epoch=40,
    warmup_epoch=4,
    fp16=True,
)
