"""Wrap the backbone in DDP and compile it, with the passes that both need before the first step."""

from __future__ import annotations

import inspect
import logging
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from arcshard.random import get_rng_state, set_rng_state
from training.batch_norm import BatchNormStatistics
from training.precision import tf32_allowed
from utils.memory import return_freed_memory

logger = logging.getLogger("train")

_COMPRESSIONS = {
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}


def parallelize(
    model: nn.Module,
    world_size: int,
    device: torch.device,
    batch_norm: BatchNormStatistics,
    *,
    batch_size: int,
    input_size: int,
    grad_reduce_dtype: str = "fp32",
    compiles: bool = False,
    tf32: bool = False,
) -> nn.Module:
    """Wrap a backbone in DDP where there are several ranks, and compile it if asked.

    Args:
        model: The network, on its device.
        world_size: Number of ranks.
        device: Device of this rank.
        batch_norm: Running statistics of the network, which the passes made here do not change.
        batch_size: Images per rank and micro-step, for which it is compiled.
        input_size: Height and width of the images in pixels.
        grad_reduce_dtype: dtype in which gradients are summed over ranks: "fp32" (that of the
            gradients), "bf16" or "fp16".
        compiles: Whether to compile the network, or its DDP.
        tf32: Whether the compiled code may use TF32.

    Returns:
        The model to train with; `model` itself for one rank.
    """
    trained = model
    if world_size > 1:
        trained = _distribute(model, device, grad_reduce_dtype)
        # DDP starts with a guess of its buckets of gradients and rebuilds them by the order in
        # which gradients arrived in the first backward pass. On three ranks or more, other buckets
        # mean another order of the sums, so that the first step after a resumption would differ
        # from that of the uninterrupted run. Two passes before the first step settle them.
        _dummy_pass(trained, 2, 2, input_size, device, batch_norm)
    if compiles:
        with tf32_allowed(tf32):
            seconds = compile_backbone(trained, batch_size, input_size, device, batch_norm)
        logger.info("compile: the first pass took %.1f s", seconds)
    return trained


def _distribute(
    model: nn.Module, device: torch.device, grad_reduce_dtype: str
) -> DistributedDataParallel:
    # Running statistics are averaged when they are needed, not broadcast in every forward.
    # PyTorch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {switch: False, "gradient_as_bucket_view": True}
    devices = [device] if device.type == "cuda" else None
    distributed = DistributedDataParallel(model, device_ids=devices, **options)
    if grad_reduce_dtype != "fp32":
        distributed.register_comm_hook(None, _COMPRESSIONS[grad_reduce_dtype])
    return distributed


def compile_backbone(
    model: nn.Module,
    batch_size: int,
    input_size: int,
    device: torch.device,
    batch_norm: BatchNormStatistics,
) -> float:
    """Compile `model` (a module or its DDP) for batches of this size.

    Under DDP the graph is split at the buckets, so that their sums still overlap with backward. A
    pass over blank images compiles both directions here, before the class centers take their
    memory, and leaves no trace.

    Returns:
        The seconds it took.
    """
    start = time.perf_counter()
    model.compile(dynamic=False)
    _dummy_pass(model, 1, batch_size, input_size, device, batch_norm)
    return_freed_memory()  # the compiler leaves reference cycles and a fragmented heap
    return time.perf_counter() - start


def _dummy_pass(
    model: nn.Module,
    passes: int,
    batch_size: int,
    input_size: int,
    device: torch.device,
    batch_norm: BatchNormStatistics,
) -> None:
    """Run forward and backward over blank images, and restore statistics and RNG states."""
    state = get_rng_state(device)
    model.train()  # puts frozen batch norms into eval mode
    batch_norm.snapshot()
    shape = (batch_size, 3, input_size, input_size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    images = images.to(memory_format=torch.channels_last)  # the format of the loader's images
    for _ in range(passes):
        model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    batch_norm.restore_where(torch.ones((), dtype=torch.bool, device=device))
    set_rng_state(device, state)
