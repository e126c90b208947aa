"""A linear layer whose weight is spread over ranks, by input or by output features.

    dim    weight         bias     takes x [..., in]    gives
    None   [out, in]      [out]    whole                whole [..., out]
    0      [out, in / n]  [out]    whole, or split (1)  whole [..., out]
    1, -1  [out / n, in]  [out/n]  whole                split [..., out / n], or whole (2)

(1) with input_is_split: what a column-parallel layer leaves, so that the pair costs one all-reduce.
(2) with gather_output. Every rank of the group brings the same rows: where each has a batch of its
own, gather it first (docs/custom_parallel_layer.md).

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import linear

from arcshard.parallel.collectives import copy, gather, reduce, scatter
from arcshard.parallel.groups import resolve_group
from arcshard.parallel.split import (
    ParallelDim,
    Split,
    check_dim,
    check_sizes,
    fill_split,
    mark_split,
    register_parallel_dim,
)


class ParallelLinear(nn.Module):
    """y = x W^T + b, as nn.Linear.

    Args:
        in_features, out_features: of the whole layer. bias: as nn.Linear.
        dim: None replicated, 0 row parallel (input features split), 1 or -1 column parallel
            (output features split).
        gather_output: dim=1 only: every rank gets all output features (one all-gather).
        input_is_split: dim=0 only: x holds this rank's input features already.
        process_group: ranks that share the layer; None for the default group.
        device, dtype: of the parameters.

    Attributes:
        weight, bias: this rank's parts. split: of the features, None if dim is None.

    Raises:
        ValueError: `dim` or a size outside its domain, an option that does not go with `dim`.
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
        self.group = resolve_group(process_group)

        shape = [out_features, in_features]
        self.split: Split | None = None
        if self.dim is not None:
            self.split = Split(1 - self.dim, shape[1 - self.dim], self.group)  # of the weight
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

    def reset_parameters(self) -> None:
        """nn.Linear's: uniform in +-1 / sqrt(in_features), whatever the split."""
        bound = 1 / math.sqrt(self.in_features)

        def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        fill_split(self.weight, self.split, draw)
        if self.bias is not None:
            fill_split(self.bias, self.split if self.dim == 1 else None, draw)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] (or parts of it, as the table above says)."""
        if self.dim is None:
            return mark_split(linear(x, self.weight, self.bias), None)
        if self.dim == 1:
            return self.finish_columns(linear(copy(x, self.group), self.weight, self.bias))
        y = reduce(linear(self.my_features(x), self.weight), self.group, in_place=True)
        return mark_split(y if self.bias is None else y + self.bias.to(y.dtype), None)

    def finish_columns(self, y: Tensor) -> Tensor:
        """dim=1: this rank's outputs, marked as such, or all of them."""
        split = self.split
        assert split is not None
        if self.gather_output:
            sizes = [len(part) for part in split.parts]
            return mark_split(gather(y, -1, split.group, sizes=sizes), None)
        return mark_split(y, Split(y.ndim - 1, split.size, split.group))

    def my_features(self, x: Tensor) -> Tensor:
        """dim=0: this rank's input features of x."""
        if self.input_is_split:
            return x
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: the last dimension should be "
                f"in_features={self.in_features} (input_is_split=True takes parts)"
            )
        return scatter(x, -1, self.group)

    def extra_repr(self) -> str:
        """For print(model)."""
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
    """The model with every nn.Linear in it replaced by a ParallelLinear with parts of its values.

    Every rank brings the same model (the same seed, or the same weights loaded) and afterwards
    feeds it the same rows. Subclasses of nn.Linear stay as they are: their owners read the
    weights behind the layer's back.

    Args:
        model: changed in place; an nn.Linear itself is not changed, the new layer is returned.
        dim: as ParallelLinear's.
        gather_output: for dim=1: outputs are whole, so that what follows need not know. False
            leaves logits split for ParallelCrossEntropyLoss.

    Raises:
        ValueError: a bad `dim`; weights shared between a linear layer and another module.
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
        for name, child in list(parent._modules.items()):  # named_children skips second names
            if type(child) is nn.Linear:
                setattr(parent, name, convert(child, f"{prefix}.{name}".lstrip(".")))
    return model


def _converted(
    layer: nn.Linear, dim: ParallelDim, gather_output: bool, group: dist.ProcessGroup | None
) -> ParallelLinear:
    weight, bias = layer.weight, layer.bias
    with torch.random.fork_rng(devices=[]):  # initial values are drawn in vain
        new = ParallelLinear(
            layer.in_features,
            layer.out_features,
            bias is not None,
            dim,
            gather_output=gather_output,
            process_group=group,
            device="meta",
            dtype=weight.dtype,
        )
    split = new.split

    def part(whole: Tensor, is_split: bool) -> nn.Parameter:
        value = split.take(whole) if split is not None and is_split else whole
        return nn.Parameter(value.detach().clone(), whole.requires_grad)

    new.weight = part(weight, True)
    if bias is not None:
        new.bias = part(bias, new.dim == 1)
    return new.train(layer.training)
