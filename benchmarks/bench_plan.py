"""Compares scripts/plan.py with reality: its memory with a step's peak, its time with a run.

    python -m benchmarks.bench_plan [--quick] [--only memory|time] [--network NAME ...]
        [--device cuda] [--json FILE] [--markdown FILE]

Memory: for each network and number of classes the parts of a run are built and make a few steps in
a separate process. On a CPU the figure is the peak of resident memory above what the process held
before, with libraries loaded and used once by a tiny run; it is the median of three processes,
because the heap's holes differ from one to the next. On a GPU it is the peak of PyTorch's
allocations.
Time: `plan.py --measure` is compared with train_v2.py as a process with the same config, by the
samples per second of its metrics.jsonl. Input is generated.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.bench_head import _peak_mib, _used_mib
from benchmarks.runs import in_a_process, run_training
from configs.base import Config
from training.build import build
from training.planner.plan import Setting, choose_machine, make_plan
from training.planner.roofline import Links
from utils.distributed import DistContext
from utils.memory import keep_freed_memory

STEPS = 4
# Allowed relative difference of the memory from the peak, and of the time from the run.
MEMORY_WITHIN = {"cpu": 0.15, "cuda": 0.10}
TIME_WITHIN = 0.30
CLASSES = (10_000, 100_000, 400_000)


class Case(NamedTuple):
    """One row.

    Attributes:
        network: Name of the network.
        num_classes: C.
        batch_size: Batch per rank.
        more: Further keys of the config.
    """

    network: str
    num_classes: int
    batch_size: int
    more: tuple[tuple[str, Any], ...] = ()

    def config(self, device: str) -> Config:
        """Returns the config of a run on generated images."""
        values: dict[str, Any] = {
            "rec": "synthetic",
            "num_image": 100 * self.batch_size,
            "device": device,
            "output": "unused",
            "verbose": 0,
        }
        return Config(**{**values, **self._asdict_of_config(), **dict(self.more)})

    def _asdict_of_config(self) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if k != "more"}

    def keys(self) -> dict[str, Any]:
        """Returns the keys for the command line of train_v2.py."""
        return {**self._asdict_of_config(), **dict(self.more)}


def memory_cases(quick: bool, device: str) -> list[Case]:
    """Returns three networks, three numbers of classes, and options that change memory."""
    scale = 1 if device == "cpu" else 8
    batches = {"r_nano": 64 * scale, "r50": 16 * scale, "vit_b": 16 * scale}
    if quick:
        return [Case("r_nano", classes, 32) for classes in CLASSES[:2]]
    cases = [Case(n, classes, batch) for n, batch in batches.items() for classes in CLASSES]
    precision = (("precision", "bf16"),) if device == "cuda" else ()
    options: tuple[tuple[tuple[str, Any], ...], ...] = (
        (("sample_rate", 0.1),),
        (("optimizer", "adamw"),),
        (("head_update", "autograd"),),
        (("gradient_acc", 2),),
    )
    cases = [case._replace(more=precision) for case in cases]
    nano = batches["r_nano"]
    cases += [Case("r_nano", 100_000, nano, option + precision) for option in options]
    checkpointed = (("gradient_checkpointing", True), *precision)
    return [*cases, Case("r50", 10_000, batches["r50"], checkpointed)]


def time_cases(quick: bool, device: str) -> list[Case]:
    """Returns the same networks with smaller batches: a step of a few seconds on one core."""
    batches = {"r_nano": 32} if quick else {"r_nano": 32, "r50": 4, "vit_b": 2}
    scale, more = (1, ()) if device == "cpu" else (32, (("precision", "bf16"),))
    return [Case(n, CLASSES[1], scale * batch, more) for n, batch in batches.items()]


def measure_memory(case: Case, device: str) -> float:
    """Returns the peak in MiB; runs in a separate process."""
    world = DistContext(0, 0, 1, torch.device(device))
    if device == "cpu":
        keep_freed_memory()
    _steps(case._replace(network="r_nano", num_classes=64, batch_size=4), world)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _used_mib(device)
    _steps(case, world)
    return _peak_mib(device) - before


def _steps(case: Case, world: DistContext) -> None:
    cfg = case.config(world.device.type)
    parts = build(cfg, world)
    parts.step.model.train()
    batches = iter(parts.loader)
    for _ in range(STEPS):
        parts.step(list(islice(batches, cfg.gradient_acc)), 0.01)
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def run_memory(case: Case, device: str, repeats: int) -> tuple[list[float], dict[str, float]]:
    """Returns measured peaks in MiB, and the plan's parts in MiB."""
    setting = Setting(choose_machine(None), 1, Links(), case.num_classes, 100 * case.batch_size)
    footprint = make_plan(case.config(device), setting).needs.footprint
    parts = {name: size / 2**20 for name, size in footprint.parts().items()}
    return [in_a_process(measure_memory, case, device) for _ in range(repeats)], parts


def run_time(case: Case, device: str, seconds: float) -> tuple[float, float]:
    """Returns samples per second of a run of train_v2.py, and of the plan's measurement."""
    machine = dataclasses.replace(choose_machine(None), memory_gib=1e6)
    setting = Setting(machine, 1, Links(), case.num_classes, 100 * case.batch_size, seconds)
    # A separate process has its own threads and memory, as the run has.
    planned = in_a_process(_planned_speed, case, device, setting)
    steps = max(12, round(seconds * planned / case.batch_size))
    run = run_training(
        {
            **case.keys(),
            "num_image": case.batch_size * steps,
            "num_epoch": 1,
            "frequent": max(2, steps // 6),
            "device": device,
        }
    )
    return run.samples_per_second, planned


def _planned_speed(case: Case, device: str, setting: Setting) -> float:
    return make_plan(case.config(device), setting).samples_per_second


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0 if everything is within its limit, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="r_nano only, less than a minute")
    parser.add_argument("--only", choices=("memory", "time"), help="one of the two tables")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", nargs="+", help="only rows of these")
    parser.add_argument("--seconds", type=float, default=20.0, help="per measured time")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but this PyTorch sees no GPU", file=sys.stderr)
        return 2
    where = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    head = (
        f"{time.strftime('%Y-%m-%d')}, {where}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, D = 512"
    )
    text = [
        head,
        "",
        "| network | classes | batch | options | plan MiB | peak MiB | plan / peak |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(text), flush=True)
    rows: list[dict[str, Any]] = []
    ok = True

    def add(line: str) -> None:
        text.append(line)
        print(line, flush=True)

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text("\n".join(text) + "\n")

    def chosen(what: str, cases: list[Case]) -> list[Case]:
        networks = options.network or {case.network for case in cases}
        is_wanted = options.only in (None, what)
        return [case for case in cases if is_wanted and case.network in networks]

    for case in chosen("memory", memory_cases(options.quick, device)):
        peaks, parts = run_memory(case, device, 1 if options.quick or device == "cuda" else 3)
        peak = median(peaks)
        ratio = sum(parts.values()) / peak
        ok &= abs(ratio - 1) <= MEMORY_WITHIN[device]
        more = " ".join(f"{k}={v}" for k, v in case.more)
        add(
            f"| {case.network} | {case.num_classes:,} | {case.batch_size} | {more} | "
            f"{sum(parts.values()):,.0f} | {peak:,.0f} | {ratio:.2f} |"
        )
        rows.append(
            {
                "what": "memory",
                **case._asdict(),
                "peaks_mib": peaks,
                "plan_mib": parts,
                "ratio": ratio,
            }
        )
        write()
    add("")
    add(
        "| network | classes | batch | plan --measure, samples/s | train_v2.py, samples/s | "
        "plan / run |"
    )
    add("|---|---|---|---|---|---|")
    for case in chosen("time", time_cases(options.quick, device)):
        run, planned = run_time(case, device, 5.0 if options.quick else options.seconds)
        ratio = planned / run
        ok &= abs(ratio - 1) <= TIME_WITHIN
        add(
            f"| {case.network} | {case.num_classes:,} | {case.batch_size} | {planned:,.1f} | "
            f"{run:,.1f} | {ratio:.2f} |"
        )
        rows.append(
            {"what": "time", **case._asdict(), "run": run, "planned": planned, "ratio": ratio}
        )
        write()
    print("all within the limits" if ok else "NOT all within the limits")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
