"""ResNet-50 with 2,000,000 classes, generated pictures: what does the last layer cost?"""

from easydict import EasyDict

config = EasyDict(
    task="classification",
    rec="synthetic",
    num_classes=2_000_000,
    num_image=1_281_167,
    network="resnet50",
    embedding_size=2048,
    input_size=224,
    loss="softmax",
    batch_size=32,
    lr_base_batch=256,
    weight_decay=1e-4,
    clip_grad_norm=0.0,
    fp16=True,
    max_steps=200,
    keep_checkpoints=0,
)
