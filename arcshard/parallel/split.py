"""How a parameter or an activation is split over ranks, and which part this rank has.

Parts are those of `Shard` in torch.distributed.tensor (arcshard/shard.py): ceil(size / n) entries
per rank, and fewer or none on the last ranks. A split parameter is a DTensor, so that state dicts,
gradient clipping, torch.optim and FSDP2 know the whole; `parameter.to_local()` is this rank's part.
In a group of one rank it is an ordinary parameter. Activations are this rank's part as a plain
tensor, and `split_of` says of what.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from arcshard.shard import class_range

ParallelDim = int | None
ROWS_PER_DRAW = 256
_MESHES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, DeviceMesh]] = (
    weakref.WeakKeyDictionary()
)


def size_of(group: dist.ProcessGroup | None) -> int:
    """Returns the number of ranks of a group, 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def mesh_of(group: dist.ProcessGroup, device: torch.device | str | None = None) -> DeviceMesh:
    """Returns the one-dimensional mesh over the ranks of a group, the same object at every call.

    Args:
        group: The ranks. For a group of `init_process_group` it is a dimension of its mesh.
        device: Device of the tensors; None or "meta" for a GPU where the group uses NCCL, else CPU.
    """
    kind = "meta" if device is None else torch.device(device).type
    if kind == "meta":
        kind = "cuda" if "nccl" in dist.get_backend(group) else "cpu"
    meshes = _MESHES.setdefault(group, {})
    if kind not in meshes:
        meshes[kind] = DeviceMesh.from_group(group, kind)
    return meshes[kind]


def remember_mesh(mesh: DeviceMesh) -> None:
    """Makes `mesh_of` return this one-dimensional mesh for its group."""
    _MESHES.setdefault(mesh.get_group(), {})[mesh.device_type] = mesh


@dataclass(frozen=True)
class Split:
    """One dimension of a tensor, split over the ranks of a group.

    Args:
        dim: The dimension, counted from 0 on the tensor itself.
        size: Its length before the split.
        group: Ranks that share it; None for one process without torch.distributed.
    """

    dim: int
    size: int
    group: dist.ProcessGroup | None

    @property
    def num_parts(self) -> int:
        """Number of ranks that share the dimension."""
        return size_of(self.group)

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def parts(self) -> list[range]:
        """The range of entries that each rank owns, in rank order."""
        return [class_range(self.size, rank, self.num_parts) for rank in range(self.num_parts)]

    @property
    def mine(self) -> range:
        """The range of entries that this rank owns, possibly empty."""
        return class_range(self.size, self.rank, self.num_parts)

    @property
    def several(self) -> dist.ProcessGroup | None:
        """The group if it has other ranks than this one, else None."""
        return self.group if self.num_parts > 1 else None

    @property
    def placement(self) -> Shard:
        """The DTensor placement of the dimension."""
        return Shard(self.dim)

    def take(self, whole: Tensor) -> Tensor:
        """Returns this rank's part of a whole tensor, as a view.

        Raises:
            ValueError: The tensor has another size.
        """
        if whole.shape[self.dim] != self.size:
            raise ValueError(
                f"a tensor of shape {tuple(whole.shape)}: dimension {self.dim} should have "
                f"{self.size} entries, the whole before it is split over {self.num_parts} ranks"
            )
        return whole.narrow(self.dim, self.mine.start, len(self.mine))

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        """Returns itself: process groups cannot be copied, and copies of a layer share them."""
        return self


# --- parameters -----------------------------------------------------------------------------


def register_parallel_dim(module: nn.Module, name: str, split: Split) -> None:
    """Registers that parameter `name` of `module` is this rank's part of a larger tensor.

    Where several ranks share it, the parameter becomes a DTensor over the same storage.

    Args:
        module: The module that has the parameter.
        name: Name of the parameter in the module.
        split: How the parameter is split.

    Raises:
        ValueError: There is no such parameter, or its shape is not that of this rank's part.
    """
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    if parameter is None:
        raise ValueError(
            f"{type(module).__name__} has no parameter {name!r} of its own: set it first"
        )
    if parameter.ndim <= split.dim or parameter.shape[split.dim] != len(split.mine):
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, but rank {split.rank} of "
            f"{split.num_parts} owns {len(split.mine)} of {split.size} entries of dimension "
            f"{split.dim}: make it that size"
        )
    if split.several is not None:
        sharded = as_dtensor(parameter.detach(), split, mesh_of(split.several, parameter.device))
        setattr(module, name, nn.Parameter(sharded, parameter.requires_grad))
    module.__dict__.setdefault("_parallel_splits", {})[name] = split


def parallel_splits(model: nn.Module) -> dict[str, Split]:
    """Returns every split parameter's `Split` by the parameter's name in the state dict."""
    return {
        f"{prefix}.{name}" if prefix else name: split
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, split in module.__dict__.get("_parallel_splits", {}).items()
    }


def get_parallel_dim(module: nn.Module, name: str) -> ParallelDim:
    """Returns the dimension along which a parameter is split, None where it is whole."""
    split: Split | None = module.__dict__.get("_parallel_splits", {}).get(name)
    return None if split is None else split.dim


def placements(model: nn.Module) -> dict[str, Placement]:
    """Returns the placement of each parameter on its group's mesh."""
    splits = parallel_splits(model)
    return {
        name: splits[name].placement if name in splits else Replicate()
        for name, _ in model.named_parameters(remove_duplicate=False)
    }


def as_dtensor(local: Tensor, split: Split, mesh: DeviceMesh) -> DTensor:
    """Returns this rank's part as a DTensor over the same storage, for torch.distributed's tools.

    Args:
        local: This rank's part; a DTensor is returned as it is.
        split: How the tensor is split.
        mesh: One-dimensional mesh over the ranks of `split.group`.
    """
    if isinstance(local, DTensor):
        return local
    shape = list(local.shape)
    shape[split.dim] = split.size
    whole = torch.empty(shape, device="meta")  # for its strides
    return DTensor.from_local(
        local, mesh, [split.placement], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def local_part(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a DTensor, with the gradient of a part; others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    part: Tensor = _LocalPart.apply(tensor)
    return part


class _LocalPart(torch.autograd.Function):
    """DTensor.to_local, whose gradient torch 2.11 makes a whole one where parts are uneven."""

    @staticmethod
    def forward(ctx: Any, whole: DTensor) -> Tensor:
        ctx.like = whole.device_mesh, whole.placements, whole.shape, whole.stride()
        part = whole.to_local()
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> DTensor:
        mesh, placements, shape, stride = ctx.like
        return DTensor.from_local(
            gradients[0].contiguous(),
            mesh,
            placements,
            run_check=False,
            shape=shape,
            stride=stride,
        )


def fill_split(
    parameter: Tensor, split: Split | None, draw: Callable[[Sequence[int], torch.Generator], Tensor]
) -> None:
    """Fills a parameter with initial values that do not depend on the split.

    The ranks hold parts of one whole tensor, which is never held whole. Each block of rows of the
    whole has its own seed, derived from a draw of torch's default RNG, so the ranks must have been
    seeded alike (torch.manual_seed).

    Args:
        parameter: This rank's part or a DTensor, at least one-dimensional; written in place.
        split: How the parameter is split, None for a whole one.
        draw: Function of (shape, CPU generator) that returns values. It is called with the shapes
            of blocks of rows of the whole.
    """
    seed = int(torch.randint(2**62, ()))
    parameter = local_part(parameter.detach())
    if parameter.is_meta:
        return
    shape = list(parameter.shape)
    if split is not None:
        shape[split.dim] = split.size
    rows = range(shape[0]) if split is None or split.dim != 0 else split.mine
    generator = torch.Generator()
    for start in range(rows.start // ROWS_PER_DRAW * ROWS_PER_DRAW, rows.stop, ROWS_PER_DRAW):
        generator.manual_seed(seed + start)
        block = draw([ROWS_PER_DRAW, *shape[1:]], generator)
        low, high = max(start, rows.start), min(start + ROWS_PER_DRAW, rows.stop)
        block = block[low - start : high - start]
        if split is not None and split.dim != 0:
            block = split.take(block)
        parameter[low - rows.start : high - rows.start].copy_(block)


# --- activations ----------------------------------------------------------------------------


def mark_split(tensor: Tensor, split: Split | None) -> Tensor:
    """Marks how a layer's output is split (None for whole on every rank), and returns it.

    The mark is an attribute of this tensor object and is lost in the next operation. A loss that
    gets the output directly from the layer reads it.
    """
    tensor.parallel_split = split  # type: ignore[attr-defined]
    return tensor


def is_marked(tensor: Tensor) -> bool:
    """Returns whether `mark_split` was called on this very tensor object."""
    return hasattr(tensor, "parallel_split")


def split_of(tensor: Tensor) -> Split | None:
    """Returns the mark; None for whole tensors and where there is no mark."""
    return getattr(tensor, "parallel_split", None)


# --- arguments ------------------------------------------------------------------------------


def check_dim(dim: ParallelDim, row: str, column: str) -> ParallelDim:
    """Returns `dim` as None, 0 or 1.

    Args:
        dim: The dimension that a user asked for.
        row: What dim=0 splits, for the error message.
        column: What dim=1 splits, for the error message.

    Raises:
        ValueError: `dim` is not None, 0, 1 or -1.
    """
    if dim is not None and (isinstance(dim, bool) or dim not in (0, 1, -1)):
        raise ValueError(
            f"dim={dim!r}: None (every rank holds all of it), 0 (row parallel: {row} split) or "
            f"1, the same as -1 (column parallel: {column} split)"
        )
    return None if dim is None else abs(dim)


def check_sizes(**sizes: int) -> None:
    """Checks that sizes are at least 1.

    Raises:
        ValueError: A size is below 1.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: at least 1")
