"""Running statistics of all batch norms as one flat tensor.

Every buffer becomes a view of it, so that saving, restoring and averaging the statistics of a whole
network are one operation each instead of hundreds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.precision import batch_norms

STATISTICS = ("running_mean", "running_var")


class BatchNormStatistics:
    """Saves, restores and averages the running statistics of a model's batch norms.

    Args:
        model: The buffers of its batch norms become views of one tensor.
        frozen: Whether the statistics never change. All methods then do nothing.
    """

    def __init__(self, model: nn.Module, frozen: bool = False) -> None:
        layers = [] if frozen else batch_norms(model)
        self._is_averaged = False
        self.statistics = _flatten(layers, STATISTICS)
        self.counts = _flatten(layers, ("num_batches_tracked",))
        self._kept = [tensor.clone() for tensor in (self.statistics, self.counts)]

    def snapshot(self) -> None:
        """Save the present statistics; the training step calls this before each step."""
        self._is_averaged = False
        for kept, tensor in zip(self._kept, (self.statistics, self.counts), strict=True):
            kept.copy_(tensor)

    def restore_where(self, bad: Tensor) -> None:
        """Restore the last `snapshot` where the boolean scalar `bad` on the device is true."""
        for kept, tensor in zip(self._kept, (self.statistics, self.counts), strict=True):
            if tensor.numel():  # without statistics there is no tensor on the device either
                tensor.copy_(torch.where(bad, kept, tensor))

    def pause(self) -> None:
        """Save the statistics that further forward passes of this step must not change."""
        self._held = [tensor.clone() for tensor in (self.statistics, self.counts)]

    def resume(self) -> None:
        """Restore the statistics that `pause` saved."""
        for held, tensor in zip(self._held, (self.statistics, self.counts), strict=True):
            tensor.copy_(held)

    def ema_update(self, other: BatchNormStatistics, share: Tensor) -> None:
        """Interpolate the statistics toward those of another model.

        Args:
            other: Statistics of the other model.
            share: Fraction of the way to go, a scalar on the device.
        """
        self._is_averaged = False
        if self.statistics.numel():
            self.statistics.lerp_(other.statistics, share)
            self.counts.copy_(other.counts)

    def average(self, world_size: int) -> None:
        """Make every rank's statistics the mean over ranks, for evaluation and saving.

        Each rank has seen other images. Training itself never reads these statistics unless they
        are frozen. A second call before the next step changes nothing, nor does a call where all
        ranks have the same statistics.
        """
        if world_size > 1 and self.statistics.numel() and not self._is_averaged:
            extremes = torch.cat([self.statistics, -self.statistics])
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            most, least = extremes[: len(self.statistics)], -extremes[len(self.statistics) :]
            dist.all_reduce(self.statistics)
            # The mean of equal numbers is that number, but (x + x + x) / 3 may differ from x.
            mean = torch.where(most == least, most, self.statistics / world_size)
            self.statistics.copy_(mean)
        self._is_averaged = True


def _flatten(layers: list[nn.Module], names: tuple[str, ...]) -> Tensor:
    """Make the named buffers of all layers views of one tensor, and return it."""
    buffers = [(layer, name, getattr(layer, name)) for layer in layers for name in names]
    if not buffers:
        return torch.empty(0)
    flat = torch.cat([buffer.reshape(-1) for _, _, buffer in buffers])
    start = 0
    for layer, name, buffer in buffers:
        end = start + buffer.numel()
        layer._buffers[name] = flat[start:end].view(buffer.shape)
        start = end
    return flat
