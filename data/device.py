"""Copies the next batch to the device while the current one is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch

T = TypeVar("T", bound=tuple[torch.Tensor, ...])


def prefetch_to_device(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """Yields the batches on `device`, copied on a separate stream one batch ahead.

    Their order is kept, and an error is raised after the batches before it. The copies overlap with
    computing only from page-locked memory. The consumer's stream waits for the copy, not the host.
    The memory of a batch is given back only when the work on it that was queued on the consumer's
    stream is done. On a CPU the batches are passed on as they are.

    Args:
        batches: Named tuples of tensors.
        device: Target of the copies.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    error: Exception | None = None

    def copy_next() -> T | None:
        nonlocal error
        try:
            batch = next(batches, None)
        except Exception as caught:  # raised after the batches before it
            error = caught
            return None
        if batch is None:
            return None
        with torch.cuda.stream(stream):
            copied = [each.to(device, non_blocking=True) for each in batch]
        return type(batch)(*copied)

    ready = copy_next()
    while ready is not None:
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(stream)
        for each in ready:
            each.record_stream(consumer)
        # Queued now, the next copy runs while the consumer works on this batch.
        current, ready = ready, copy_next()
        yield current
    if error is not None:
        raise error
