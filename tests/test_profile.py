"""`profile=N` says where the time goes: what is made slow is what it names."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import resource
import time
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from arcshard.partial_fc import PartialFC
from tests.conftest import Ranks
from tests.run_helpers import whole_run
from training.profile import (
    FOLDER,
    PHASES,
    SUMMARY,
    TRACE,
    WARM_UP_STEPS,
    StepProfile,
    phase,
    summary,
)

PAUSE = 0.25  # seconds that are added to a step


SEEN = {name: text for name, text in PHASES.items() if name != "teacher"}


def slow_head_run(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> None:
    forward, calls = PartialFC.forward, itertools.count()
    num_warm_up = WARM_UP_STEPS * changes["gradient_acc"]

    def slow(self: PartialFC, *arguments: Any) -> Any:
        if next(calls) >= num_warm_up:
            time.sleep(PAUSE)
        return forward(self, *arguments)

    with unittest.mock.patch.object(PartialFC, "forward", slow):
        whole_run(rank, world_size, folder, changes)


def lines_of(folder: Path) -> dict[str, tuple[float, float]]:
    """Name -> (ms per step, percent)."""
    found = re.findall(
        r"^(\S.*?) +([\d.]+) +([\d.]+)$", (folder / FOLDER / SUMMARY).read_text(), re.M
    )
    return {name: (float(ms), float(percent)) for name, ms, percent in found}


@pytest.mark.parametrize(("world_size", "gradient_acc"), [(1, 1), (2, 2)])
def test_the_summary_names_what_was_made_slow(
    ranks: Ranks, tmp_path: Path, world_size: int, gradient_acc: int
) -> None:
    changes = {"profile": 3, "gradient_acc": gradient_acc, "num_image": 240, "max_steps": 9}
    ranks.run(world_size, slow_head_run, str(tmp_path), changes)
    lines = lines_of(tmp_path)
    milliseconds, percent = lines[PHASES["head"]]
    assert 1e3 * PAUSE * gradient_acc <= milliseconds
    assert percent == max(lines[text][1] for text in SEEN.values())
    assert lines[PHASES["forward"]][0] > 0
    assert lines[PHASES["backward"]][0] > 0
    assert lines[PHASES["optimizer"]][0] > 0
    assert sum(lines[text][1] for text in SEEN.values()) <= 100.5
    assert (lines["collectives, within these or beside them"][0] > 0) == (world_size > 1)
    assert len(lines) == len(SEEN) + 2 + 3  # and the three largest by name
    with gzip.open(tmp_path / FOLDER / TRACE) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"arcshard/{name}" for name in SEEN} <= names


def test_a_run_that_is_too_short_says_so_and_one_without_writes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for num_steps, said in ((0, False), (10, True)):
        caplog.clear()
        watch = StepProfile(tmp_path, num_steps, torch.device("cpu"))
        for _ in range(WARM_UP_STEPS + 9):
            watch.after_step()
        watch.close()
        assert ("nothing was written" in caplog.text) == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_events", [1, 1000])  # the profiler fails at the end, or before
def test_a_disk_that_is_full_costs_the_trace_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_events: int
) -> None:
    watch = StepProfile(tmp_path, 2, torch.device("cpu"))
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for _ in range(WARM_UP_STEPS + 2):
            with phase("forward"):
                for _ in range(num_events):
                    torch.ones(10).sum()
            watch.after_step()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search("cannot be written .*: training goes on", caplog.text)
    assert "2 steps" in (tmp_path / FOLDER / SUMMARY).read_text()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [SUMMARY]


def event(
    name: str, start: float, end: float, thread: int = 0, *, on_device: bool = False
) -> FunctionEvent:
    """Of a profile of CUDA; `on_device`: a range as the profiler shows it there."""
    kind = DeviceType.CUDA if on_device else DeviceType.CPU
    return FunctionEvent(
        0,
        name,
        thread,
        start,
        end,
        device_type=kind,
        use_device="cuda",
        is_user_annotation=on_device,
    )


def test_on_a_gpu_kernels_count_for_the_phase_that_asked_for_them() -> None:
    """So do those of backward, which autograd starts in a thread of its own.

    The ranges that the profiler shows on the device count for nothing, and a collective once.
    """
    seen = [
        event("arcshard/data", 0, 1000),
        event("arcshard/forward", 1000, 1400),
        event("aten::conv2d", 1100, 1200),
        event("arcshard/backward", 1400, 3000),
        event("aten::convolution_backward", 1500, 1700, thread=1),
        event("nccl:all_reduce", 1800, 1900, thread=1),
        event("aten::lerp_", 3100, 3110),
    ]
    for place, name, cost in (
        (2, "conv", 2000),
        (4, "conv", 5000),
        (5, "ncclDevKernel_AllReduce", 700),
        (6, "lerp", 30),
    ):
        seen[place].append_kernel(name, 0, cost)
    names = ("arcshard/forward", "nccl:all_reduce")
    seen += [event(name, 5000, 9000, on_device=True) for name in names]
    done = unittest.mock.Mock(events=lambda: EventList(seen))
    page = summary(done, 1, 10.0, on_device=True)
    found = {name: float(ms) for name, ms in re.findall(r"^(\S.*?) +([\d.]+) +[\d.]+$", page, re.M)}
    assert found[PHASES["data"]] == 1.0
    assert found[PHASES["forward"]] == 2.0
    assert found[PHASES["backward"]] == 5.7
    assert found["collectives, within these or beside them"] == 0.7
    assert found["conv"] == 7.0
    assert list(found)[-3:] == ["conv", "ncclDevKernel_AllReduce", "lerp"]
