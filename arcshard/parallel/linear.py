"""A linear layer whose weight is split over ranks, by input or by output features.

    dim    weight         bias     takes x [..., in]    returns
    None   [out, in]      [out]    whole                whole [..., out]
    0      [out, in / n]  [out]    whole, or split (1)  whole [..., out]
    1, -1  [out / n, in]  [out/n]  whole                split [..., out / n], or whole (2)

(1) With input_is_split, x is what a column-parallel layer returns, so that the pair costs one
all-reduce. (2) With gather_output. Every rank of the group takes the same rows: where each rank has
a batch of its own, gather it first (docs/custom_parallel_layer.md).

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from arcshard.parallel.collectives import copy, gather_split, reduce, scatter
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.split import (
    ParallelDim,
    Split,
    check_dim,
    check_sizes,
    fill_split,
    local_part,
    mark_split,
    parallel_splits,
    register_parallel_dim,
)
from arcshard.parallel.state_dict import relocate_state_dict


class ParallelLinear(nn.Module):
    """y = x W^T + b, as nn.Linear.

    Args:
        in_features: Input features of the whole layer.
        out_features: Output features of the whole layer.
        bias: Whether there is a bias, as in nn.Linear.
        dim: None for replicated, 0 for row parallel (input features split), 1 or -1 for column
            parallel (output features split).
        gather_output: Whether every rank gets all output features (one all-gather); for dim=1 only.
        input_is_split: Whether x holds this rank's input features already; for dim=0 only.
        process_group: Ranks that share the layer; None for the default group.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: W, a DTensor where several ranks share it; weight.to_local() is this rank's part.
        bias: b or None; a DTensor likewise for dim=1.
        split: How the features are split, None if dim is None.

    Raises:
        ValueError: `dim` or a size is outside its domain, or an option does not go with `dim`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dim: ParallelDim = None,
        *,
        gather_output: bool = False,
        input_is_split: bool = False,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, out_features=out_features)
        self.dim = check_dim(dim, "input features", "output features")
        if gather_output and self.dim != 1:
            raise ValueError(f"gather_output=True with dim={dim!r}: only dim=1 leaves parts")
        if input_is_split and self.dim != 0:
            raise ValueError(f"input_is_split=True with dim={dim!r}: only dim=0 takes parts")
        self.in_features, self.out_features = in_features, out_features
        self.gather_output, self.input_is_split = gather_output, input_is_split

        shape = [out_features, in_features]
        self.split: Split | None = None
        if self.dim is not None:
            group = resolve_group(process_group)
            self.split = Split(1 - self.dim, shape[1 - self.dim], group)  # the weight's split
            shape[self.split.dim] = len(self.split.mine)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        if self.split is not None:
            register_parallel_dim(self, "weight", self.split)
            if bias and self.dim == 1:
                register_parallel_dim(self, "bias", self.split)
        self.reset_parameters()

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the layer, None where it is not split."""
        return None if self.split is None else self.split.group

    def reset_parameters(self) -> None:
        """Draws nn.Linear's initial values, uniform in +-1 / sqrt(in_features), for any split."""
        bound = 1 / math.sqrt(self.in_features)

        def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        fill_split(self.weight, self.split, draw)
        if self.bias is not None:
            fill_split(self.bias, self.split if self.dim == 1 else None, draw)

    def forward(self, x: Tensor) -> Tensor:
        """Computes [..., out] of x [..., in], whole or split as in the table of this module."""
        weight = local_part(self.weight)
        bias = None if self.bias is None else local_part(self.bias)
        if self.dim is None:
            return mark_split(linear(x, weight, bias), None)
        if self.dim == 1:
            return self.finish_columns(linear(copy(x, self.group), weight, bias))
        y = reduce(linear(self.my_features(x), weight), self.group)
        return mark_split(y if bias is None else y + bias.to(y.dtype), None)

    def finish_columns(self, y: Tensor) -> Tensor:
        """Returns, for dim=1, this rank's outputs marked as such, or all of them."""
        split = self.split
        assert split is not None
        split = Split(y.ndim - 1, split.size, split.group)
        if self.gather_output:
            return mark_split(gather_split(y, split), None)
        return mark_split(y, split)

    def my_features(self, x: Tensor) -> Tensor:
        """Returns, for dim=0, this rank's input features of x.

        Raises:
            ValueError: The last dimension of x is not in_features.
        """
        if self.input_is_split:
            return x
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: the last dimension should be "
                f"in_features={self.in_features} (input_is_split=True takes parts)"
            )
        return scatter(x, -1, self.group)

    def extra_repr(self) -> str:
        """Returns the text in the parentheses of print(model)."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dim={self.dim}"
        )
        if self.split is not None:
            text += f" (rank {self.split.rank} of {self.split.num_parts} has {self.split.mine})"
        return text


def convert_parallel_linear(
    model: nn.Module,
    dim: ParallelDim,
    *,
    gather_output: bool = True,
    process_group: dist.ProcessGroup | None = None,
) -> nn.Module:
    """Replaces every nn.Linear of a model by a ParallelLinear with parts of its values.

    Every rank passes the same model (the same seed, or the same weights loaded) and afterwards
    feeds it the same rows. Subclasses of nn.Linear stay as they are, because their owners may read
    the weights without calling the layer.

    Args:
        model: Changed in place. An nn.Linear itself is not changed; the new layer is returned.
        dim: As in ParallelLinear.
        gather_output: Whether outputs are whole, so that the following layers need no change; for
            dim=1. False leaves logits split for ParallelCrossEntropyLoss.
        process_group: Ranks that share the layers; None for the default group.

    Returns:
        The model, or the new layer.

    Raises:
        ValueError: `dim` is outside its domain, or a linear layer shares weights with another
            module.
    """
    dim = check_dim(dim, "input features", "output features")
    made: dict[int, ParallelLinear] = {}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))

    def convert(layer: nn.Linear, name: str) -> ParallelLinear:
        if id(layer) not in made:
            if any(len(owners[id(p)]) > 1 for p in layer.parameters()):
                raise ValueError(
                    f"{name or 'the layer'} shares its weights with another module, which a split "
                    "would part: untie them, or convert the other layers one by one"
                )
            made[id(layer)] = _converted(layer, dim, gather_output and dim == 1, process_group)
        return made[id(layer)]

    if type(model) is nn.Linear:
        return convert(model, "")
    for prefix, parent in list(model.named_modules()):
        for name, child in list(parent._modules.items()):  # named_children names a module only once
            if type(child) is nn.Linear:
                setattr(parent, name, convert(child, f"{prefix}.{name}".lstrip(".")))
    return model


def _converted(
    layer: nn.Linear, dim: ParallelDim, gather_output: bool, group: dist.ProcessGroup | None
) -> ParallelLinear:
    with torch.random.fork_rng(devices=[]):  # the layer's constructor draws from the default RNG
        new = ParallelLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            dim,
            gather_output=gather_output,
            process_group=group,
            device="meta",
            dtype=layer.weight.dtype,
        )
    parts = relocate_state_dict(new, layer.state_dict())
    whole = parts.keys() - parallel_splits(new).keys()  # these are still the layer's own
    new.load_state_dict(parts | {name: parts[name].clone() for name in whole}, assign=True)
    for name, parameter in layer.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.train(layer.training)
