"""Published: MS1MV3, r100, ArcFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/ms1m-retinaface-t1",
    num_classes=93_431,
    num_image=5_179_510,
    network="r100",
    margin_gradient="straight_through",
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
)
