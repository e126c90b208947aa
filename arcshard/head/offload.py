"""Class centers in host memory: RAM rather than the accelerator bounds the number of classes.

Centers and optimizer state stay on the host. A step's sampled rows are copied to the device, used
and updated there like a small shard, and copied back. While the backbone computes, a thread gathers
the rows that the next step will most likely need: its random negatives are known ahead, only the
batch's own classes are not. The thread starts after the rows of the last step are back, so it never
reads a row that is about to change.

Cost: the copies to the device and back wait for the device; only the gathering on the host is
hidden. The device holds one copy of a sample's centers and state, and two for a moment. The host
holds as many again in page-locked memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.head.centers import ClassCenters
from arcshard.head.row_optimizer import RowOptimizer


@dataclass
class _Ahead:
    """Rows gathered ahead: ascending row numbers, each part's rows [n, ...], and its version."""

    rows: Tensor
    parts: dict[str, Tensor]
    versions: dict[str, int]


class CenterOffload:
    """The shard in host memory, of which one sample at a time is on the device.

    Args:
        weight: [num_rows_local, D] on the CPU.
        rule: Row optimizer that updates the rows and owns their state, also on the CPU.
        device: Device where the head computes.
        next_rows: Function that is called after every step. It returns a function that the thread
            calls for the rows that the next step will probably need, ascending, on the CPU.
    """

    def __init__(
        self,
        weight: Tensor,
        rule: RowOptimizer,
        device: torch.device,
        next_rows: Callable[[], Callable[[], Tensor]],
    ) -> None:
        self.weight, self.rule, self.device = weight, rule, device
        self._next_rows = next_rows
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="centers")
        self._ahead: Future[_Ahead] | None = None
        self._lent: OffloadedCenters | None = None
        self.rows_ahead = self.rows_fetched = 0  # rows that were gathered ahead, and that were not

    def of_step(self, rows: Tensor) -> OffloadedCenters:
        """Returns the rows of a step on the device; the same object for the same `rows` tensor."""
        if self._lent is None or self._lent.sample is not rows:
            on_host = rows.cpu()  # waits for the device
            parts = self._bring(on_host)
            self._lent = OffloadedCenters(self, rows, on_host, parts)
        return self._lent

    def put_back(self, rows: Tensor, parts: dict[str, Tensor]) -> None:
        """Writes updated rows to the shard and starts gathering for the next step."""
        with torch.no_grad():
            for name, part in self._parts().items():
                part.index_copy_(0, rows, parts[name].to(part.device))
        self._lent = None
        stream = None
        if self.device.type == "cuda":  # a thread has a current stream of its own
            stream = torch.cuda.current_stream(self.device)
        self._ahead = self._thread.submit(self._gather, self._next_rows(), stream)

    def _parts(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach(), **self.rule.state(self.weight)}

    def _gather(
        self, rows_wanted: Callable[[], Tensor], stream: torch.cuda.Stream | None
    ) -> _Ahead:
        """Gathers, in the thread, the rows of the next step on the stream that the step uses."""
        rows = rows_wanted()
        parts = self._parts()
        versions = {name: part._version for name, part in parts.items()}
        with torch.cuda.stream(stream):
            fetched = {name: self._fetch(part, rows) for name, part in parts.items()}
        return _Ahead(rows, fetched, versions)

    def _fetch(self, part: Tensor, rows: Tensor) -> Tensor:
        """Copies rows of a part to the device, through page-locked memory to an accelerator."""
        if self.device.type == "cpu":
            return part.index_select(0, rows)
        staged = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype, pin_memory=True)
        torch.index_select(part, 0, rows, out=staged)
        return staged.to(self.device, non_blocking=True)

    def _bring(self, rows: Tensor) -> dict[str, Tensor]:
        """Returns every part's rows on the device, as many as possible from those ahead."""
        ahead = self._ahead.result() if self._ahead is not None else None
        self._ahead = None
        parts = self._parts()
        if ahead is not None and any(
            ahead.versions[name] != part._version for name, part in parts.items()
        ):
            ahead = None  # the shard was written since, for example by loading a checkpoint
        if ahead is None or len(ahead.rows) == 0:
            self.rows_fetched += len(rows)
            return {name: self._fetch(part, rows) for name, part in parts.items()}
        place = torch.searchsorted(ahead.rows, rows).clamp_max(len(ahead.rows) - 1)
        found = ahead.rows[place] == rows
        missing = (~found).nonzero().squeeze(1)
        self.rows_ahead += int(found.sum())
        self.rows_fetched += len(missing)
        place, there = place.to(self.device), missing.to(self.device)
        brought = {}
        for name, part in parts.items():
            brought[name] = ahead.parts.pop(name).index_select(0, place)
            brought[name].index_copy_(0, there, self._fetch(part, rows[missing]))
        return brought


class OffloadedCenters(ClassCenters):
    """A sample's rows on the device, like a small shard that is copied back after its update.

    Args:
        host: Owner of the shard, to which the rows are returned.
        sample: [S] int64 rows of the shard, as the sample names them.
        on_host: The same row numbers on the CPU.
        parts: "weight" and the optimizer state of these rows, on the device.
    """

    def __init__(
        self, host: CenterOffload, sample: Tensor, on_host: Tensor, parts: dict[str, Tensor]
    ) -> None:
        state = {name: part for name, part in parts.items() if name != "weight"}
        super().__init__(parts["weight"], host.rule, state=state)
        self.sample, self._host, self._on_host, self._parts_here = sample, host, on_host, parts

    def flush(self) -> None:
        """Copies the updated rows back to the host."""
        self._host.put_back(self._on_host, self._parts_here)
