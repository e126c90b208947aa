"""Who am I among the ranks: one small value, made once by train_v2.py and passed on.

Also the few collectives the rest of the code shares. With one process nothing here touches
torch.distributed: a single rank needs no process group.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class DeviceError(RuntimeError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class DistContext:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and log lines."""
        return self.rank == 0


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for `wanted` ("auto", "cuda" or "cpu") on this host.

    Raises:
        DeviceError: CUDA is asked for and there is none, or fewer GPUs than ranks here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise DeviceError(
            "device='cuda' was asked for, but this PyTorch sees no GPU; set device=cpu or "
            "device=auto, or install a CUDA build of torch"
        )
    if local_rank >= count:
        raise DeviceError(
            f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} "
            "processes here (torchrun --nproc_per_node) or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def init_distributed(device: str = "auto", timeout_seconds: int = 1800) -> DistContext:
    """Join the ranks torchrun announced in the environment; one process alone joins nothing.

    nccl with CUDA, gloo without.
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
    """Tear the process group down, if there is one. Call it when nothing uses it any more.

    Gloo's threads hold the tensors of their last operations and must let them go while the
    interpreter still runs: one that comes too late aborts the process (seen in one of ten runs
    that left this to the interpreter's end). Collecting what refers to the group ends them.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def barrier(world: DistContext) -> None:
    """Wait for all ranks."""
    if world.world_size > 1:
        dist.barrier(device_ids=[world.local_rank] if world.device.type == "cuda" else None)
