"""MobileFaceNet: inverted residuals and a global depthwise convolution, mbf and mbf_large.

The network is that of Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face
Verification on Mobile Devices", 2018. Names and shapes of the parameters are those of
arcface_torch, so its published weights load unchanged; this is also why `layers` are nested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from backbones.base import Backbone
from utils.errors import UserError

# Blocks per resolution, and the factor on the widths 64 and 128 (hidden widths do not scale).
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "mbf": {"blocks": (1, 4, 6, 2), "scale": 2},
    "mbf_large": {"blocks": (2, 8, 12, 4), "scale": 4},
}


class _Layers(nn.Module):
    """A chain of modules stored under `layers`."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*modules)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class ConvBlock(_Layers):
    """Convolution, norm and PReLU, padded so that only the stride reduces the size of the map."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.PReLU(out_channels),
        )


class LinearBlock(_Layers):
    """Convolution and norm, without activation and without padding."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        )


class DepthWise(_Layers):
    """Inverted residual: widen to `hidden`, 3 x 3 depthwise convolution with the stride, narrow.

    The inputs are added to the outputs if `residual` is set.
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, stride: int, residual: bool
    ) -> None:
        super().__init__(
            ConvBlock(in_channels, hidden),
            ConvBlock(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            LinearBlock(hidden, out_channels),
        )
        self.residual = residual

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the block to feature maps [N, in, H, W]."""
        outputs = self.layers(inputs)
        return inputs + outputs if self.residual else outputs


class Residual(_Layers):
    """A chain of `blocks` residual DepthWise blocks at one width and resolution."""

    def __init__(self, channels: int, blocks: int, hidden: int) -> None:
        super().__init__(
            *(DepthWise(channels, channels, hidden, 1, residual=True) for _ in range(blocks))
        )


class GDC(_Layers):
    """Global depthwise convolution: [N, 512, grid, grid] -> embeddings [N, num_features]."""

    def __init__(self, grid: int, num_features: int) -> None:
        super().__init__(
            LinearBlock(512, 512, kernel=grid, groups=512),
            nn.Flatten(),
            nn.Linear(512, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )


class MobileFaceNet(Backbone):
    """MobileFaceNet of arcface_torch: 112 x 112 becomes 7 x 7 before the global convolution.

    Args:
        blocks: Residual blocks at each of the four resolutions.
        scale: Factor on the widths of the original paper.
        num_features: Size of the embedding.
        dropout: Must be 0, because the published network has no dropout.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether training recomputes activations in backward.

    Raises:
        UserError: `dropout` is not 0.
    """

    EMBEDDING_KEY: ClassVar[str] = "features.layers.3.weight"
    STEM_KEY: ClassVar[str] = "layers.0.layers.0.weight"

    def __init__(
        self,
        blocks: Sequence[int],
        scale: int,
        *,
        num_features: int = 512,
        dropout: float = 0.0,
        input_size: int = 112,
        in_channels: int = 3,
        gradient_checkpointing: bool = False,
    ) -> None:
        if dropout:
            raise UserError(f"dropout={dropout}, but MobileFaceNet has no dropout layer: pass 0")
        super().__init__(num_features, input_size, in_channels, gradient_checkpointing)
        narrow, wide = 64 * scale, 128 * scale
        self.layers = nn.ModuleList(
            [
                ConvBlock(in_channels, narrow, kernel=3, stride=2),
                ConvBlock(narrow, narrow, kernel=3, groups=64)
                if blocks[0] == 1
                else Residual(narrow, blocks[0], hidden=128),
                DepthWise(narrow, narrow, hidden=128, stride=2, residual=False),
                Residual(narrow, blocks[1], hidden=128),
                DepthWise(narrow, wide, hidden=256, stride=2, residual=False),
                Residual(wide, blocks[2], hidden=256),
                DepthWise(wide, wide, hidden=512, stride=2, residual=False),
                Residual(wide, blocks[3], hidden=256),
            ]
        )
        self.conv_sep = ConvBlock(wide, 512)
        self.features = GDC(math.ceil(input_size / 16), num_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # as published; no layer has a bias
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Return the eight parts of `layers` (stem, then by resolution) and the embedding layer."""
        parts = [(f"layers.{part}",) for part in range(len(self.layers))]
        return [*parts, ("conv_sep", "features")]

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [N, C, S, S] to features [N, 128 * scale, ceil(S / 16), ceil(S / 16)]."""
        self._check_images(images)
        x = images
        for part in self.layers:
            x = self._run(part, x)
        return x

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Map the output of `forward_features` to embeddings [N, num_features].

        This half begins at `conv_sep`, where the published code leaves fp16.
        """
        return self.features(self.conv_sep(features))
