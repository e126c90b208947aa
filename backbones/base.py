"""The base class of all backbones: sizes, two halves, and recomputed activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """A network from images to embeddings, in two halves.

    `forward_features` is the body and may run under autocast. `forward_embedding` is the small end
    with the long sums: norms and a fully connected layer over the whole feature map. The trainer
    runs it in fp32. A backbone itself never casts, never changes its device and never autocasts.

    Attributes:
        num_features: Size of the embedding.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether backward recomputes activations instead of keeping them.
            This holds in training mode only; the gradients are the same, the time is about a third
            longer, and the memory is far less.
    """

    # The options that get_model takes for this family beside its own.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    # Keys whose tensors show the sizes of a file of weights: their shapes are [num_features] and
    # [width, in_channels, ...].
    EMBEDDING_KEY: ClassVar[str]
    STEM_KEY: ClassVar[str]
    # Published weights of this family expect these, but their files do not say so: height and
    # width in pixels, and mean and standard deviation of pixel values 0..255, one number or one
    # per RGB channel.
    PUBLISHED_BY: ClassVar[str] = "arcface_torch"
    INPUT_SIZE: ClassVar[int] = 112
    MEAN: ClassVar[float | tuple[float, ...]] = 127.5
    STD: ClassVar[float | tuple[float, ...]] = 127.5
    # The layer whose outputs are logits, where there is one: classification trains it as its head.
    CLASSIFIER: ClassVar[str | None] = None

    def __init__(
        self, num_features: int, input_size: int, in_channels: int, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.input_size = input_size
        self.in_channels = in_channels
        self.gradient_checkpointing = gradient_checkpointing

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [N, in_channels, input_size, input_size] to the features of the body."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_features")

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Map the output of `forward_features` to embeddings [N, num_features], not normalized."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_embedding")

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Return names of modules and parameters in groups, from the image to the embedding.

        The groups together hold every parameter once, and the last group ends in the embedding.
        Fine-tuning chooses a layer's learning rate by its group (training/optimizer.py).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say the order of its layers")

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, in_channels, input_size, input_size] to embeddings [N, num_features]."""
        return self.forward_embedding(self.forward_features(images))

    def _check_images(self, images: Tensor) -> None:
        """Check the shape here, so that the error is not a matmul error at the last layer.

        Raises:
            ValueError: The images are not [N, in_channels, input_size, input_size].
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {list(images.shape)}, but this backbone takes "
                f"[N, {', '.join(map(str, expected))}]: resize them, or build it with another "
                "input_size or in_channels"
            )

    def _run(self, part: nn.Module, inputs: Tensor) -> Tensor:
        """Run `part(inputs)`; with checkpointing, keep only the inputs for backward."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(
                part, inputs, use_reentrant=False, context_fn=_recompute_contexts(part)
            )
        return part(inputs)


def _recompute_contexts(part: nn.Module) -> Callable[[], tuple[Any, Any]]:
    # (context of the first pass, context of the recomputation in backward)
    return lambda: (nullcontext(), _spare_batch_norm_buffers(part))


@contextmanager
def _spare_batch_norm_buffers(part: nn.Module) -> Iterator[None]:
    """Recompute on temporary copies of the running statistics.

    The second pass over the same batch would update them a second time, so that checkpointing
    would change the trained model. The copies are a few kilobytes per layer.
    """
    norms = [module for module in part.modules() if isinstance(module, _NormBase)]
    kept = [dict(module._buffers) for module in norms]
    for module, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for module, buffers in zip(norms, kept, strict=True):
            module._buffers.update(buffers)
