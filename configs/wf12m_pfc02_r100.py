"""Published: WebFace12M, r100, CosFace, 20 % of classes, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/WebFace12M",
    num_classes=617_970,
    num_image=12_720_066,
    network="r100",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.2,
    fp16=True,
)
