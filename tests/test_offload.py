"""Class centers in host memory: every forward has rows of its own, and no update is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcshard.head import offload
from arcshard.head.offload import CenterOffload, OffloadedCenters
from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.losses import CosFace
from arcshard.partial_fc import PartialFC
from tests.run_helpers import batch_for

CPU = torch.device("cpu")


class PretendedEvent:
    """In place of a CUDA event: a copy is incomplete until somebody waits for it."""

    pending: set[int] = set()  # noqa: RUF012 - addresses of buffers of incomplete copies

    def __init__(self) -> None:
        self.buffer = 0

    def record(self, _: Any) -> None:
        self.pending.add(self.buffer)

    def synchronize(self) -> None:
        self.pending.discard(self.buffer)


def make_host(rows: int = 50, uses_staging: bool = False) -> CenterOffload:
    torch.manual_seed(0)
    host = CenterOffload(torch.randn(rows, 4), AdamWRows(), CPU)
    host.uses_staging = uses_staging
    return host


def update(centers: OffloadedCenters) -> Tensor:
    """Update all rows of a step, flush, and return what they are now."""
    count = centers.num_rows
    current = centers.read(0, count)
    centers.update(0, count, current, torch.ones(count, 4), 0.1, None)
    centers.flush()
    return centers.weight.clone()


@pytest.mark.parametrize("uses_staging", [False, True])
def test_an_evaluation_while_rows_are_out_takes_nothing_from_the_step(uses_staging):
    host = make_host(uses_staging=uses_staging)
    start = host.weight.clone()
    rows = torch.arange(0, 30, 2)
    step = OffloadedCenters(host, rows)
    evaluation = OffloadedCenters(host, torch.arange(0, 50, 5))
    assert torch.equal(evaluation.read(0, 10), start[::5])
    after = update(step)
    assert torch.equal(host.weight[rows], after)
    assert not torch.equal(after, start[rows])
    untouched = torch.ones(50, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(host.weight[untouched], start[untouched])
    assert (host.rule.state(host.weight)["step"] == (~untouched).double()).all()
    again = OffloadedCenters(host, rows)
    assert torch.equal(again.read(0, 15), after)
    assert torch.equal(OffloadedCenters(host, torch.arange(50)).read(0, 50), host.weight)


@pytest.mark.parametrize("uses_staging", [False, True])
def test_an_abandoned_step_changes_nothing(uses_staging):
    host = make_host(uses_staging=uses_staging)
    start = host.weight.clone()
    rows = torch.arange(20)
    abandoned = OffloadedCenters(host, rows)
    count = abandoned.num_rows  # updated in part, and never flushed
    abandoned.update(0, count, abandoned.read(0, count), torch.ones(count, 4), 0.1, None)
    assert torch.equal(host.weight, start)
    assert torch.equal(OffloadedCenters(host, rows).read(0, 20), start[:20])


def test_rows_that_were_fetched_before_a_checkpoint_was_loaded_are_refused():
    host = make_host()
    rows = torch.arange(10, 20)
    for loaded in (host.weight, host.rule.state(host.weight)["exp_avg"]):
        stale = OffloadedCenters(host, rows)
        loaded.copy_(torch.full_like(loaded, 2.0))
        fresh = OffloadedCenters(host, rows)
        with pytest.raises(RuntimeError, match="between this forward and its backward"):
            update(stale)
        assert (loaded == 2.0).all()
    assert (fresh.read(0, 10) == 2.0).all()
    update(fresh)
    assert (host.weight[:10] == 2.0).all()
    assert not (host.weight[10:20] == 2.0).any()


def test_the_host_touches_staging_memory_only_when_the_last_copy_is_complete(monkeypatch):
    """Copies of rows of growing number, all through staging memory that is kept."""
    select, put = torch.index_select, Tensor.index_copy_

    def checked_select(part: Tensor, dim: int, rows: Tensor, *, out: Tensor) -> Tensor:
        assert out.data_ptr() not in PretendedEvent.pending
        return select(part, dim, rows, out=out)

    def checked_put(part: Tensor, dim: int, rows: Tensor, values: Tensor) -> Tensor:
        assert values.data_ptr() not in PretendedEvent.pending
        return put(part, dim, rows, values)

    real_rows = offload._Staging.rows

    def rows_of(self: Any, count: int, like: Tensor) -> Tensor:
        if not isinstance(self.copied, PretendedEvent):
            self.copied = PretendedEvent()
        buffer = real_rows(self, count, like)
        self.copied.buffer = buffer.data_ptr()
        return buffer

    monkeypatch.setattr(offload._Staging, "rows", rows_of)
    monkeypatch.setattr(torch, "index_select", checked_select)
    monkeypatch.setattr(Tensor, "index_copy_", checked_put)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    real_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor,
        "new_empty",
        lambda self, *shape, pin_memory, **more: real_empty(self, *shape, **more),
    )
    host, plain = make_host(uses_staging=True), make_host()
    for count in (10, 30, 20):
        rows = torch.arange(count)
        step = OffloadedCenters(host, rows)
        assert PretendedEvent.pending
        after = update(step)
        assert not PretendedEvent.pending
        assert torch.equal(after, update(OffloadedCenters(plain, rows)))
    assert torch.equal(host.weight, plain.weight)
    sizes = {name: len(one._buffer) for name, one in host._staging.items()}
    assert sizes == dict.fromkeys(("weight", "exp_avg", "exp_avg_sq", "step"), 30)


@pytest.mark.parametrize("uses_staging", [False, True])
def test_a_head_with_host_centers_trains_as_one_without(uses_staging):
    """Evaluations and an abandoned forward between, a checkpoint loaded, a step that is skipped."""

    def make(**options: Any) -> PartialFC:
        return PartialFC(
            CosFace(), 8, 401, 0.1, row_optimizer=SGDRows(), dtype=torch.float64, **options
        )

    hosted, plain = make(center_device="cpu"), make()
    hosted._host.uses_staging = uses_staging
    for step in range(8):
        embeddings, labels, _, _ = batch_for(0, [16], 401, 8, seed=step)
        embeddings = embeddings.detach().clone()
        if step == 5:
            embeddings[0] = math.nan
        for head in (hosted, plain):
            abandoned = head(embeddings.clone().requires_grad_(True), labels, 0.1)
            with torch.no_grad():
                head(embeddings.flip(0), labels.flip(0))
            head(embeddings.clone().requires_grad_(True), labels, 0.1).backward()
            head.step(0.1)
            del abandoned
            if step == 3:  # what loading a checkpoint does
                with torch.no_grad():
                    head.weight.mul_(1.5)
        assert torch.equal(hosted.weight, plain.weight)
