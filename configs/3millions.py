"""The published speed test: 300,000 synthetic identities, mbf, 10 % sampled classes."""

from easydict import EasyDict

config = EasyDict(
    rec="synthetic",
    num_classes=300_000,
    num_image=100_000,
    network="mbf",
    margin_list=(1.0, 0.0, 0.4),
    sample_rate=0.1,
    batch_size=512,
    num_epoch=30,
    warmup_epoch=-1,
    fp16=True,
)
