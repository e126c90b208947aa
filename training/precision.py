"""Which numbers the backbone computes in: one policy, applied outside the models.

The body of the backbone runs under autocast for bf16 and fp16; its embedding layer and the loss
stay in fp32, weights are fp32 masters. The head's large matmuls take bf16 operands under bf16,
and under fp16 too where the GPU has bf16: softmax numerators outgrow fp16. fp64 is for proofs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import Backbone
from data.augment import normalise


@dataclass(frozen=True)
class Precision:
    """A precision by name.

    Attributes:
        name: fp32, bf16, fp16 or fp64.
        dtype: of weights, embeddings and loss.
        autocast: dtype of the backbone's body, or None.
        needs_scaler: gradients are scaled against underflow (fp16).
        head_matmul: dtype of the operands of the head's large matmuls, None for `dtype`. Their
            sums, the softmax and the class centres stay in `dtype`.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    needs_scaler: bool
    head_matmul: torch.dtype | None = None


POLICIES = {
    "fp32": Precision("fp32", torch.float32, None, False),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16, False, torch.bfloat16),
    "fp16": Precision("fp16", torch.float32, torch.float16, True),
    "fp64": Precision("fp64", torch.float64, None, False),
}


def choose_precision(wanted: str | None, fp16: bool, device: torch.device) -> tuple[Precision, str]:
    """The policy for the config's `precision` and `fp16`, and a warning (or "").

    An explicit `precision` wins. `fp16=True` alone means fp16 on CUDA; on a CPU, where half
    precision is slower than fp32, it means fp32.
    """
    if wanted is None and fp16 and device.type == "cuda":
        wanted = "fp16"
    if wanted is not None:
        policy = POLICIES[wanted]
        if wanted == "fp16" and device.type == "cuda" and torch.cuda.is_bf16_supported(False):
            policy = replace(policy, head_matmul=torch.bfloat16)
        return policy, ""
    if fp16:
        return POLICIES["fp32"], (
            "fp16=True on a CPU: training in fp32, which is faster there; "
            "precision=fp16 or precision=bf16 insists"
        )
    return POLICIES["fp32"], ""


class TrainedBackbone(nn.Module):
    """What DDP wraps: uint8 images in, embeddings of the policy's dtype out.

    Args:
        backbone: its parameters are trained; its state_dict is what model.pt holds.
        precision: the policy.
        freeze_batch_norm: batch norm always uses its running statistics and keeps them.
        mean, std: of pixel values 0..255, one number or one per RGB channel.
    """

    def __init__(
        self,
        backbone: Backbone,
        precision: Precision,
        freeze_batch_norm: bool = False,
        mean: float | tuple[float, ...] = 127.5,
        std: float | tuple[float, ...] = 127.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone.to(precision.dtype)
        self.precision = precision
        self.freeze_batch_norm = freeze_batch_norm
        self.is_usual = (mean, std) == (127.5, 127.5)
        for name, value in (("_mean", mean), ("_std", std)):
            numbers = torch.tensor(value, dtype=precision.dtype).reshape(1, -1, 1, 1)
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, H, W] -> embeddings [b, D]."""
        if self.is_usual:
            pixels = normalise(images, self.precision.dtype)
        else:
            mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
            pixels = images.to(self.precision.dtype).sub_(mean).div_(std)
        autocast = self.precision.autocast
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            features = self.backbone.forward_features(pixels)
        return self.backbone.forward_embedding(features.to(self.precision.dtype))

    def train(self, mode: bool = True) -> TrainedBackbone:
        """As nn.Module's, except that frozen batch norms stay in eval mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in batch_norms(self):
                module.eval()
        return self


def batch_norms(model: nn.Module) -> list[Any]:
    """The batch-norm layers of a model that keep running statistics, in order."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
