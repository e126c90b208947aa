"""ImageNet, ResNet-50, as usually trained: 8 GPUs, global batch 256, 90 epochs."""

from easydict import EasyDict

config = EasyDict(
    task="classification",
    rec="/train_tmp/imagenet",
    network="resnet50",
    embedding_size=2048,
    input_size=224,
    loss="softmax",
    batch_size=32,
    num_epoch=90,
    lr_base_batch=256,
    lr_schedule="cosine",
    warmup_epoch=5.0,
    weight_decay=1e-4,
    clip_grad_norm=0.0,
    fp16=True,
    num_workers=8,
    verbose=5_000,
)
