"""The precision of the backbone: one policy, applied outside the models.

The body of the backbone runs under autocast for bf16 and fp16, or with TF32 products. Its embedding
layer and the loss stay in full fp32, and the weights are fp32 masters. The head's large matmuls
take bf16 operands under bf16, and also under fp16 where the GPU has bf16, because softmax
numerators exceed the range of fp16. Ranks exchange embeddings and losses in fp32; the sum of the
backbone's gradients has a separate dtype (`grad_reduce_dtype`). fp64 serves the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base import Backbone
from data.augment import normalize_images


@dataclass(frozen=True)
class Precision:
    """A precision by name.

    Attributes:
        name: "fp32", "tf32", "bf16", "fp16" or "fp64".
        dtype: dtype of weights, embeddings and loss.
        autocast: dtype of the backbone's body, or None.
        needs_scaler: Whether the loss is scaled against underflow of gradients (fp16).
        head_matmul: dtype of the operands of the head's large matmuls, None for `dtype`. Their
            sums, the softmax and the class centers stay in `dtype`.
        tf32: Whether products of fp32 numbers may round their factors to 10 bits (GPUs from Ampere
            on). This holds in the backbone's body and the head, not in the embedding layer.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    needs_scaler: bool
    head_matmul: torch.dtype | None = None
    tf32: bool = False


POLICIES = {
    "fp32": Precision("fp32", torch.float32, None, False),
    "tf32": Precision("tf32", torch.float32, None, False, tf32=True),
    "bf16": Precision("bf16", torch.float32, torch.bfloat16, False, torch.bfloat16),
    "fp16": Precision("fp16", torch.float32, torch.float16, True),
    "fp64": Precision("fp64", torch.float64, None, False),
}


def choose_precision(wanted: str | None, fp16: bool, device: torch.device) -> tuple[Precision, str]:
    """Choose the policy for the config's `precision` and `fp16`.

    An explicit `precision` wins, except that tf32 on a CPU means fp32. `fp16=True` alone means fp16
    on a GPU. With neither, a GPU that has bf16 uses it. On a CPU `fp16=True` and the default mean
    fp32, because most CPUs have no fast half precision.

    Returns:
        The policy, and a warning or "".
    """
    on_gpu = device.type == "cuda"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "tf32" and not on_gpu:
        return POLICIES["fp32"], "precision=tf32: a CPU has no TF32, training in fp32"
    if wanted is None and fp16 and not on_gpu:
        return POLICIES["fp32"], (
            "fp16=True on a CPU: training in fp32, which is faster on most; "
            "precision=fp16 or precision=bf16 insists"
        )
    return named_policy(wanted or ("fp16" if fp16 else None), has_bf16), ""


def named_policy(name: str | None, has_bf16: bool) -> Precision:
    """Return the policy of that name; None means bf16 where the GPU has it, else fp32."""
    policy = POLICIES[name or ("bf16" if has_bf16 else "fp32")]
    if policy.name == "fp16" and has_bf16:
        policy = replace(policy, head_matmul=torch.bfloat16)
    return policy


def allow_tf32(allowed: bool) -> None:
    """Set whether products of fp32 tensors on GPUs may be TF32.

    PyTorch itself allows it for convolutions from the start. These are the older names of the
    switches: torch 2.13's compiler reads them, and refuses to after the newer ones were used.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Allow TF32 inside the context and forbid it afterwards; do nothing if not `allowed`."""
    if allowed:
        allow_tf32(True)
    try:
        yield
    finally:
        if allowed:
            allow_tf32(False)


class _FromHereOnTF32(torch.autograd.Function):
    """The identity. It sets whether TF32 is allowed from there on, and the reverse in backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, allowed: bool) -> Tensor:
        ctx.allowed = allowed
        allow_tf32(allowed)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        allow_tf32(not ctx.allowed)
        return gradients[0], None


class MixedPrecisionBackbone(nn.Module):
    """The module that DDP wraps: uint8 images in, embeddings of the policy's dtype out.

    Args:
        backbone: The network whose parameters are trained. Its state_dict is what model.pt holds.
        precision: The policy.
        freeze_batch_norm: Whether batch norm uses its running statistics and never updates them.
        channels_last: Whether the body's input is in channels_last format.
        mean: Mean of pixel values 0..255, one number or one per RGB channel.
        std: Standard deviation of pixel values 0..255, one number or one per RGB channel.
    """

    def __init__(
        self,
        backbone: Backbone,
        precision: Precision,
        freeze_batch_norm: bool = False,
        channels_last: bool = True,
        mean: float | tuple[float, ...] = 127.5,
        std: float | tuple[float, ...] = 127.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone.to(precision.dtype)
        self.precision = precision
        self.freeze_batch_norm = freeze_batch_norm
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.is_usual = (mean, std) == (127.5, 127.5)
        for name, value in (("_mean", mean), ("_std", std)):
            numbers = torch.tensor(value, dtype=precision.dtype).reshape(1, -1, 1, 1)
            self.register_buffer(name, numbers, persistent=False)

    def place(self, device: torch.device | None = None) -> None:
        """Move to `device` (None keeps it), with weights in the memory format of the input."""
        # torch's stubs know memory_format only together with a tensor.
        self.to(device, memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 images [b, 3, H, W] to embeddings [b, D]."""
        if self.is_usual:
            pixels = normalize_images(images, self.precision.dtype)
        else:
            mean, std = self.get_buffer("_mean"), self.get_buffer("_std")
            pixels = images.to(self.precision.dtype).sub_(mean).div_(std)
        pixels = pixels.contiguous(memory_format=self.memory_format)
        autocast = self.precision.autocast
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            features = self.backbone.forward_features(pixels)
        return self._embed(features.to(self.precision.dtype))

    @torch.compiler.disable  # its switches are not part of a graph
    def _embed(self, features: Tensor) -> Tensor:
        """Apply the embedding layer in full precision."""
        if not self.precision.tf32:
            return self.backbone.forward_embedding(features)
        features = _FromHereOnTF32.apply(features, False)
        embeddings: Tensor = _FromHereOnTF32.apply(self.backbone.forward_embedding(features), True)
        return embeddings

    def train(self, mode: bool = True) -> MixedPrecisionBackbone:
        """Set the mode as nn.Module does, except that frozen batch norms stay in eval mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in batch_norms(self):
                module.eval()
        return self


def batch_norms(model: nn.Module) -> list[Any]:
    """Return the batch norms of a model that keep running statistics, in order."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
