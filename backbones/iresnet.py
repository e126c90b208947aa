"""IResNet: the improved residual network of the ArcFace papers, r18 to r2060, and r_nano for CPUs.

The network is that of Duta et al., "Improved Residual Networks for Image and Video Recognition",
2020, with the block of Deng et al., "ArcFace", 2019 (BN, conv, BN, PReLU, conv, BN). Names and
shapes of the parameters are those of arcface_torch, so its published weights load unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from backbones.base import Backbone

# Blocks per stage, and the width of the first stage (each further stage doubles it).
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "r18": {"layers": (2, 2, 2, 2)},
    "r34": {"layers": (3, 4, 6, 3)},
    "r50": {"layers": (3, 4, 14, 3)},
    "r100": {"layers": (3, 13, 30, 3)},
    "r200": {"layers": (6, 26, 60, 6)},
    "r2060": {"layers": (3, 128, 896, 3)},
    # Not a published network: small enough to train on a laptop CPU.
    "r_nano": {"layers": (1, 2, 2, 1), "width": 16},
}


class IBasicBlock(nn.Module):
    """Residual block, [N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)].

    The second convolution has the stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block to feature maps [N, in, H, W]."""
        hidden = self.prelu(self.bn2(self.conv1(self.bn1(inputs))))
        shortcut = inputs if self.downsample is None else self.downsample(inputs)
        return self.bn3(self.conv2(hidden)) + shortcut


class IResNet(Backbone):
    """IResNet with four stages, each of which halves the image: 112 x 112 becomes 7 x 7.

    Args:
        layers: Blocks in each of the four stages.
        width: Channels of the stem and the first stage.
        num_features: Size of the embedding.
        dropout: Probability on the flattened features before the fully connected layer.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether training recomputes activations in backward.
        zero_init_residual: Whether every block starts as its shortcut (the scale of its middle norm
            is 0).
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("zero_init_residual",)
    EMBEDDING_KEY: ClassVar[str] = "features.weight"
    STEM_KEY: ClassVar[str] = "conv1.weight"

    def __init__(
        self,
        layers: Sequence[int],
        *,
        width: int = 64,
        num_features: int = 512,
        dropout: float = 0.0,
        input_size: int = 112,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__(num_features, input_size, in_channels, gradient_checkpointing)
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.layer1 = _stage(width, width, layers[0])
        self.layer2 = _stage(width, 2 * width, layers[1])
        self.layer3 = _stage(2 * width, 4 * width, layers[2])
        self.layer4 = _stage(4 * width, 8 * width, layers[3])
        self.bn2 = nn.BatchNorm2d(8 * width)
        self.dropout = nn.Dropout(dropout)
        grid = math.ceil(input_size / 16)  # four convolutions of stride 2, each rounding up
        self.fc = nn.Linear(8 * width * grid * grid, num_features)
        self.features = nn.BatchNorm1d(num_features)
        # The head divides by the length of an embedding, so a trained scale would only drift.
        self.features.weight.requires_grad = False
        self._initialize(zero_init_residual)

    def _initialize(self, zero_init_residual: bool) -> None:
        """Initialize as published: convolutions N(0, 0.1^2), norms 1 and 0, fc as in torch."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, IBasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Return the stem, the four stages, and the embedding layer with the norms around it."""
        stages = [(f"layer{stage}",) for stage in range(1, 5)]
        return [("conv1", "bn1", "prelu"), *stages, ("bn2", "fc", "features")]

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [N, C, S, S] to features [N, 8 * width, ceil(S / 16), ceil(S / 16)]."""
        self._check_images(images)
        x = self.prelu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = self._run(block, x)
        return self.bn2(x)

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Map the output of `forward_features` to embeddings [N, num_features]."""
        return self.features(self.fc(self.dropout(features.flatten(1))))


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    first = IBasicBlock(in_channels, out_channels, stride=2)
    rest = [IBasicBlock(out_channels, out_channels, stride=1) for _ in range(1, blocks)]
    return nn.Sequential(first, *rest)
