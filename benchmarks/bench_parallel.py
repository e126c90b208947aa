"""What a classifier costs per rank when it is split over ranks: memory and time of a step.

    python -m benchmarks.bench_parallel [--quick] [--json FILE] [--markdown FILE] [--plot FILE]

A step is forward, cross-entropy, backward and SGD on a global batch of 32 rows, on 1, 2 and 4
gloo ranks of this machine, one thread each, every case in separate processes:

    nn.Linear    the baseline: the whole layer and cross_entropy on one rank, nothing shared
    replicated   ParallelLinear(dim=None) under DDP, each rank its part of the batch
    column       ParallelLinear(dim=1): the batch gathered, logits split, never whole
    row          ParallelLinear(dim=0): the batch gathered, partial logits added up

Memory is the peak above what the process held once torch was loaded and the group had met, the
largest over the ranks; "of baseline" is against nn.Linear with the same classes and settings.
The settings are fp32 (SGD), amp (bf16 autocast, SGD) and zero (momentum; ZeroRedundancyOptimizer if
the layer is replicated, a plain SGD on the parts if it is split: the same state per rank, spread).
Cases that would need more than --memory-gib over all ranks are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from arcshard.parallel import (
    ParallelCrossEntropyLoss,
    ParallelLinear,
    gather,
    register_ddp_parameters_to_ignore,
)
from benchmarks.bench_head import _peak_mib, _used_mib

BATCH = 32
BASELINE = "nn.Linear"
DIMS = {"replicated": None, "column": 1, "row": 0}
HEADER = (
    "| layout | ranks | step ms | of baseline | peak MiB per rank | of baseline | 1/n + 0.1 |\n"
    "|---|---|---|---|---|---|---|"
)


class Case(NamedTuple):
    """One row of the tables.

    Attributes:
        layout: "nn.Linear", "replicated", "column" or "row".
        num_classes: C.
        width: D.
        ranks: Number of ranks.
        setting: "fp32", "amp" or "zero".
    """

    layout: str
    num_classes: int
    width: int
    ranks: int
    setting: str = "fp32"

    @property
    def gib_in_all(self) -> float:
        """GiB that all ranks together will hold: weight, gradient, state, half copies, logits."""
        copies = {"fp32": 2.0, "amp": 3.0, "zero": 3.0}[self.setting]
        if self.layout == "replicated":
            copies *= self.ranks
        logits = 2.2 * BATCH * self.num_classes * (self.ranks if self.layout == "row" else 1)
        return 4 * (copies * self.num_classes * self.width + logits) / 2**30


def cases(quick: bool) -> list[Case]:
    """Returns all cases in the order of the tables; the baseline of each size comes first."""
    groups: list[tuple[int, int, str, tuple[int, ...]]] = [
        (10_000, 2048, "fp32", (2,) if quick else (1, 2, 4)),
        (100_000, 2048, "fp32", (2,) if quick else (1, 2, 4)),
    ]
    if not quick:
        groups += [(1_000_000, width, "fp32", (1, 2, 4)) for width in (2048, 512)]
        for num_classes, width in ((85_744, 512), (1_000_000, 512), (4_000_000, 128)):
            settings = ("amp", "zero") if num_classes == 1_000_000 else ("fp32", "amp", "zero")
            groups += [(num_classes, width, setting, (4,)) for setting in settings]
    found = []
    for num_classes, width, setting, ranks in groups:
        found.append(Case(BASELINE, num_classes, width, 1, setting))
        found += [Case(layout, num_classes, width, n, setting) for layout in DIMS for n in ranks]
    return found


class Stepper:
    """One rank's classifier with its input, loss and optimizer."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank = case, rank
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(BATCH, case.width, generator=generator)
        labels = torch.randint(case.num_classes, (BATCH,), generator=generator)
        rows = BATCH // case.ranks
        mine = slice(rank * rows, (rank + 1) * rows)
        self.x = whole[mine].clone().requires_grad_(True)
        is_split = case.layout in ("column", "row")
        self.labels = labels if is_split else labels[mine]
        self.autocast = case.setting == "amp"
        torch.manual_seed(0)
        self.layer: nn.Module
        if case.layout == BASELINE:
            self.layer = nn.Linear(case.width, case.num_classes)
        else:
            self.layer = ParallelLinear(case.width, case.num_classes, dim=DIMS[case.layout])
        momentum = 0.9 if case.setting == "zero" else 0.0
        options: dict[str, Any] = {"lr": 0.1, "momentum": momentum, "foreach": False}
        if case.layout == "replicated" and case.ranks > 1:
            register_ddp_parameters_to_ignore(self.layer)
            self.layer = DistributedDataParallel(self.layer, gradient_as_bucket_view=True)
        self.optimizer: torch.optim.Optimizer
        if case.layout == "replicated" and case.setting == "zero":
            self.optimizer = ZeroRedundancyOptimizer(
                self.layer.parameters(), torch.optim.SGD, **options
            )
        else:
            self.optimizer = torch.optim.SGD(self.layer.parameters(), **options)
        self.gathers = is_split
        self.loss_of = ParallelCrossEntropyLoss()

    def step(self) -> None:
        """Does forward, loss, backward and update."""
        half = torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()
        with half:
            x = gather(self.x, 0, sizes=[len(self.x)] * self.case.ranks) if self.gathers else self.x
            logits = self.layer(x)
            if self.case.layout in DIMS:
                loss = self.loss_of(logits, self.labels)
            else:
                loss = cross_entropy(logits, self.labels)
            del logits
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None
        if not torch.isfinite(loss):
            raise RuntimeError(f"{self.case}: the loss is {float(loss)}")


def measure(rank: int, case: Case, repeats: int, store: str, queue: Any) -> None:
    """Puts (seconds, MiB) of one rank into the queue; runs in a separate process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=case.ranks)
    small = Stepper(case._replace(num_classes=64, width=64), rank)
    small.step()  # creates threads, connections and kernels before memory is counted
    del small
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _used_mib("cpu")
    stepper = Stepper(case, rank)
    stepper.step()
    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        stepper.step()
        times.append(time.perf_counter() - start)
    queue.put((statistics.median(times), _peak_mib("cpu") - before))
    dist.barrier()
    dist.destroy_process_group()


def run(case: Case, repeats: int) -> tuple[float, float]:
    """Returns the slowest rank's median in seconds, and the largest peak in MiB."""
    queue = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.spawn(measure, (case, repeats, store, queue), nprocs=case.ranks)
    results = [queue.get() for _ in range(case.ranks)]
    return max(r[0] for r in results), max(r[1] for r in results)


def compare(
    chosen: Sequence[Case], repeats: int, memory_gib: float
) -> tuple[list[str], list[dict[str, Any]]]:
    """Runs the cases and prints as it goes; returns lines of the report, and rows for JSON."""
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    baseline: tuple[float, float] | None = None
    title = ""

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    for case in chosen:
        name = f"{case.num_classes:,} classes, D = {case.width}, {case.setting}"
        if name != title:
            title, baseline = name, None
            say(f"\n## {title}\n\n{HEADER}")
        if case.gib_in_all > memory_gib:
            left_out = f"{case.gib_in_all:.1f} GiB in all: left out"
            say(f"| {case.layout} | {case.ranks} | {left_out} | | | | |")
            continue
        seconds, peak = run(case, repeats)
        if case.layout == BASELINE:
            baseline = seconds, peak
        ratios = (seconds / baseline[0], peak / baseline[1]) if baseline else (None, None)
        slower, share = (f"{r:.2f}" if r is not None else "-" for r in ratios)
        say(
            f"| {case.layout} | {case.ranks} | {seconds * 1e3:.1f} | {slower} | {peak:.0f} | "
            f"{share} | {1 / case.ranks + 0.1:.2f} |"
        )
        rows.append(
            {
                "name": case.layout,
                "params": {
                    "num_classes": case.num_classes,
                    "embedding_size": case.width,
                    "batch": BATCH,
                    "ranks": case.ranks,
                    "setting": case.setting,
                },
                "median_ms": seconds * 1e3,
                "peak_mib": peak,
                "ratio_to_baseline": ratios[0],
                "memory_ratio_to_baseline": ratios[1],
            }
        )
    return lines, rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws memory per rank and step time of every layout against the ranks, fp32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fp32 = [row for row in rows if row["params"]["setting"] == "fp32"]
    sizes = list(
        dict.fromkeys(
            (row["params"]["num_classes"], row["params"]["embedding_size"]) for row in fp32
        )
    )
    figure, axes = plt.subplots(2, len(sizes), figsize=(4 * len(sizes), 7), squeeze=False)
    for column, (num_classes, width) in enumerate(sizes):
        here = [
            row
            for row in fp32
            if (row["params"]["num_classes"], row["params"]["embedding_size"])
            == (num_classes, width)
        ]
        for axis, key, unit in (
            (axes[0][column], "peak_mib", "peak MiB per rank"),
            (axes[1][column], "median_ms", "step, ms"),
        ):
            for color, layout in enumerate((BASELINE, *DIMS)):
                points = [(r["params"]["ranks"], r[key]) for r in here if r["name"] == layout]
                if layout == BASELINE and points:
                    axis.axhline(points[0][1], color="gray", linestyle=":", label=layout)
                elif points:
                    axis.plot(*zip(*points, strict=True), "o-", color=f"C{color}", label=layout)
            axis.set(xlabel="ranks", ylabel=unit, ylim=(0, None), xticks=[1, 2, 4])
            axis.grid(alpha=0.3)
        axes[0][column].set_title(f"{num_classes:,} classes, D = {width}", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints tables, and writes rows, report and plot on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes, about a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--memory-gib", type=float, default=9.5, help="of all ranks together")
    options = parser.parse_args(arguments)
    repeats = 3 if options.quick else 5
    first = (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, one thread "
        f"per rank, B = {BATCH}, medians of {repeats}, slowest rank"
    )
    print(first, flush=True)
    lines, rows = compare(cases(options.quick), repeats, options.memory_gib)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join([first, *lines]) + "\n")
    if options.plot:
        draw(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
