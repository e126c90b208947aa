"""What every backbone has in common: its sizes, its two halves, and recomputed activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class Backbone(nn.Module):
    """A network from images to embeddings, in two halves.

    `forward_features` is the body and may run under autocast; `forward_embedding` is the small end
    whose sums are long (a fully connected layer over the whole feature map, and norms), and which
    the trainer runs in fp32. A backbone itself never casts, never moves and never autocasts.

    Attributes:
        num_features: size of the embedding.
        input_size: height and width of the images, pixels.
        in_channels: channels of the images.
        gradient_checkpointing: recompute activations in backward instead of keeping them
            (training mode only; same gradients, about a third more time, far less memory).
    """

    # The options that get_model takes for this family beside its own.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    # Where a file of weights shows its sizes: [num_features], and [width, in_channels, ...].
    EMBEDDING_KEY: ClassVar[str]
    STEM_KEY: ClassVar[str]
    # What published weights of this family want, whose files do not say it: height and width in
    # pixels, and the mean and deviation of pixel values 0..255, one number or one per RGB channel.
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
        """Images [N, in_channels, input_size, input_size] -> the features of the body."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_features")

    def forward_embedding(self, features: Tensor) -> Tensor:
        """Features of `forward_features` -> embeddings [N, num_features], not normalized."""
        raise NotImplementedError(f"{type(self).__name__} has no forward_embedding")

    def layers_by_depth(self) -> list[tuple[str, ...]]:
        """Modules and parameters by name, in groups from the image to the embedding.

        Together they hold every parameter once; the last group ends in the embedding. Where a
        layer is deep, fine-tuning gives it a smaller learning rate (training/optimizer.py).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say the order of its layers")

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, in_channels, input_size, input_size] -> embeddings [N, num_features]."""
        return self.forward_embedding(self.forward_features(images))

    def _check_images(self, images: Tensor) -> None:
        """Say what is wrong with the shape here, not as a matmul error at the last layer.

        Raises:
            ValueError: the images are not [N, in_channels, input_size, input_size].
        """
        expected = (self.in_channels, self.input_size, self.input_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images of shape {list(images.shape)}, but this backbone takes "
                f"[N, {', '.join(map(str, expected))}]: resize them, or build it with another "
                "input_size or in_channels"
            )

    def _run(self, part: nn.Module, inputs: Tensor) -> Tensor:
        """`part(inputs)`, keeping only the inputs for backward when checkpointing is on."""
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
    """Recompute on throw-away copies of the running statistics.

    The second pass over the same batch would move them a second time, so that checkpointing would
    change the trained model. The copies are a few kilobytes per layer.
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
