"""Published: WebFace42M, vit_b, CosFace, 30 % of classes, 64 GPUs, global batch 24,576."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/WebFace42M",
    num_classes=2_059_906,
    num_image=42_474_557,
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
