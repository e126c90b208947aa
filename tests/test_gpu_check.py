"""The GPU's checks run on a CPU in a rehearsal; what fails or hangs does not stop the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import Check, all_checks, run_checks
from tests.helpers import hangs, passes

ROOT = Path(__file__).resolve().parent.parent


def main(*words: str) -> int:
    return gpu_check.main(words)


def fails() -> None:
    raise ValueError("planted")


def reads(report: str, names: list[str]) -> None:
    """The report before this check has these rows."""
    assert [row["name"] for row in json.loads(Path(report).read_text())] == names


@pytest.mark.slow  # tests/test_gpu_bench.py runs the same checks
def test_a_rehearsal_runs_the_code_of_all_checks(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check", "--rehearse", "--json", tmp_path / "rows.json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = [line for line in run.stdout.splitlines() if line and not line.startswith("check  ")]
    assert all("rehearsal" in line for line in said)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 41
    assert rows[-1]["result"] == "left out: rehearsed with --rehearse-compile only"
    assert {row["result"] for row in rows[:-1]} == {"passed"}
    assert rows[0]["name"] == "rehearsal of head: ArcFace, SGD, fp32"
    assert set(rows[0]) == {"name", "result", "seconds", "error"}


def test_checks_that_fail_or_hang_do_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "rows.json"
    before = ["rehearsal of failing", "rehearsal of hanging"]
    planted = [
        Check("failing", fails),
        Check("hanging", hangs, 1.5),
        Check("reading", partial(reads, str(report), before)),
        Check("dying", partial(os._exit, 3)),
        Check("leaving", partial(sys.exit, 0)),
        Check("absent", passes, left_out="no C compiler"),
        Check("passing", passes),
    ]
    monkeypatch.setattr(gpu_check, "all_checks", lambda *_: planted)
    assert main("--rehearse", "--json", str(report)) == 1
    text = capsys.readouterr().out
    rows = json.loads(report.read_text())
    assert [row["result"] for row in rows] == [
        "FAILED",
        "FAILED",
        "passed",
        "FAILED",
        "FAILED",
        "left out: no C compiler",
        "passed",
    ]
    assert "in fails\n" in rows[0]["error"]
    assert rows[0]["error"].endswith("\nValueError: planted")
    assert rows[1]["error"] == "TimeoutError: hangs did not end within 1.5 seconds"
    assert "WorkerDied: _exit: the process ended with exit code 3" in rows[3]["error"]
    table = text[text.index("check  ") :]
    for row in rows:
        assert f"{row['name']:20}  {row['seconds']:7.1f}  {row['result']}\n" in table
        assert row["error"] in table
    assert "a rehearsal on a CPU: 2 of 7 passed, 4 FAILED" in table
    assert list(tmp_path.iterdir()) == [report]


def test_what_there_is_no_time_for_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = [Check("first", passes), Check("long", hangs), Check("last", passes)]
    rows = run_checks(planted, seconds=2)
    late = "not started: no time left"
    assert [row.result for row in rows] == ["passed", "FAILED", late]
    assert rows[1].seconds < 3
    monkeypatch.setattr(gpu_check, "quick_checks", lambda _: planted[2:])
    assert main("--rehearse", "--quick", "--seconds", "0") == 0
    assert f"rehearsal of last: {late}" in capsys.readouterr().out


def test_an_absent_package_fails_the_checks_that_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "simplejpeg.py").write_text("raise ModuleNotFoundError('No module simplejpeg')")
    monkeypatch.syspath_prepend(tmp_path)
    checks = {check.name: check for check in all_checks("cpu")}
    names = ("batches arrive whole", "step: loss=softmax", "head: ArcFace, SGD, fp32")
    rows = run_checks([checks[name] for name in names])
    assert [row.result for row in rows] == ["FAILED", "FAILED", "passed"]
    assert rows[0].error.endswith("ModuleNotFoundError: No module simplejpeg")


def test_the_compiled_step_is_left_out_by_reason() -> None:
    compiled = all_checks("cuda:0", "no Python.h")[-1]
    assert (compiled.seconds, compiled.left_out) == (300, "no Python.h")
    assert all_checks("cuda:0")[-1].left_out == ""
    assert len({check.name for check in all_checks("cuda:0")}) == 44


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main() == 0
    assert capsys.readouterr().out == ("gpu-check: this PyTorch sees no GPU; nothing was checked\n")
