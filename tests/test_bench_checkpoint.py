"""The benchmark of checkpoints finds the steps that a save overlaps, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_checkpoint import steps_of_saves


def test_the_steps_of_a_save_are_those_that_begin_before_it_is_written(tmp_path: Path) -> None:
    seconds = dict.fromkeys(range(1, 31), 0.5) | {11: 0.8, 21: 0.9, 22: 0.7}
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"step": step, "loss": 1.0, "samples_per_second": 64 / each}
        for step, each in seconds.items()
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = (
        "checkpoint run/checkpoints/step_00000010 written in 0.163 s\n"
        "checkpoint run/checkpoints/step_00000020 written in 1.200 s\n"
    )
    during, others, written = steps_of_saves(metrics, log, 64)
    assert during == pytest.approx([0.8, 0.8])  # step 11; the median of steps 21 and 22
    assert others == pytest.approx([0.5] * 22)  # without these three and the first five
    assert written == [0.163, 1.2]
