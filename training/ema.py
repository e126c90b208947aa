"""The exponential moving average of the backbone, which is verified and saved in its place."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from backbones import Backbone
from training.batch_norm import BatchNormStatistics


class ModelEma:
    """Follows a backbone: average += (1 - d) (weights - average) after every step that moved it.

    d = min(decay, (1 + n) / (10 + n)) after n such steps, so that the first weights, which mean
    nothing, are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage).

    The running statistics of batch norm follow by the same rule. To first order they are linear
    in the weights, so their average belongs to the averaged weights; those of the moment belong
    to the weights of the moment. (Counting them anew would take a pass over the data.)

    Args:
        backbone: on its device; it goes on training and is only read.
        statistics: of its batch norms.
        decay: share of the old average that is kept per step, in [0, 1).

    Attributes:
        model: the averaged backbone, in eval mode; all ranks have the same weights.
        batch_norm: its running statistics, each rank's own until they are averaged.
        updates: n, on the device.
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
        """Take in the weights after a step; nothing moves where the boolean scalar `bad` is true.

        Asks nothing of the host. One kernel per tensor: the three of torch._foreach_* for all of
        them need room for one more copy, and took 5 times as long on a CPU.
        """
        count = self.updates.double()
        share = 1 - ((1 + count) / (10 + count)).clamp(max=self.decay)
        share = (share * ~bad).to(self._pairs[0][0].dtype)
        for weight, average in self._pairs:
            average.lerp_(weight, share)
        self.batch_norm.ema_update(self._source_statistics, share)
        self.updates += ~bad

    def start_over(self) -> None:
        """From the weights and statistics as they are now."""
        self.model.load_state_dict(self.source.state_dict())
        self.updates.zero_()
