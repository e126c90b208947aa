"""Published: MS1MV2, r50, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/faces_emore",
    num_classes=85_742,
    num_image=5_822_653,
    margin_gradient="straight_through",
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
)
