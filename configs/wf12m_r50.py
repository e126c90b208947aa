"""Published: WebFace12M, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import WEBFACE12M

config = EasyDict(
    WEBFACE12M,
    margin_list=(1.0, 0.0, 0.4),
    fp16=True,
)
