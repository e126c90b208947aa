"""Published: WF12M-Conflict, r50, CosFace, 8 GPUs, global batch 1,024."""

from easydict import EasyDict

from configs.datasets import WEBFACE12M_CONFLICT

config = EasyDict(
    WEBFACE12M_CONFLICT,
    margin_list=(1.0, 0.0, 0.4),
    warmup_epoch=2,
    fp16=True,
)
