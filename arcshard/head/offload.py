"""Class centers in host memory: RAM rather than the accelerator bounds the number of classes.

Centers and optimizer state stay on the host. A step's sampled rows are copied to the device, used
and updated there like a small shard, and copied back.

Cost: the step waits while the host gathers the rows, and again while it writes them back. Copies to
and from CUDA pass through page-locked memory; while a part is copied, the host gathers the next or
writes the last. These copies were never timed on a GPU. The device holds one copy of a sample's
centers and state, and another for an evaluation during a step. The host holds as many again.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from arcshard.head.centers import ClassCenters
from arcshard.head.row_optimizer import RowOptimizer, State


class CenterOffload:
    """The shard in host memory, of which the samples of steps are on the device.

    Args:
        weight: [num_rows_local, D] on the CPU.
        rule: Row optimizer that updates the rows and owns their state, also on the CPU.
        device: Device where the head computes.
    """

    def __init__(self, weight: Tensor, rule: RowOptimizer, device: torch.device) -> None:
        self.weight, self.rule, self.device = weight, rule, device
        self.uses_staging = device.type != "cpu"
        self._staging: dict[str, _Staging] = defaultdict(lambda: _Staging(device))

    def versions(self) -> list[int]:
        """Returns numbers that change when the shard is written, also by loading a checkpoint."""
        return [part._version for part in self._parts().values()]

    def fetch(self, rows: Tensor) -> State:
        """Copies rows of the weight and of its state to the device."""
        if not self.uses_staging:
            return {name: part.index_select(0, rows) for name, part in self._parts().items()}
        fetched = {}
        for name, part in self._parts().items():
            staged = self._staging[name].rows(len(rows), part)
            torch.index_select(part, 0, rows, out=staged)
            on_device = torch.empty_like(staged, device=self.device)
            fetched[name] = self._staging[name].copy(staged, on_device)
        return fetched

    @torch.no_grad()
    def put_back(self, rows: Tensor, updated: State) -> None:
        """Writes updated rows of the weight and of its state to the shard."""
        if self.uses_staging:
            updated = {
                name: self._staging[name].copy(part, self._staging[name].rows(len(rows), part))
                for name, part in updated.items()
            }
        for name, part in self._parts().items():
            self._staging[name].wait()
            part.index_copy_(0, rows, updated[name])

    def _parts(self) -> State:
        return {"weight": self.weight.detach(), **self.rule.state(self.weight)}


class OffloadedCenters(ClassCenters):
    """A sample's rows on the device, like a small shard that is copied back after its update.

    Args:
        host: Owner of the shard, to which the rows are returned.
        sample: [S] int64 rows of the shard, as the sample names them.
    """

    def __init__(self, host: CenterOffload, sample: Tensor) -> None:
        self.sample, self._host, self._on_host = sample, host, sample.cpu()  # waits for the device
        self.versions, self._parts = host.versions(), host.fetch(self._on_host)
        state = {name: part for name, part in self._parts.items() if name != "weight"}
        super().__init__(self._parts["weight"], host.rule, state=state)

    def numbers(self, start: int, stop: int) -> Tensor | None:
        """Returns [stop - start] the rows of the shard, as the sample names them."""
        return self.sample[start:stop]

    def flush(self) -> None:
        """Copies the updated rows back to the host.

        Raises:
            RuntimeError: The shard was written since the rows were fetched.
        """
        if self.versions != self._host.versions():
            raise RuntimeError(
                "class centers were loaded or written between this forward and its backward"
            )
        self._host.put_back(self._on_host, self._parts)
        super().flush()


class _Staging:
    """Host memory through which rows of one tensor go to the device and back; it only grows.

    For CUDA it is page-locked, and copies are asynchronous in the order of the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self._buffer: Tensor | None = None

    def rows(self, count: int, like: Tensor) -> Tensor:
        """Returns [count, ...] of the memory, when the last copy from or to it is complete."""
        self.wait()
        if self._buffer is None or len(self._buffer) < count:
            pinned = self.copied is not None
            self._buffer = like.new_empty(count, *like.shape[1:], device="cpu", pin_memory=pinned)
        return self._buffer[:count]

    def copy(self, source: Tensor, to: Tensor) -> Tensor:
        """Starts a copy from or to the memory, and returns `to`."""
        to.copy_(source, non_blocking=self.copied is not None)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(self.device))
        return to

    def wait(self) -> None:
        """Waits until the last copy is complete, so that the host may read or write the memory."""
        if self.copied is not None:
            self.copied.synchronize()
