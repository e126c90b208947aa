"""158 people of LFW as classes: a real first classification run, on a CPU in a few minutes."""

from easydict import EasyDict

config = EasyDict(
    task="classification",
    network="resnet_nano",
    embedding_size=128,
    loss="softmax",
    crop_area=(0.5, 1.0),
    batch_size=32,
    optimizer="adamw",
    lr=1e-3,
    lr_schedule="cosine",
    num_epoch=10,
    warmup_epoch=0.5,
    frequent=20,
    verbose=0,
)
