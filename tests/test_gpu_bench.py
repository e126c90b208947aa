"""The GPU benchmark runs at toy size on a CPU, keeps to its time, and loses nothing when killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_bench, gpu_rows, runs
from benchmarks.gpu_bench import REPORT, ROWS, SECTIONS, TRACE, Bench, Task, main
from benchmarks.gpu_report import report
from tests.helpers import broken_row, hangs, row_of_process, wait_until

ROOT = Path(__file__).resolve().parent.parent


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def rehearse(folder: Path, *words: str, compiles: bool = False) -> subprocess.Popen[str]:
    """Without the compiler the code around it still runs."""
    more = {"OMP_NUM_THREADS": "1"} | ({} if compiles else {"TORCH_COMPILE_DISABLE": "1"})
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_bench", folder, "--rehearse", *words],
        cwd=ROOT,
        env=os.environ | more,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def is_whole(folder: Path) -> None:
    """All sections have rows, none failed, and the files are few and small."""
    rows = rows_of(folder)
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert [row for row in rows if "error" in row] == []
    left_out = {row["name"]: row["left_out"] for row in rows if "left_out" in row}
    assert left_out.pop("DALI on the GPU", "DALI is not").startswith("DALI is not")
    needs_gpu = dict.fromkeys(("logits", "normalize", "update"), "a GPU is needed")
    assert left_out == {"step: compile=True": "not rehearsed", **needs_gpu}
    files = sorted(path.name for path in folder.iterdir())
    assert files == [REPORT, ROWS, TRACE]
    assert all(path.stat().st_size < 16 * 2**20 for path in folder.iterdir())

    heads = [row for row in rows if row["section"] == "head"]
    fused = [row for row in heads if row["name"] == "fused"]
    assert {row["name"] for row in heads} == {"fused", "dense"}
    for row in heads:
        assert row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["step_ms"])
    assert all(row["launches_counted"] > 50 and row["products_counted"] == 3 for row in fused)
    assert {row["params"]["sample_rate"] for row in fused} == {1.0, 0.1}
    assert {row["params"]["weight_dtype"] for row in fused} == {"fp32", "bf16"}
    steps = {row["name"]: row for row in rows if row["section"] == "step"}
    assert list(steps) == ["ours", "plain", "ours, compiled", "ours, profiled"]
    assert all(row["samples_per_second"] > 0 and row["mfu"] > 0 for row in steps.values())
    assert "backbone, forward" in steps["ours, profiled"]["profile"]
    facts = rows[0]
    assert {"torch", "git_commit", "source_sha256", "c_compiler", "python_headers"} <= set(facts)
    text = (folder / REPORT).read_text()
    assert text == report(rows)
    assert "a rehearsal on a CPU, whose figures mean nothing" in text
    for heading in (
        "## What this card reaches",
        "## Head:",
        "## Whole step",
        "### Profile",
        "## Identities",
        "## Checks: 40 of 41 passed",
        "## Left out",
    ):
        assert heading in text
    assert "## Failed" not in text


def test_a_rehearsal_runs_every_section(tmp_path):
    run = rehearse(tmp_path / "out")
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    is_whole(tmp_path / "out")


@pytest.mark.slow
def test_a_rehearsal_with_the_compiler_takes_at_most_four_minutes(tmp_path):
    run = rehearse(tmp_path / "out", compiles=True)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    is_whole(tmp_path / "out")


# --- killed at any moment --------------------------------------------------------------------


def test_killed_at_any_moment_it_leaves_valid_files(tmp_path):
    words = "import sys; from tests import helpers; helpers.write_and_be_killed(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", words, tmp_path], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    folders = list(tmp_path.iterdir())
    assert len(folders) == 20
    for folder in folders:
        rows = rows_of(folder)
        assert [row["name"] for row in rows] == [f"row {number}" for number in range(len(rows))]
        # The report has every row but the last at least.
        text = (folder / REPORT).read_text()
        assert text in (report(rows), report(rows[:-1]))


def test_a_killed_run_keeps_the_rows_it_has_done_and_ends_its_child(tmp_path):
    folder = tmp_path / "out"
    run = rehearse(folder, "--sections", "head")
    wait_until(lambda: (folder / ROWS).exists() and len(rows_of(folder)) >= 4)
    run.send_signal(signal.SIGKILL)
    run.communicate()  # returns when nobody has the pipe any more, the child neither
    rows = rows_of(folder)
    assert [row["section"] for row in rows[:4]] == ["environment", "ceilings", "head", "head"]
    assert (folder / REPORT).read_text() in (report(rows), report(rows[:-1]))
    assert main([str(folder), "--rehearse"]) == 2  # it is not written over


# --- time and failures -----------------------------------------------------------------------


def test_a_row_that_fails_hangs_or_dies_costs_only_itself(tmp_path, capsys):
    bench = Bench(tmp_path, 100)
    plain = Task("head", "quick", {}, row_of_process)
    rows = [
        bench.run(task)
        for task in (
            plain,
            plain,
            Task("head", "broken", {}, broken_row),
            plain,
            Task("head", "hanging", {}, hangs, limit=1.5),
            Task("head", "dying", {}, os._exit, (7,)),
            plain,
            plain._replace(is_alone=True),
            plain._replace(missing="it is not installed"),
            plain._replace(name="long", expected=1000),
        )
    ]
    bench.close()
    assert rows[0] == rows[1]
    assert rows[2]["error"].endswith("RuntimeError: planted")
    assert "did not end within 1.5 seconds" in rows[4]["error"]
    assert "exit code 7" in rows[5]["error"]
    assert len({row["pid"] for row in rows if "pid" in row}) == 4  # after a failure, and alone
    assert rows[8] == {"left_out": "it is not installed"}
    assert rows[9]["left_out"].startswith("no time: about 1000 s needed")
    assert [row["name"] for row in rows_of(tmp_path)].count("quick") == 6
    text = (tmp_path / REPORT).read_text()
    assert "## Failed" in text
    assert "- head: long: no time" in text
    assert "dying" in capsys.readouterr().out


def test_packages_that_are_not_there_leave_their_rows_out_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_bench, "missing_packages", lambda *names: f"not installed: {names[0]}")
    tasks = planned(monkeypatch, tmp_path, "cuda", 8)
    for task in tasks:
        needs = task.section in ("step", "published", "dali")
        assert (task.missing == "not installed: cv2") == needs


def test_what_json_does_not_have_is_null(tmp_path):
    bench = Bench(tmp_path, 100)
    bench.run(Task("head", "odd", {"x": float("inf")}, dict, ({"y": float("nan"), "z": 1.5},)))
    bench.close()
    assert "NaN" not in (tmp_path / ROWS).read_text()
    (row,) = rows_of(tmp_path)
    assert (row["params"]["x"], row["y"], row["z"]) == (None, None, 1.5)


def test_a_profile_that_was_not_written_loses_no_row(monkeypatch, tmp_path):
    reading = runs.Reading(100.0, 0.0, 1000.0)
    monkeypatch.setattr(gpu_rows, "run_training", lambda *_, **__: reading)
    found = gpu_rows.training({"precision": "bf16"}, {}, str(tmp_path / TRACE))
    assert found["samples_per_second"] == 100
    assert found["profile"] == "no page was written\n"
    assert not list(tmp_path.iterdir())


def test_two_runs_never_share_a_folder(tmp_path):
    Bench(tmp_path / "out", 1.0)
    with pytest.raises(FileExistsError, match="of another run: choose another folder"):
        Bench(tmp_path / "out", 1.0)


@pytest.mark.parametrize("size", [900, 1000])
def test_a_full_disk_costs_a_row_and_never_half_of_one(tmp_path, size):
    """The limit on the size of a file stands for the disk."""
    words = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from benchmarks.gpu_bench import Bench, Task\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "bench = Bench(Path(sys.argv[1]), 100)\n"
        "for number in range(20):\n"
        "    bench.run(Task('head', f'row {number}', {}, dict, missing='no time'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", words, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = rows_of(tmp_path)
    assert [row["name"] for row in rows] == [f"row {number}" for number in range(len(rows))]
    assert 5 < len(rows) < 20
    assert "error: not written" in run.stderr
    assert all(f"row {number}: left out: no time" in run.stdout for number in range(20))


def test_a_missing_package_is_named_and_costs_only_the_rows_that_need_it(tmp_path):
    for name in ("simplejpeg", "easydict", "cv2", "tqdm", "onnxruntime", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    words = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import gpu_bench as b\n"
        "if __name__ == '__main__':\n"
        "    bench = b.Bench(Path(sys.argv[1]), 100)\n"
        "    bench.run(b.head_tasks('cpu', False, True, {})[0])\n"
        "    bench.run(b.published_tasks('cpu', True, {})[0])\n"
        "    bench.close()\n"
    )
    subprocess.run(
        [sys.executable, "-c", words, tmp_path / "out"],
        cwd=ROOT,
        check=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    head, published = rows_of(tmp_path / "out")
    assert head["step_ms"] > 0
    assert "limit_ms" not in head  # there was no ceiling to compare with
    assert re.search("no (simplejpeg|easydict|cv2|tqdm|onnxruntime) here", published["error"])


def planned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, minutes: float, *sections: str
) -> list[Task]:
    """The tasks of a run whose rows take no time, on a machine with a GPU and a compiler."""
    tasks: list[Task] = []

    def run(self: Bench, task: Task) -> dict[str, Any]:
        tasks.append(task)
        return {"matmul_tflops": 800.0, "fp32_tflops": 50.0, "copy_gigabytes_per_second": 3000.0}

    monkeypatch.setattr(Bench, "run", run)
    monkeypatch.setattr(gpu_bench, "triton_problem", lambda: None)
    bench = Bench(tmp_path / f"out{len(list(tmp_path.iterdir()))}", 60 * minutes)
    gpu_bench.measure(bench, device, sections or SECTIONS, False)
    return tasks


def test_the_first_call_looks_at_small_heads_only(monkeypatch, tmp_path):
    tasks = planned(monkeypatch, tmp_path, "cuda", 1)
    assert {task.section for task in tasks} == {"environment", "ceilings", "check", "head"}
    assert [task.name for task in tasks if task.section == "check"] == [
        "head: ArcFace, SGD, fp32",
        "head: CosFace, SGD, bf16",
        "kernels: batch=1000, rule=sgd",
    ]
    heads = [task.params for task in tasks if task.section == "head"]
    assert {params["num_classes"] for params in heads} == {100_000}
    assert sum(task.expected for task in tasks) < 45


def test_everything_is_asked_for_in_order_of_value(monkeypatch, tmp_path):
    tasks = planned(monkeypatch, tmp_path, "cuda", 8)
    # docs/speed.md: about half an hour.
    assert 25 * 60 < sum(task.expected for task in tasks) < 40 * 60
    order = list(dict.fromkeys(task.section for task in tasks))
    assert order == list(SECTIONS)
    names = [f"{task.section} {task.name}" for task in tasks]
    first_step = next(place for place, name in enumerate(names) if name.startswith("step "))
    assert "check training run: bf16" in names[first_step:]
    assert "check step: compile=True" in names[first_step:]
    heads = [task.params for task in tasks if task.section == "head"]
    sizes = {(h["head"], h["num_classes"], h["batch"], h["sample_rate"]) for h in heads}
    for head in ("fused", "dense"):
        for size in (100_000, 1_000_000, 2_000_000):
            assert {(head, size, 1024, 1.0), (head, size, 1024, 0.1)} <= sizes
    largest = next(h for h in heads if h["num_classes"] == 29_000_000)
    assert (largest["batch"], largest["sample_rate"]) == (512, 1.0)
    assert (largest["weight_dtype"], largest["state_dtype"]) == ("bf16", "bf16")
    assert {h["workspace_mib"] for h in heads} == {"auto", 256, None}  # the dense head has none
    assert not [task for task in tasks if task.missing and task.section != "dali"]
    steps = [task.params for task in tasks if task.section == "step"]
    assert {(s["network"], s["num_classes"]) for s in steps} == {
        (network, size) for network in ("r50", "r100") for size in (360_000, 2_000_000)
    }
    assert len(steps) == 13
    assert [s.get("profile", 0) > 0 for s in steps] == 3 * [False] + [True] + 9 * [False]
    published = [task.params for task in tasks if task.section == "published"]
    assert [p["num_classes"] for p in published[::2]] == list(gpu_bench.IDENTITIES)
    assert [p.get("head_weight_dtype") for p in published[-4:]] == 4 * ["bf16"]
    chosen = planned(monkeypatch, tmp_path, "cuda", 8, "product")
    assert {task.section for task in chosen} == {"environment", "ceilings", "product"}


def test_configs_of_the_rows_are_valid(monkeypatch, tmp_path):
    from configs.base import Config

    for task in planned(monkeypatch, tmp_path, "cuda", 8):
        if task.section in ("step", "published", "dali"):
            keys = {"rec": "synthetic", "output": "unused", **task.params}
            assert Config(**keys).problems() == []


# --- the report and the command --------------------------------------------------------------


def row(section: str, name: str, params: dict[str, Any], **figures: Any) -> dict[str, Any]:
    return {"section": section, "name": name, "params": params, "seconds": 1.0, **figures}


def test_the_report_compares_with_the_row_of_the_same_settings():
    large, small = ({"num_classes": c, "batch": 8, "optimizer": "sgd"} for c in (2_000, 1_000))
    heads = [
        row("head", "dense", large, step_ms=30.0),
        row("head", "fused", large, step_ms=10.0),
        row("head", "fused", small, step_ms=5.0),
        row("head", "fused", {**large, "optimizer": "adamw"}, step_ms=12.0),
    ]
    keys = {"network": "r50", "num_classes": 7, "batch_size": 4}
    steps = [
        row("step", "ours", keys, samples_per_second=300.0),
        row("step", "plain", keys, samples_per_second=100.0),
    ]
    lines = report([*heads, *steps]).splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith(("| fused", "| dense"))]
    column = (
        next(line for line in lines if "times the dense head's speed" in line)
        .split(" | ")
        .index("times the dense head's speed")
    )
    assert [line[column] for line in cells] == ["-", "3.00", "-", "-"]
    ours = next(line for line in lines if line.startswith("| ours"))
    assert " | 300 | 3.00 | " in ours


def test_without_a_gpu_it_says_so_and_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    assert "this PyTorch sees no GPU; nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for minutes in ("0", "inf", "nan"):
        assert main([str(tmp_path / "out"), "--rehearse", "--minutes", minutes]) == 2
        assert f"--minutes {minutes}: above 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file"), "--rehearse"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
