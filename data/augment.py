"""From decoded images to what the network sees."""

from __future__ import annotations

import cv2
import numpy as np
import torch


def write_flipped(image: np.ndarray, out: np.ndarray) -> None:
    """Write the mirror image (left and right exchanged) of uint8 [H, W, 3] into `out`."""
    cv2.flip(image, 1, dst=out)


def normalise(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(x - 127.5) / 127.5 on the device and in the memory layout of `images` (uint8 [B, 3, H, W]).

    Every uint8 value less 127.5 is exact in bfloat16 and float16 too, so the only rounding is
    that of the result.
    """
    return images.to(dtype).sub_(127.5).div_(127.5)
