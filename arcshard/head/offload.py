"""Class centers in host memory: the size of the set is bounded by RAM, not by the accelerator.

Centers and optimizer state stay on the host; a step's sampled rows are brought to the device,
used and moved there as if they were a small shard, and put back. While the backbone works, a
thread already gathers the rows the next step will most likely want: its random negatives are
known ahead, only the batch's own classes are not. The thread starts after the rows of the last
step are back, so it never reads a row that is about to change.

Costs: bringing rows over and putting them back wait for the device; of the transfers only the
gathering on the host is hidden. The device holds two copies of a sample's centers and state for a
moment, one otherwise; the host as many again, page-locked.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from arcshard.head.centers import LocalCenters
from arcshard.head.row_optimizer import RowOptimizer


@dataclass
class _Ahead:
    """Rows gathered ahead: ascending row numbers, and for each part its rows [n, ...]."""

    rows: Tensor
    parts: dict[str, Tensor]
    versions: dict[str, int]


class CenterOffload:
    """The shard in host memory, lent to the device a sample at a time.

    Args:
        weight: [num_rows_local, D] on the CPU.
        rule: moves rows, and owns their state, also on the CPU.
        device: where the head computes.
        next_rows: called after every step; what it returns gives, in the thread, the rows the
            next step will probably want, ascending, on the CPU.
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
        self.rows_ahead = self.rows_fetched = 0  # how many rows were there already, how many not

    def of_step(self, rows: Tensor) -> OffloadedCenters:
        """The rows of a step, on the device; the same object for the same sample."""
        if self._lent is None or self._lent.sample is not rows:
            on_host = rows.cpu()  # waits for the device
            parts = self._bring(on_host)
            self._lent = OffloadedCenters(self, rows, on_host, parts)
        return self._lent

    def put_back(self, rows: Tensor, parts: dict[str, Tensor]) -> None:
        """Write moved rows to the shard and start gathering for the next step."""
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
        """In the thread: the rows the next step will want, on the stream the step runs on."""
        rows = rows_wanted()
        parts = self._parts()
        versions = {name: part._version for name, part in parts.items()}
        with torch.cuda.stream(stream):
            fetched = {name: self._fetch(part, rows) for name, part in parts.items()}
        return _Ahead(rows, fetched, versions)

    def _fetch(self, part: Tensor, rows: Tensor) -> Tensor:
        """Rows of a part on the device, to an accelerator through page-locked memory."""
        if self.device.type == "cpu":
            return part.index_select(0, rows)
        staged = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype, pin_memory=True)
        torch.index_select(part, 0, rows, out=staged)
        return staged.to(self.device, non_blocking=True)

    def _bring(self, rows: Tensor) -> dict[str, Tensor]:
        """Every part's rows on the device, from what was gathered ahead as far as it goes."""
        ahead = self._ahead.result() if self._ahead is not None else None
        self._ahead = None
        parts = self._parts()
        if ahead is not None and any(
            ahead.versions[name] != part._version for name, part in parts.items()
        ):
            ahead = None  # someone has written to the shard since, as loading a checkpoint does
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


class OffloadedCenters(LocalCenters):
    """A sample's rows on the device: a small shard, returned to the host when it has moved.

    Args:
        host: to give them back to.
        sample: rows of the shard as the sample names them; on_host: the same, on the CPU.
        parts: "weight" and the rule's state of these rows, on the device.
    """

    def __init__(
        self, host: CenterOffload, sample: Tensor, on_host: Tensor, parts: dict[str, Tensor]
    ) -> None:
        state = {name: part for name, part in parts.items() if name != "weight"}
        super().__init__(parts["weight"], host.rule, state=state)
        self.sample, self._host, self._on_host, self._parts_here = sample, host, on_host, parts

    def flush(self) -> None:
        """Back to the host."""
        self._host.put_back(self._on_host, self._parts_here)
