"""Published: WebFace12M, mbf, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import WEBFACE12M

config = EasyDict(
    WEBFACE12M,
    network="mbf",
    margin_list=(1.0, 0.0, 0.4),
    weight_decay=0.0001,
    fp16=True,
)
