"""`profile=N` says where the time goes: what is made slow is what it names."""

from __future__ import annotations

import gzip
import json
import re
import resource
import time
import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch

from partial_fc import PartialFC
from tests.conftest import Ranks
from tests.test_resume import whole_run
from training.profile import FOLDER, PHASES, SUMMARY, TRACE, WARM_UP_STEPS, StepProfile, phase

PAUSE = 0.5  # seconds that are added to a step


SEEN = {name: text for name, text in PHASES.items() if name != "teacher"}


def slow_head_run(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> None:
    forward = PartialFC.forward

    def slow(self: PartialFC, *arguments: Any) -> Any:
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
