"""Two kinds of process groups: ranks that share a layer (model), and copies of it (data).

    world of 4, group_size=2      model groups {0, 1} {2, 3}      data groups {0, 2} {1, 3}

Ranks of a model group hold different parts of a split parameter and compute on the same rows. Ranks
of a data group hold the same part and see different rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arcshard.parallel.split import local_part, remember_mesh, size_of


@dataclass(frozen=True)
class Groups:
    """The groups of this rank; all None for one process without torch.distributed.

    Attributes:
        mesh: DeviceMesh ("data", "model"), which FSDP2 and DTensor take.
        model: Ranks that share the parts of a layer.
        data: Ranks that hold the same part.
    """

    mesh: DeviceMesh | None
    model: dist.ProcessGroup | None
    data: dist.ProcessGroup | None


def init_process_group(group_size: int | None = None, device_type: str = "cpu") -> Groups:
    """Divides the ranks into model groups of `group_size` consecutive ranks.

    torch.distributed must be initialized before (`init_process_group` of torch.distributed), unless
    there is only one process. Every rank calls this, in the same order.

    Args:
        group_size: Number of ranks that share a layer; None for all.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: `group_size` does not divide the number of ranks.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    group_size = world_size if group_size is None else group_size
    if group_size < 1 or world_size % group_size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"group_size={group_size} does not divide {world_size} ranks into equal groups: "
            f"one of {divisors}, or start another number of ranks"
        )
    if not dist.is_initialized():
        return Groups(None, None, None)
    shape = (world_size // group_size, group_size)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "model"))
    remember_mesh(mesh["model"])  # FSDP2 asks for two dimensions of one mesh
    return Groups(mesh, mesh.get_group("model"), mesh.get_group("data"))


def resolve_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns the group itself; for None the default group, or None without torch.distributed."""
    if process_group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return process_group


def register_ddp_parameters_to_ignore(
    model: nn.Module, data_group: dist.ProcessGroup | None = None
) -> list[str]:
    """Makes DDP ignore split parameters, and averages their gradients over `data_group` instead.

    Call it before DistributedDataParallel(model), which takes plain tensors only. With a data group
    the parameters take the values of its first rank now, and every gradient is averaged over the
    group as soon as backward has computed it. This includes backward under `no_sync`: one
    collective per micro-batch, with the same sum.

    Args:
        model: The model, not yet wrapped in DDP.
        data_group: Ranks that hold the same parts (`Groups.data`); None if no other rank does.

    Returns:
        The names that DDP will ignore.

    Raises:
        ValueError: Other ranks hold the same parts and there is no data group, or the ranks of
            parts and data group together are not the world.
    """
    shared = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, DTensor)
    }
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for name, parameter in shared.items():
        if parameter.device_mesh.size() * size_of(data_group) != world_size:
            raise ValueError(
                f"{name} is split over {parameter.device_mesh.size()} of {world_size} ranks and "
                f"the data group has {size_of(data_group)}: its copies on other ranks would drift "
                "apart; pass data_group=init_process_group(group_size).data"
            )
    if data_group is not None and size_of(data_group) > 1:
        for parameter in {id(each): each for each in shared.values()}.values():
            _follow_group(parameter, data_group)
    names = list(shared)
    # DDP joins module and parameter by a dot even for the model itself, whose name is empty.
    spelt = [name if "." in name else f".{name}" for name in names]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names + spelt)
    return names


def _follow_group(parameter: Tensor, group: dist.ProcessGroup) -> None:
    dist.broadcast(local_part(parameter.detach()), group=group, group_src=0)
    count = dist.get_world_size(group)

    def average(one: Tensor) -> None:
        # Gradients of earlier micro-batches are equal on all ranks: averaging keeps them.
        if one.grad is not None:
            gradient = local_part(one.grad)
            dist.all_reduce(gradient, group=group)
            gradient.div_(count)

    parameter.register_post_accumulate_grad_hook(average)
