"""Multiply-accumulates (MACs) of a network, counted on the meta device: no memory, no arithmetic.

One MAC is two floating-point operations, a product and a sum. The "GFLOPs" published with face
recognition networks (r50 6.3, ViT-B 11.4) are GMACs. They include two for every element of a batch
norm and one for every element of a PReLU, which is what the tool of their authors counted. That is
up to 0.3 % more (mbf: 3 %), and it shows in the published digits of r200.

The MACs here are those of convolutions, linear layers, and the two products of attention. Norms,
activations, softmax, biases, additions and the mirrored image are not counted. They are few of the
operations, but a larger part of the time, because they are bound by memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Attention on the meta device is written out, as two batched products.
_KINDS = {
    "aten.convolution": "convolution",
    "aten.mm": "linear",
    "aten.addmm": "linear",
    "aten.bmm": "attention",
    "aten.baddbmm": "attention",
}


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass over one image.

    Attributes:
        convolution: MACs of convolutions.
        linear: MACs of linear layers.
        attention: MACs of the two products of attention.
        elements: Elementwise operations of batch norms and PReLUs that published numbers include.
    """

    convolution: int = 0
    linear: int = 0
    attention: int = 0
    elements: int = 0

    @property
    def total(self) -> int:
        """All multiply-accumulates."""
        return self.convolution + self.linear + self.attention

    @property
    def as_published(self) -> int:
        """The number that publications of these networks call FLOPs."""
        return self.total + self.elements


def count_macs(network: nn.Module, input_size: int, in_channels: int = 3) -> Macs:
    """Count the MACs of one image in inference.

    Args:
        network: A network on the meta device, such as `get_model` makes under
            `torch.device("meta")`. It takes images [1, in_channels, input_size, input_size].
        input_size: Height and width of the image in pixels.
        in_channels: Channels of the image.

    Returns:
        The counts by kind of layer.

    Raises:
        ValueError: The network is not on the meta device, or has a product of another kind.
    """
    devices = {parameter.device.type for parameter in network.parameters()}
    if devices - {"meta"}:
        raise ValueError(f'the network is on {devices}: build it under torch.device("meta")')
    was_training = network.training
    network.eval()
    images = torch.empty(1, in_channels, input_size, input_size, device="meta")
    elements = 0

    def count_elements(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal elements
        elements += output.numel() * (1 if isinstance(module, nn.PReLU) else 2)

    hooks = [
        module.register_forward_hook(count_elements)
        for module in network.modules()
        if isinstance(module, nn.PReLU | nn.modules.batchnorm._BatchNorm)
    ]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(images)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    found = dict.fromkeys(Macs._fields, 0)
    found["elements"] = elements
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind = _KINDS.get(str(operation))
        if kind is None:
            raise ValueError(f"{operation} has products, but backbones/macs.py has no kind for it")
        found[kind] += flops // 2
    return Macs(**found)
