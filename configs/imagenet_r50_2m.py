"""The same as imagenet_r50_1m with 2,000,000 classes."""

from easydict import EasyDict

from configs.imagenet_r50_1m import config as one_million

config = EasyDict(one_million, num_classes=2_000_000)
