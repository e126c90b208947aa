"""ResNet, whose last layer is its classifier: resnet18 to resnet152, and resnet_nano for CPUs.

The network is that of He et al., "Deep Residual Learning for Image Recognition", 2016, with the
stride of a bottleneck on its 3 x 3 convolution (Goyal et al., 2017). Names and shapes of the
parameters are those of torchvision, so its published weights load unchanged; `num_features` is then
the number of classes, and the outputs are logits. Without its `fc` the network ends in the pooled
features. The classification trainer uses this form, because there the sharded head is the last
layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import relu

from backbones.base import Backbone
from utils.errors import UserError

# Blocks per stage, and the expansion: the factor by which the last convolution of a bottleneck
# widens (1: basic blocks).
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "resnet18": {"layers": (2, 2, 2, 2), "expansion": 1},
    "resnet34": {"layers": (3, 4, 6, 3), "expansion": 1},
    "resnet50": {"layers": (3, 4, 6, 3), "expansion": 4},
    "resnet101": {"layers": (3, 4, 23, 3), "expansion": 4},
    "resnet152": {"layers": (3, 8, 36, 3), "expansion": 4},
    # Not a published network: small enough for a laptop CPU, with 128 features.
    "resnet_nano": {"layers": (1, 1, 1, 1), "expansion": 1, "width": 16},
}


class BasicBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions.

    It maps [N, in, H, W] to [N, out, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the addition of the shortcut."""
        return self.bn2

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block to feature maps [N, in, H, W]."""
        hidden = relu(self.bn1(self.conv1(inputs)))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        return relu(self.bn2(self.conv2(hidden)) + shortcut)


class Bottleneck(nn.Module):
    """Residual block of 1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions.

    It maps [N, in, H, W] to [N, 4 * width, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(in_channels, 4 * width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The norm before the addition of the shortcut."""
        return self.bn3

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block to feature maps [N, in, H, W]."""
        hidden = relu(self.bn1(self.conv1(inputs)))
        hidden = relu(self.bn2(self.conv2(hidden)))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        return relu(self.bn3(self.conv3(hidden)) + shortcut)


class ResNet(Backbone):
    """ResNet with four stages: 224 x 224 becomes 7 x 7. Images may have any size of at least 32.

    Args:
        layers: Blocks in each of the four stages.
        expansion: 1 for basic blocks, 4 for bottlenecks.
        width: Channels of the stem and the first stage.
        num_features: Outputs of `fc`. Without `fc` it must be the width of the pooled features.
        dropout: Must be 0, because the published network has no dropout.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether training recomputes activations in backward.
        with_fc: Whether the network ends in the linear layer. Otherwise it ends in the pooled
            features [N, 8 * width * expansion].
        zero_init_residual: Whether every block starts as its shortcut (the scale of its last norm
            is 0).

    Raises:
        UserError: `dropout` or `num_features` is outside its domain.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("with_fc", "zero_init_residual")
    EMBEDDING_KEY: ClassVar[str] = "fc.bias"
    STEM_KEY: ClassVar[str] = "conv1.weight"
    # The values of torchvision, for pixels 0..255.
    PUBLISHED_BY: ClassVar[str] = "torchvision"
    INPUT_SIZE: ClassVar[int] = 224
    MEAN: ClassVar[float | tuple[float, ...]] = (123.675, 116.28, 103.53)
    STD: ClassVar[float | tuple[float, ...]] = (58.395, 57.12, 57.375)
    CLASSIFIER: ClassVar[str | None] = "fc"

    def __init__(
        self,
        layers: Sequence[int],
        expansion: int,
        *,
        width: int = 64,
        num_features: int = 1000,
        dropout: float = 0.0,
        input_size: int = 224,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
        with_fc: bool = True,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(num_features, input_size, in_channels, gradient_checkpointing)
        pooled = 8 * width * expansion
        if dropout:
            raise UserError(f"dropout={dropout}: ResNet has none; set dropout=0")
        if not with_fc and num_features != pooled:
            raise UserError(
                f"num_features={num_features}: without its fc this ResNet gives {pooled} features; "
                f"set embedding_size={pooled}"
            )
        block = BasicBlock if expansion == 1 else Bottleneck
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for stage, count in enumerate(layers):
            inner, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = [block(channels, inner, stride)]
            channels = inner * expansion
            blocks += [block(channels, inner, 1) for _ in range(1, count)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc: nn.Linear | None = nn.Linear(pooled, num_features) if with_fc else None
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        """Initialize as published: convolutions by He's rule over their outputs, norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (BasicBlock, Bottleneck)) and zero_init_residual:
                nn.init.zeros_(module.last_norm.weight)

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Return the stem, the four stages and the fc; without fc, the last group is empty."""
        stages = [(f"layer{stage}",) for stage in range(1, 5)]
        return [("conv1", "bn1"), *stages, ("fc",)]

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [N, C, S, S] to features [N, 8 * width * expansion, S / 32, S / 32].

        The quotient is rounded up.
        """
        self._check_images(images)
        x = self.maxpool(relu(self.bn1(self.conv1(images))))
        for stage in range(1, 5):
            for block in self.get_submodule(f"layer{stage}").children():
                x = self._run(block, x)
        return x

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Map the output of `forward_features` to outputs of fc [N, num_features] or its inputs."""
        pooled = features.mean(dim=(2, 3))
        return pooled if self.fc is None else self.fc(pooled)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
