"""Speed and memory of the run between two log lines."""

from __future__ import annotations

import resource
import time
from typing import NamedTuple

import torch


class Rates(NamedTuple):
    """What a log line says of an interval.

    Attributes:
        samples_per_second: Samples per second over all ranks.
        data_wait_share: Share of the time spent waiting for data, in [0, 1].
        hours_left: Hours to the end of the run, from the mean step time so far.
        peak_memory_gib: GiB reserved by this rank's GPU allocator, or resident of the process on a
            CPU; the largest so far.
    """

    samples_per_second: float
    data_wait_share: float
    hours_left: float
    peak_memory_gib: float


class SpeedMeter:
    """Measures speed since the last reading; pauses (verification, saving) do not count.

    Args:
        samples_per_step: Global batch size.
        total_steps: Number of steps of the run.
        step: Number of steps that a resumed run has done before.
    """

    def __init__(self, samples_per_step: int, total_steps: int, step: int = 0) -> None:
        self.samples_per_step, self.total_steps = samples_per_step, total_steps
        self._training_seconds, self._training_steps = 0.0, 0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begins an interval at `step` now (after a pause, or at the start)."""
        self._step, self._wait, self._start = step, 0.0, time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for data."""
        self._wait += seconds

    def read(self, step: int, device: torch.device) -> Rates:
        """Returns the rates of the interval that ends at `step`, and begins the next one."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        steps = step - self._step
        self._training_seconds += seconds
        self._training_steps += steps
        per_step = self._training_seconds / max(self._training_steps, 1)
        rates = Rates(
            steps * self.samples_per_step / seconds,
            min(self._wait / seconds, 1.0),
            per_step * (self.total_steps - step) / 3600,
            peak_memory_gib(device),
        )
        self.restart(step)
        return rates


def peak_memory_gib(device: torch.device) -> float:
    """Returns the largest memory so far in GiB: reserved on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
