"""Published: MS1MV2, mbf, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/faces_emore",
    num_classes=85_742,
    num_image=5_822_653,
    network="mbf",
    margin_gradient="straight_through",
    weight_decay=0.0001,
    num_epoch=40,
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
)
