"""The demo: generated images (scripts/make_synthetic.py), two ranks, a few minutes."""

from easydict import EasyDict

config = EasyDict(
    network="r_nano",
    embedding_size=128,
    margin_list=(1.0, 0.0, 0.3),
    scale=32.0,
    batch_size=32,
    lr_base_batch=64,
    num_epoch=4,
    warmup_epoch=0.3,
    verbose=150,
    val_targets=["synthetic"],
)
