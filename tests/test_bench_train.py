"""The whole-step benchmark says what train_v2.py measured, of the configurations it names."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train_v2
import utils.memory
from benchmarks import bench_train, runs
from benchmarks.bench_train import Bench, main, option_rows, plain, rows, utilization
from benchmarks.comparison import Comparison, Result, Row, Side, line, option_line, ratio_of_pairs
from configs.base import Config
from utils.worker import WorkerDied


def logged(speed: float, wait: float, peak_gib: float) -> str:
    return json.dumps(
        {
            "step": 1,
            "loss": 1.0,
            "samples_per_second": speed,
            "data_wait_share": wait,
            "peak_memory_gib": peak_gib,
        }
    )


def result(speed: float, peak: float, above: float) -> Result:
    return Result(speed, peak, above, 0.01, None, (0.5, 0.6))


def compared(speed: float, memory: float, **targets: Any) -> Comparison:
    row = Row(plain("cpu"), Side("ours", {"precision": "fp32"}), "r_nano", 100, 8, **targets)
    return Comparison(
        row, result(10, 1000, 600), result(10 * speed, 1000 * memory, 300), (speed, speed, speed)
    )


def test_a_reading_leaves_the_first_interval_out_but_not_its_memory() -> None:
    lines = [
        logged(1, 0.9, 3.0),
        json.dumps({"step": 1, "eval": {}}),
        logged(100, 0.0, 2.0),
        logged(300, 0.2, 2.0),
        logged(110, 0.1, 2.5),
    ]
    reading = runs.read_metrics(lines)
    assert reading.samples_per_second == 110
    assert reading.data_wait_share == pytest.approx(0.1)
    assert reading.peak_mib == 3 * 1024
    assert reading.compile_seconds is None


def test_the_cost_of_compiling_comes_from_the_log() -> None:
    log = "Training: 2026-01-31 12:00:00,000-compile: the first pass took 41.5 s\n"
    assert runs.read_metrics([logged(1, 0, 1)] * 2, log).compile_seconds == 41.5


def test_one_interval_is_no_reading() -> None:
    with pytest.raises(ValueError, match=r"1 log interval.*2 or more.*lower frequent"):
        runs.read_metrics([logged(1, 0, 1)])


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(
        runs.RunFailed,
        match=r"(?s)exit codes \[2\].*batch_size=0: allowed is a whole number of at least 1",
    ):
        runs.run_training({"batch_size": 0})


def test_a_ratio_is_that_of_neighbors() -> None:
    """A machine that slows down for both sides changes no pair's ratio."""
    assert ratio_of_pairs([(1, 2), (10, 20), (4, 4), (0.5, 1.5)]) == (2, 1, 3)


def test_targets_that_are_missed_are_said_with_their_numbers() -> None:
    targets = {"least_speed": 2.0, "most_memory": 0.5}
    assert compared(2.0, 0.5, **targets).missed() == []
    assert compared(1.0, 3.0).missed() == []
    slow, large = compared(1.97, 0.52, **targets).missed()
    assert "1.97 x samples/s, wanted 2 x" in slow
    assert "0.52 x peak memory, wanted at most 0.5 x" in large


def test_memory_above_start_has_its_own_ratio() -> None:
    found = compared(1.0, 0.8)
    assert (found.memory_ratio, found.above_ratio) == (0.8, 0.5)
    nothing = found._replace(baseline=result(10, 1000, 0))
    assert nothing.above_ratio is None
    assert " - |" in line(nothing)


def test_utilization_against_numbers_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "describe", lambda *_: {"flops": 2e9})  # 1 GMAC
    # 3 x 2 x 1e9 x 100 / 1e12; the head adds 3 x 2 x 512 x 100,000 = 3.072e8 per image
    assert utilization("r50", 0.1 * 1_000_000, 100.0, 1e12) == pytest.approx((0.6, 0.63072))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plain_is_what_users_run_today(device: str) -> None:
    side = plain(device)
    assert side.own_allocator
    half = {"precision": "fp16", "grad_reduce_dtype": "fp16"}
    assert side.keys == {
        "channels_last": False,
        "head_update": "autograd",
        "compile": False,
        **(half if device == "cuda" else {"precision": "fp32"}),
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_sides_of_a_row_are_runs_that_can_start(device: str) -> None:
    bench = Bench(device, 4, 1, None)
    chosen = [*rows(device, "all", {}), *rows(device, "quick", {})]
    chosen += option_rows(device, "r50", False, {})
    for row in chosen:
        shared = bench.keys(row)
        for side in (row.baseline, row.changed):
            assert not shared.keys() & side.keys.keys()
            assert Config(**{"rec": "synthetic", **shared, **side.keys}).problems() == []


def test_the_row_of_the_target_is_there() -> None:
    (row,) = rows("cpu", "must", {})
    assert row[2:] == ("r_nano", 200_000, 64, 1.0, 1, 2.0, 0.5)
    assert row.changed.keys == {"precision": "fp32", "compile": True}
    must = rows("cuda", "must", {})
    assert [(r.network, r.num_classes, r.batch_size, r.least_speed) for r in must] == [
        (network, classes, 512, 1.5)
        for network in ("r50", "r100")
        for classes in (360_000, 2_000_000)
    ]


def test_an_option_row_changes_one_thing() -> None:
    found = option_rows("cpu", "r_nano", False, {"clip_grad_norm": 0.0})
    for row in found:
        changes = {k for k, v in row.changed.keys.items() if row.baseline.keys.get(k) != v}
        assert len(changes) + (not row.changed.own_allocator) == 1
        assert row.baseline.keys["clip_grad_norm"] == 0.0
        alone = {"zero_stage", "grad_reduce_dtype"}.isdisjoint(changes)
        assert row.ranks == (1 if alone else 2)
    assert len(found) == 8
    assert "41.5 |" in option_line(
        Comparison(
            found[1], result(1, 1, 1), result(1, 1, 1)._replace(compile_seconds=41.5), (1, 1, 1)
        )
    )


def test_the_plain_side_leaves_the_allocator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_v2.keep_freed_memory is utils.memory.keep_freed_memory  # by that name, from there
    monkeypatch.setattr(utils.memory, "keep_freed_memory", utils.memory.keep_freed_memory)
    seen: list[Any] = []

    def entry() -> int:
        seen.append(utils.memory.keep_freed_memory())
        return 7

    monkeypatch.setitem(sys.modules, "train_v2", SimpleNamespace(main=entry))
    with pytest.raises(SystemExit) as ended:
        exec(runs.ENTRY_PLAIN_ALLOCATOR[1], {})
    assert (ended.value.code, seen) == (7, [False])


def test_the_exit_code_says_whether_targets_are_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "start_mib", lambda self: 400.0)
    targets = {"least_speed": 2.0, "most_memory": 0.5}

    def run(speed: float, memory: float) -> tuple[int, str]:
        monkeypatch.setattr(Bench, "compare", lambda *_: compared(speed, memory, **targets))
        code = main(["--must", "--plot", str(tmp_path / "plot.png")])
        return code, capsys.readouterr().out

    code, text = run(2.5, 0.4)
    assert code == 0
    assert "All targets are met" in text
    assert (tmp_path / "plot.png").stat().st_size > 1000
    code, text = run(1.5, 0.4)
    assert code == 1
    assert "MISSED" in text
    assert "1.50 x samples/s" in text


def test_a_side_that_does_not_fit_is_a_row_and_a_missed_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "start_mib", lambda self: 400.0)
    failure = runs.RunFailed("CUDA out of memory")

    def compare(*_: Any) -> Comparison:
        raise failure

    monkeypatch.setattr(Bench, "compare", compare)
    assert main(["--must"]) == 1
    assert "out of memory |" in capsys.readouterr().out
    failure = runs.RunFailed("no such network")
    with pytest.raises(runs.RunFailed, match="no such network"):
        main(["--must"])


def test_a_quick_run_from_records_measures_both_sides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--quick", "--records", "--json", str(tmp_path / "rows.json")]
    assert main([*words, "--markdown", str(tmp_path / "table.md")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["name"], row["baseline"], row["params"]["num_classes"]) == (
        "ours, not compiled",
        "plain",
        2000,
    )
    assert row["ratio_to_baseline"] == pytest.approx(row["per_second"] / row["baseline_per_second"])
    assert 0 < row["mfu"] < row["mfu_with_head"]
    assert 100 < row["peak_mib"] < 4096
    assert row["data_wait_share"] > 0
    text = (tmp_path / "table.md").read_text()
    assert "1 threads" in text
    assert "python -m benchmarks.bench_train --quick --records" in text
    assert "JPEG records; medians of 1 runs of 5 steps, the first 1 left out" in text


def test_a_measuring_process_that_dies_or_fails_says_so_at_once() -> None:
    assert runs.in_a_process(abs, -3) == 3
    with pytest.raises(WorkerDied):
        runs.in_a_process(os._exit, 3)
    with pytest.raises(ValueError, match="invalid literal"):
        runs.in_a_process(int, "three")
