"""From a backbone to a function that embeds uint8 images: the one door evaluation goes through."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Channels = float | Sequence[float]


class Embedder:
    """Callable `uint8 [n, 3, H, W] -> embeddings [n, D]` around a backbone.

    The backbone is used as it stands, training or not: every call puts its modules into eval
    mode and gives each its own mode back afterwards, also when the call fails, so a training
    loop can verify between two steps (layers it keeps frozen stay frozen).

    Args:
        backbone: takes normalised images [n, 3, H, W], gives [n, D]. Give the module itself, not
            its DDP wrapper: an evaluation needs no collective of its own.
        mean, std: of the pixel values in units of 0..255, one number or one per RGB channel; the
            backbone sees (pixel - mean) / std.
        device: where images are sent; by default where the backbone's first parameter is.
        autocast: dtype for `torch.autocast` (bfloat16, float16), or None for the backbone's own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mean: Channels = 127.5,
        std: Channels = 127.5,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        parameter = next(backbone.parameters(), None)
        self.backbone = backbone
        self.device = torch.device(
            device if device is not None else "cpu" if parameter is None else parameter.device
        )
        # float64 backbones (the tests' exact mode) get float64 images, all others float32.
        is_double = parameter is not None and parameter.dtype == torch.float64
        self.dtype = torch.float64 if is_double else torch.float32
        self.autocast = autocast
        self.mean = self._per_channel("mean", mean)  # [1, 3 or 1, 1, 1]
        self.std = self._per_channel("std", std)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std is {std}; it must be positive (127.5 for the usual models)")

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings [n, D] of uint8 RGB `images` [n, 3, H, W], on the embedder's device.

        float64 from a float64 backbone, float32 from any other, whatever the autocast.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images have shape {list(images.shape)} and dtype {images.dtype}; "
                "give uint8 [n, 3, height, width] with values 0..255"
            )
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    self.device.type, dtype=self.autocast, enabled=self.autocast is not None
                ),
            ):
                pixels = images.to(self.device, non_blocking=True).to(self.dtype)
                embeddings = self.backbone((pixels - self.mean) / self.std)
        finally:
            for module, mode in modes:
                module.training = mode
        return embeddings if embeddings.dtype == torch.float64 else embeddings.float()

    def _per_channel(self, name: str, value: Channels) -> Tensor:
        numbers = torch.as_tensor(value, dtype=self.dtype, device=self.device).reshape(1, -1, 1, 1)
        if numbers.shape[1] not in (1, 3):
            raise ValueError(
                f"{name} has {numbers.shape[1]} values; give one number or one per RGB channel"
            )
        return numbers
