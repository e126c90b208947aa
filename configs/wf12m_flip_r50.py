"""Published: WF12M-Flip40, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import WEBFACE12M_FLIP40

config = EasyDict(
    WEBFACE12M_FLIP40,
    margin_list=(1.0, 0.0, 0.4),
    warmup_epoch=2,
    fp16=True,
)
