"""Published: WebFace12M, mbf, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

config = EasyDict(
    rec="/train_tmp/WebFace12M",
    num_classes=617_970,
    num_image=12_720_066,
    network="mbf",
    margin_list=(1.0, 0.0, 0.4),
    weight_decay=0.0001,
    fp16=True,
)
