"""This process among the ranks of a run: made once by train_v2.py and passed on.

With one process nothing here touches torch.distributed: a single rank needs no process group.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError


@dataclass(frozen=True)
class DistContext:
    """This process among all processes of the run.

    Attributes:
        rank: Rank among all processes.
        local_rank: Rank among the processes of this host.
        world_size: Number of all processes.
        device: Device of this process.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files and log lines."""
        return self.rank == 0


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Chooses the device for `wanted` on this host.

    Args:
        wanted: "auto" (CUDA if there is a GPU), "cuda" or "cpu".
        local_rank: Rank among the processes of this host.

    Raises:
        UserError: CUDA is needed, and this host has no GPU or fewer GPUs than ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError(
            "device='cuda' was asked for, but this PyTorch sees no GPU; set device=cpu or "
            "device=auto, or install a CUDA build of torch"
        )
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} "
            "processes here (torchrun --nproc_per_node) or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def init_distributed(device: str = "auto", timeout_seconds: int = 1800) -> DistContext:
    """Joins the ranks that torchrun announced in the environment; one process alone joins nothing.

    The backend is nccl with CUDA and gloo without.

    Args:
        device: "auto", "cuda" or "cpu".
        timeout_seconds: Timeout of the collectives.

    Raises:
        UserError: As in `choose_device`.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return DistContext(rank, local_rank, world_size, chosen)


def destroy_distributed() -> None:
    """Destroys the process group, if there is one; call it when nothing uses it any more.

    Gloo's threads hold the tensors of their last operations and must release them while the
    interpreter still runs: a thread that does so too late aborts the process (seen in one of ten
    runs that left this to the interpreter's end). Collecting what refers to the group ends the
    threads.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def barrier(world: DistContext) -> None:
    """Waits for all ranks."""
    if world.world_size > 1:
        dist.barrier(device_ids=[world.local_rank] if world.device.type == "cuda" else None)
