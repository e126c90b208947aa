"""State dicts of whole tensors, which any number of ranks can save and load.

A saved state dict does not depend on the ranks: `collect_state_dict` joins parts,
`relocate_state_dict` takes this rank's part, under the names of a model without splits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from arcshard.parallel.split import Split, as_dtensor, parallel_splits

PIECE_BYTES = 16 * 2**20


def collect_state_dict(model: nn.Module) -> dict[str, Any]:
    """Collects the whole state dict in host memory on the first rank of each model group.

    Every rank calls it. Split tensors are joined one at a time in small pieces, so that little
    memory is needed beside the result (`full_tensor` needs the whole on every rank's device).
    Parameters under FSDP2 are joined too, each with `full_tensor`.

    Args:
        model: Not wrapped in DDP (take its `.module`), so that names have no prefix.

    Returns:
        The state dict; {} on the other ranks.
    """
    splits = parallel_splits(model)
    is_first = all(split.rank == 0 for split in splits.values())
    whole: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor) and name in splits and value.device_mesh.ndim == 1:
            value = whole_on_first_rank(value.to_local(), splits[name])
        elif isinstance(value, DTensor):
            value = value.full_tensor()
        if is_first:
            whole[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    return whole


def relocate_state_dict(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Returns this rank's part of a whole state dict, for model.load_state_dict(...).

    Reading with torch.load(path, mmap=True, weights_only=True) loads only what is kept.

    Args:
        model: The model that will load it. Names that it does not have are passed on for
            load_state_dict to check.
        state: State dict of whole tensors, as from `collect_state_dict` or a model without splits.

    Raises:
        ValueError: A tensor is not as large as its whole parameter. The message names the tensor.
    """
    splits = parallel_splits(model)
    own = model.state_dict()
    parts: dict[str, Any] = {}
    for name, value in state.items():
        there = own.get(name)
        if name in splits:
            try:
                part = splits[name].take(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if not isinstance(there, DTensor):
                value = part.clone()
            elif there.device_mesh.ndim == 1:
                value = as_dtensor(part.clone(), splits[name], there.device_mesh)
        if isinstance(there, DTensor) and not isinstance(value, DTensor):
            mesh, placements = there.device_mesh, there.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        parts[name] = value
    return parts


def whole_on_first_rank(part: Tensor, split: Split) -> Tensor | None:
    """Returns the whole tensor in host memory on the group's first rank, None elsewhere.

    With one rank in the group it is the part itself, if that is in host memory already. Every rank
    of the group calls it. Parts are transferred PIECE_BYTES at a time.

    Args:
        part: This rank's part.
        split: How the tensor is split.
    """
    if split.num_parts == 1:
        return part.detach().cpu()
    assert split.group is not None
    device = part.device
    if device.type == "cpu" and "nccl" in dist.get_backend(split.group):
        device = torch.device("cuda", torch.cuda.current_device())  # nccl needs CUDA tensors
    front = part.detach().movedim(split.dim, 0)
    sizes = [len(one) for one in split.parts]
    whole = torch.empty(0)
    if split.rank == 0:
        shape = list(part.shape)
        shape[split.dim] = split.size
        whole = torch.empty(shape, dtype=part.dtype).movedim(split.dim, 0)
    step = max(PIECE_BYTES // max(front.shape[1:].numel() * part.itemsize, 1), 1)
    for start in range(0, max(sizes), step):
        piece = front[start : start + step]
        rows = min(step, max(sizes) - start)
        padded = torch.zeros((rows, *front.shape[1:]), dtype=part.dtype, device=device)
        padded[: len(piece)] = piece  # gather needs equal shapes
        if split.rank != 0:
            dist.gather(padded, None, group=split.group, group_dst=0)
            continue
        pieces = [torch.empty_like(padded) for _ in sizes]
        dist.gather(padded, pieces, group=split.group, group_dst=0)
        for owned, received in zip(split.parts, pieces, strict=True):
            rows = max(min(len(owned) - start, len(received)), 0)
            begin = owned.start + start
            whole[begin : begin + rows].copy_(received[:rows])
    return whole.movedim(0, split.dim) if split.rank == 0 else None
