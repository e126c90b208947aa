"""Everything that has to be measured on one GPU, in order of value, within a few minutes.

    python3 -m benchmarks.gpu_bench OUT [--minutes 8]     # `make gpu-bench`
    python3 -m benchmarks.gpu_bench OUT --minutes 1       # the head's checks and small rows only
    python3 -m benchmarks.gpu_bench OUT --sections step published
    python3 -m benchmarks.gpu_bench OUT --rehearse        # all of it at toy size, on a CPU

OUT gets rows.jsonl (one JSON object per line, written when its row is done), report.md (tables
made of them, replaced after every row) and trace.json.gz (a profile). A run that is cut off loses
only the row in progress. Every row has a time limit and runs in a child process: an error, a hang
or a lack of memory costs only that row. A row that does not fit into the time left is named and
left out.

The sections are, in this order: environment; ceilings (a large product, a copy); check (what
scripts/gpu_check.py checks; the long ones come after step); head (benchmarks/bench_head.py, against
the limit of this card); launch (settings of the head's Triton kernels); product (a ceiling for each
shape of the head's products); step
(train_v2.py in the plain configuration and in ours); published (img/s and MiB against the number of
identities, as published for eight V100); dali.

All sections take about half an hour on one H100 (calculated, not measured): a shorter run has the
first of them, and --sections chooses others. The exit code is 0 even if rows failed, which the
report names; 2 if there is no GPU, for options that do not fit and for an OUT that has rows
already.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_rows
from benchmarks.bench_head import Case
from benchmarks.comparison import COMPILED, INTERVALS, OURS, plain
from benchmarks.gpu_report import report, title
from scripts.gpu_check import (
    TRAINER_NEEDS,
    Check,
    all_checks,
    last_lines,
    needs_new_process,
    quick_checks,
)
from utils.environment import (
    compiler_problem,
    describe_environment,
    missing_packages,
    triton_problem,
)
from utils.files import atomic_write
from utils.json_values import without_nan
from utils.worker import Worker

ROWS, REPORT, TRACE = "rows.jsonl", "report.md", "trace.json.gz"
SECTIONS = (
    "environment",
    "ceilings",
    "check",
    "head",
    "launch",
    "product",
    "step",
    "published",
    "dali",
)
# Launch settings of the head's kernels that are tried (arcshard/head/kernels.py has the chosen).
TILES = (
    ((128, 128, 64, 4, 2), True),
    ((128, 128, 64, 4, 3), True),
    ((128, 128, 64, 8, 3), True),
    ((256, 128, 64, 8, 3), True),
    ((128, 128, 64, 8, 3), False),
    ((128, 128, 64, 4, 3), False),
    ((128, 128, 32, 8, 4), False),
    ((128, 128, 32, 8, 3), False),
)
ROWS_PER_PROGRAM = ((1, 1), (1, 4), (2, 2), (4, 4))
LEAST_SECONDS = 2.0  # nothing starts later than this before the end
SMOKE_MINUTES = 1  # up to here only the head is measured, at small size
CHECK_SHARE = 0.25  # of the time, for checks that come before everything else
LONG_CHECK_SECONDS = 10.0  # checks that take longer, about, come at the end
STEPS_PER_INTERVAL, PROFILED_STEPS = 10, 4  # profiled after the first five
# Assumed times: starting train_v2.py with its first steps, drawing a million class centers (on a
# CPU), compiling r50, and images per second.
START_SECONDS, MILLION_SECONDS, COMPILE_SECONDS = 20.0, 5.0, 75.0
ASSUMED_SPEED = {"r50": 2500.0, "r100": 1400.0, "r_nano": 100.0}
IDENTITIES = (125_000, 1_400_000, 5_500_000, 8_000_000, 16_000_000, 29_000_000)


class Task(NamedTuple):
    """A row to be measured.

    Attributes:
        section: Section of the report.
        name: Name of the row.
        params: Settings of the row.
        function: Is called in the child process and gives the row's figures.
        arguments: Arguments of `function`.
        expected: Seconds that it takes, about; it starts only if they are left.
        limit: Seconds after which it is given up.
        is_alone: Whether it starts another process that uses the GPU, so that nothing else may hold
            the GPU's memory then.
        missing: What it lacks here, so that it is left out; "" for nothing.
    """

    section: str
    name: str
    params: Mapping[str, Any]
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...] = ()
    expected: float = 3.0
    limit: float = 60.0
    is_alone: bool = False
    missing: str = ""


class Bench:
    """Runs tasks until the time is over, and writes each row when it is done.

    Args:
        folder: Folder of the results, made here.
        seconds: Time for everything.

    Raises:
        FileExistsError: The folder has the rows of another run, or is a file.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self.start = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.worker = Worker()
        self._holds_memory = False  # the child process may have used the GPU
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / ROWS).touch(exist_ok=False)
        except FileExistsError:
            raise FileExistsError(
                f"{folder / ROWS} is of another run: choose another folder"
            ) from None

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of the time."""
        return self.seconds - (time.monotonic() - self.start)

    def run(self, task: Task) -> dict[str, Any]:
        """Measures one row, or says why not; returns its figures."""
        left = self.seconds_left
        if task.missing:
            return self._write(task, {"left_out": task.missing}, 0.0)
        if left < max(task.expected, LEAST_SECONDS):
            words = f"no time: about {task.expected:.0f} s needed, {max(left, 0):.0f} left"
            return self._write(task, {"left_out": words}, 0.0)
        begun = time.monotonic()
        if task.is_alone and self._holds_memory:
            self.worker.close()
        self._holds_memory = not task.is_alone
        # A row that takes far longer than expected is given up, to leave time for the others.
        limit = min(task.limit, 3 * task.expected + 20, left)
        try:
            found = self.worker.run(task.function, *task.arguments, seconds=limit)
        except (Exception, SystemExit) as error:
            if needs_new_process(error):
                self.worker.close()
            found = {"error": last_lines(error)}
        return self._write(task, found, time.monotonic() - begun)

    def close(self) -> None:
        """Ends the child process."""
        self.worker.close()

    def _write(self, task: Task, found: dict[str, Any], seconds: float) -> dict[str, Any]:
        row = {
            "section": task.section,
            "name": task.name,
            "params": dict(task.params),
            **found,
            "seconds": round(seconds, 2),
        }
        self.rows.append(row)
        try:
            append_line(self.folder / ROWS, json.dumps(without_nan(row)))
            with atomic_write(self.folder / REPORT) as file:
                file.write(report(self.rows).encode())
        except OSError as error:  # such as a full disk: the row is printed, a later one may fit
            print(f"error: not written: {error}", file=sys.stderr, flush=True)
        print(
            f"{self.seconds - self.seconds_left:5.0f} s  {task.section}: {title(row)}: "
            f"{_in_a_line(found)}",
            flush=True,
        )
        return found


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file in one call, so that a kill leaves all of it or nothing.

    Raises:
        OSError: The line does not fit on the disk; the file is as it was.
    """
    content = (line + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        if os.write(file, content) != len(content):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def _in_a_line(found: Mapping[str, Any]) -> str:
    for key in ("left_out", "error"):
        if key in found:
            return f"{key.replace('_', ' ')}: {str(found[key]).splitlines()[-1]}"
    told = (
        f"{key} {value:.4g}"
        for key, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    )
    return ", ".join(told) or "done"


# ---------------------------------------------------------------- what is measured


def run_check(check: Check) -> dict[str, Any]:
    """Runs a check as a row, which has no figures; an exception is its failure."""
    check.function()
    return {}


def check_tasks(device: str, is_quick: bool, is_rehearsal: bool) -> tuple[list[Task], list[Task]]:
    """Returns checks that come first, and the long ones that come last."""
    where = "cuda:0" if device == "cuda" else "cpu"
    missing = "not rehearsed" if is_rehearsal else triton_problem() or ""
    checks = quick_checks(where) if is_quick else all_checks(where, missing)
    first: list[Task] = []
    late: list[Task] = []
    for one in checks:
        part = late if one.expected > LONG_CHECK_SECONDS else first
        part.append(
            Task(
                "check",
                one.name,
                {},
                run_check,
                (one,),
                one.expected,
                one.seconds,
                missing=one.left_out,
            )
        )
    return first, late


def head_tasks(
    device: str, is_quick: bool, is_rehearsal: bool, measured: Mapping[str, float]
) -> list[Task]:
    """Returns rows of ours and of the dense head that users have, the largest first."""
    sizes: tuple[int, ...] = (2_000_000, 1_000_000, 100_000)
    batch, many = 1024, (29_000_000, 512)
    if is_rehearsal:
        sizes, batch, many = (2_000,), 16, (5_000, 8)
    if is_quick:
        sizes = sizes[-1:]
    rows: list[tuple[Case, float | str]] = []
    for rate in (1.0, 0.1):
        for size in sizes:
            rows += [
                (Case("fused", size, batch, rate), "auto"),
                (Case("dense", size, batch, rate), "auto"),
            ]
            if size == sizes[0] and rate == 1.0 and not is_quick:
                rows.append((Case("fused", size, batch, rate, kernels="torch"), "auto"))
                rows.append((Case("fused", size, batch, rate), 256))  # the size before "auto"
                rows.append((Case("fused", size, batch, rate, "adamw"), "auto"))
    if not is_quick:
        rows.append((Case("fused", *many, 1.0, "sgd", "bf16", "bf16"), "auto"))
    repeats = 2 if is_rehearsal else 7
    return [
        Task(
            "head",
            case.head,
            {**case._asdict(), "workspace_mib": mib if case.head == "fused" else None},
            gpu_rows.head,
            (tuple(case), device, repeats, mib, measured),
            expected=2 if is_rehearsal else 4 + case.num_classes / 1e6,
            limit=120,
        )
        for case, mib in rows
    ]


def launch_tasks(missing: str) -> list[Task]:
    """Returns rows of the launch settings of the head's kernels."""
    tried: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
        ("logits", tile, {"tma": tma}) for tile, tma in TILES
    ]
    for dtype in ("fp32", "bf16"):
        tried += [("normalize", rows, {"dtype": dtype}) for rows in ROWS_PER_PROGRAM]
        for optimizer in ("sgd", "adamw"):
            options = {"dtype": dtype, "optimizer": optimizer}
            tried += [("update", rows, options) for rows in ROWS_PER_PROGRAM]
    return [
        Task(
            "launch",
            kernel,
            {"settings": "x".join(map(str, settings)), **options},
            gpu_rows.launch,
            (kernel, settings, options),
            expected=2,
            missing=missing,
        )
        for kernel, settings, options in tried
    ]


def product_tasks(device: str, is_rehearsal: bool) -> list[Task]:
    """Returns rows of the products of blocks of several sizes at B = 1024."""
    batch, sizes = (16, (256,)) if is_rehearsal else (1024, (32_768, 125_000))
    tasks = []
    for rows in sizes:
        params = {"batch": batch, "rows": rows}
        arguments = (device, batch, rows)
        tasks.append(Task("product", f"n = {rows:,}", params, gpu_rows.products, arguments))
    return tasks


def training_keys(
    device: str, network: str, num_classes: int, batch: int, rate: float
) -> dict[str, Any]:
    """Returns the keys that both configurations of a row share."""
    steps, toy = STEPS_PER_INTERVAL, {"input_size": 32} if network == "r_nano" else {}
    return {
        "network": network,
        "num_classes": num_classes,
        "batch_size": batch,
        "sample_rate": rate,
        "device": device,
        "max_steps": steps * INTERVALS,
        "num_image": batch * steps * INTERVALS,
        "frequent": steps,
        "num_epoch": 1,
        "num_workers": min(8, os.cpu_count() or 1),
        **toy,
    }


def step_tasks(
    device: str, is_rehearsal: bool, measured: Mapping[str, float], trace: Path
) -> list[Task]:
    """Returns rows of whole steps: ours, plain, ours compiled; one of them is a profile of ours."""
    networks, sizes, batch = ["r50", "r100"], [2_000_000, 360_000], 512
    if is_rehearsal:
        networks, sizes, batch = ["r_nano"], [300], 4
    ours = OURS[device]
    sides: dict[str, dict[str, Any]] = {
        "ours": ours,
        "plain": plain(device).keys,
        "ours, compiled": {**ours, **COMPILED},
    }
    tasks: list[Task] = []
    for network in networks:
        for size in sizes:
            shared = training_keys(device, network, size, batch, 1.0)
            tasks += [
                _training("step", name, {**shared, **keys}, measured, None, is_rehearsal)
                for name, keys in sides.items()
            ]
            if len(tasks) == len(sides):  # a separate run, because profiling slows it
                steps = 2 * STEPS_PER_INTERVAL
                keys = {**shared, **ours, "profile": PROFILED_STEPS, "max_steps": steps}
                tasks.append(
                    _training("step", "ours, profiled", keys, measured, str(trace), is_rehearsal)
                )
    return tasks


def published_tasks(device: str, is_rehearsal: bool, measured: Mapping[str, float]) -> list[Task]:
    """Returns the rows of the published table, with all identities on this one GPU."""
    identities, batch, network = list(IDENTITIES), 128, "r50"
    if is_rehearsal:
        identities, batch, network = [500], 4, "r_nano"
    tasks = []
    for size in identities:
        for rate in (1.0, 0.1) if not is_rehearsal else (0.1,):
            keys = training_keys(device, network, size, batch, rate) | OURS[device]
            if size * 4096 > 40e9:  # centers and momentum in fp32
                keys |= {"head_weight_dtype": "bf16", "head_state_dtype": "bf16"}
            name = f"{size:,} identities, r = {rate:g}"
            tasks.append(_training("published", name, keys, measured, None, is_rehearsal))
    return tasks


def _training(
    section: str,
    name: str,
    keys: dict[str, Any],
    measured: Mapping[str, float],
    trace: str | None,
    is_rehearsal: bool,
) -> Task:
    expected = START_SECONDS + MILLION_SECONDS * keys["num_classes"] / 1e6
    expected += keys["num_image"] / ASSUMED_SPEED[keys["network"]]
    expected += COMPILE_SECONDS if keys.get("compile") else 0.0
    missing = missing_packages(*TRAINER_NEEDS)
    if keys.get("compile"):
        missing = (
            missing or (triton_problem() if keys["device"] == "cuda" else compiler_problem()) or ""
        )
    return Task(
        section,
        name,
        keys,
        gpu_rows.training,
        (keys, measured, trace),
        expected=expected / 4 if is_rehearsal else expected,
        limit=300.0,
        is_alone=not is_rehearsal,
        missing=missing,
    )


def dali_task(device: str, is_rehearsal: bool, measured: Mapping[str, float]) -> Task:
    """Returns the row of records that DALI decodes on the GPU."""
    network, batch = ("r_nano", 4) if is_rehearsal else ("r50", 128)
    keys = training_keys(device, network, 100, batch, 1.0) | OURS[device] | {"input_size": 112}
    arguments = ({**keys, "dali": True}, keys["num_image"], measured)
    return Task(
        "dali",
        "DALI on the GPU",
        keys,
        gpu_rows.dali,
        arguments,
        START_SECONDS + 20,
        180.0,
        True,
        missing_packages(*TRAINER_NEEDS)
        or ("" if has_dali() else "DALI is not installed (docs/installing_dali.md)"),
    )


def has_dali() -> bool:
    """Returns whether nvidia.dali can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


# ---------------------------------------------------------------- the command


def measure(bench: Bench, device: str, sections: Sequence[str], is_rehearsal: bool) -> None:
    """Runs all tasks of the sections, in order of value."""
    is_quick = bench.seconds <= 60 * SMOKE_MINUTES and not is_rehearsal
    command = f"python -m benchmarks.gpu_bench OUT --minutes {bench.seconds / 60:g}"
    command += " --rehearse" if is_rehearsal else ""
    command += "" if tuple(sections) == SECTIONS else f" --sections {' '.join(sections)}"
    words = {"date": time.strftime("%Y-%m-%d"), "command": command, "rehearsal": is_rehearsal}
    bench.run(Task("environment", "environment", words, describe_environment, (), 15.0))
    # Other sections are compared with these.
    measured = bench.run(
        Task("ceilings", "ceilings", {}, gpu_rows.ceilings, (device, is_rehearsal), 10.0)
    )
    checks, late_checks = check_tasks(device, is_quick, is_rehearsal)
    if "check" in sections:
        while checks and bench.seconds_left > (1 - CHECK_SHARE) * bench.seconds:
            bench.run(checks.pop(0))
    if "head" in sections:
        for task in head_tasks(device, is_quick, is_rehearsal, measured):
            bench.run(task)
    if is_quick:
        return
    tasks: list[Task] = []
    if "launch" in sections:
        tasks += launch_tasks("a GPU is needed" if is_rehearsal else triton_problem() or "")
    if "product" in sections:
        tasks += product_tasks(device, is_rehearsal)
    if "step" in sections:
        tasks += step_tasks(device, is_rehearsal, measured, bench.folder / TRACE)
    if "check" in sections:
        tasks += [*checks, *late_checks]
    if "published" in sections:
        tasks += published_tasks(device, is_rehearsal, measured)
    if "dali" in sections:
        tasks.append(dali_task(device, is_rehearsal, measured))
    for task in tasks:
        bench.run(task)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="a folder for the results")
    parser.add_argument("--minutes", type=float, default=8, help="for everything (default 8)")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="SECTION",
        help="only these, beside environment and ceilings",
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        print(f"error: --minutes {options.minutes:g}: above 0", file=sys.stderr)
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu-bench: this PyTorch sees no GPU; nothing was measured (--rehearse runs the "
            "same rows at toy size on a CPU)",
            file=sys.stderr,
        )
        return 2
    try:
        bench = Bench(options.folder, 60 * options.minutes)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        measure(bench, "cpu" if options.rehearse else "cuda", options.sections, options.rehearse)
    except KeyboardInterrupt:
        print(f"interrupted; {options.folder} has the rows so far", file=sys.stderr)
        return 130
    finally:
        bench.close()
    print(f"\n{report(bench.rows)}\nwritten to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
