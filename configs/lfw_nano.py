"""158 people of LFW with ten images or more: a real first run, on a CPU in ten minutes."""

from easydict import EasyDict

config = EasyDict(
    network="r_nano",
    embedding_size=128,
    margin_list=(1.0, 0.0, 0.3),
    scale=32.0,
    batch_size=32,
    lr_base_batch=64,
    num_epoch=8,
    warmup_epoch=0.5,
    verbose=0,
    frequent=20,
    val_targets=["lfw_part"],
)
