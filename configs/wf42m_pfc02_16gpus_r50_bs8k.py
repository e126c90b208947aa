"""Published: WebFace42M, r50, CosFace, 20 % of classes, 16 GPUs, global batch 8,192."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/WebFace42M",
    num_classes=2_059_906,
    num_image=42_474_557,
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.2,
    lr=0.6,
    batch_size=512,
    warmup_epoch=4,
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
    verbose=10000,
)
