"""The exponential moving average of the backbone, which is verified and saved instead of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from backbones import Backbone
from training.batch_norm import BatchNormStatistics


class ModelEma:
    """Averages a backbone: average += (1 - d) (weights - average) after every step not skipped.

    d = min(decay, (1 + n) / (10 + n)) after n such steps, so that the first weights, which are
    arbitrary, are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage).

    The running statistics of batch norm are averaged by the same rule. To first order they are
    linear in the weights, so their average belongs to the averaged weights, while the current
    statistics belong to the current weights. (Computing them anew would take a pass over the data.)

    Args:
        backbone: The network on its device. It is only read.
        statistics: Statistics of its batch norms.
        decay: Fraction of the old average that is kept per step, in [0, 1).

    Attributes:
        model: The averaged backbone in eval mode. Its weights are the same on all ranks.
        batch_norm: Its running statistics. They differ between ranks until they are averaged.
        updates: The count n, on the device.
    """

    def __init__(self, backbone: Backbone, statistics: BatchNormStatistics, decay: float) -> None:
        self.decay, self.source, self._source_statistics = decay, backbone, statistics
        self.model = copy.deepcopy(backbone).eval().requires_grad_(False)
        self.batch_norm = BatchNormStatistics(self.model, not statistics.statistics.numel())
        pairs = zip(backbone.parameters(), self.model.parameters(), strict=True)
        self._pairs = [pair for pair in pairs if pair[0].requires_grad]
        self.updates = torch.zeros((), dtype=torch.int64, device=self._pairs[0][0].device)

    @torch.no_grad()
    def update(self, bad: Tensor) -> None:
        """Include the weights after a step; nothing changes where the boolean scalar `bad` is true.

        Does not synchronize with the host. It starts one kernel per tensor: the three
        torch._foreach_* calls for all tensors need memory for one more copy, and took 5 times as
        long on a CPU.
        """
        count = self.updates.double()
        share = 1 - ((1 + count) / (10 + count)).clamp(max=self.decay)
        share = (share * ~bad).to(self._pairs[0][0].dtype)
        for weight, average in self._pairs:
            average.lerp_(weight, share)
        self.batch_norm.ema_update(self._source_statistics, share)
        self.updates += ~bad

    def start_over(self) -> None:
        """Restart the average from the present weights and statistics."""
        self.model.load_state_dict(self.source.state_dict())
        self.updates.zero_()
