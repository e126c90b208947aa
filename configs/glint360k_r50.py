"""Published: Glint360K, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/glint360k",
    num_classes=360_232,
    num_image=17_091_657,
    margin_list=(1.0, 0.0, 0.4),
    weight_decay=0.0001,
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
)
