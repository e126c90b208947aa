"""Running statistics of all batch norms as one flat tensor.

Every buffer becomes a view of it, so that keeping, putting back and averaging the statistics
of a whole network are one operation each instead of hundreds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.precision import batch_norms

STATISTICS = ("running_mean", "running_var")


class BatchNormStatistics:
    """Keeps, restores and averages the running statistics of a model's batch norms.

    Args:
        model: its batch norms' buffers become views of one tensor.
        frozen: the statistics never change; nothing here does anything then.
    """

    def __init__(self, model: nn.Module, frozen: bool = False) -> None:
        layers = [] if frozen else batch_norms(model)
        self._is_averaged = False
        self.statistics = _flatten(layers, STATISTICS)
        self.counts = _flatten(layers, ("num_batches_tracked",))
        self._kept = [tensor.clone() for tensor in (self.statistics, self.counts)]

    def snapshot(self) -> None:
        """Remember the present statistics; to be called before each step."""
        self._is_averaged = False
        for kept, tensor in zip(self._kept, (self.statistics, self.counts), strict=True):
            kept.copy_(tensor)

    def restore_where(self, bad: Tensor) -> None:
        """Put back what `keep` saw where the boolean scalar `bad` is true, on the device."""
        for kept, tensor in zip(self._kept, (self.statistics, self.counts), strict=True):
            if tensor.numel():  # without statistics there is no tensor on the device either
                tensor.copy_(torch.where(bad, kept, tensor))

    def pause(self) -> None:
        """Remember the statistics that further forward passes of this step must not change."""
        self._held = [tensor.clone() for tensor in (self.statistics, self.counts)]

    def resume(self) -> None:
        """Put back what `hold` saw."""
        for held, tensor in zip(self._held, (self.statistics, self.counts), strict=True):
            tensor.copy_(held)

    def ema_update(self, other: BatchNormStatistics, share: Tensor) -> None:
        """Move towards another model's statistics by `share` of the way, a scalar on the device."""
        self._is_averaged = False
        if self.statistics.numel():
            self.statistics.lerp_(other.statistics, share)
            self.counts.copy_(other.counts)

    def average(self, world_size: int) -> None:
        """Make every rank's statistics the mean over ranks, for evaluation and saving.

        Each rank has seen other images; training itself never reads these statistics unless
        they are frozen. A second call before the next step changes nothing, nor does one where
        the ranks have the same.
        """
        if world_size > 1 and self.statistics.numel() and not self._is_averaged:
            extremes = torch.cat([self.statistics, -self.statistics])
            dist.all_reduce(extremes, dist.ReduceOp.MAX)
            most, least = extremes[: len(self.statistics)], -extremes[len(self.statistics) :]
            dist.all_reduce(self.statistics)
            # of equal numbers that number: x + x + x divided by 3 may be another one
            mean = torch.where(most == least, most, self.statistics / world_size)
            self.statistics.copy_(mean)
        self._is_averaged = True


def _flatten(layers: list[nn.Module], names: tuple[str, ...]) -> Tensor:
    """One tensor that the named buffers of all layers become views of."""
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
