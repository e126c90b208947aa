"""Published: WebFace4M, r100, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/WebFace4M",
    num_classes=205_990,
    num_image=4_235_242,
    network="r100",
    margin_list=(1.0, 0.0, 0.4),
    fp16=True,
    val_targets=["lfw", "cfp_fp", "agedb_30"],
)
