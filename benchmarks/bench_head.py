"""What a step of the head costs: forward, backward and update, against the head of today.

    python -m benchmarks.bench_head [--quick] [--json FILE]

In one run and in turn: one matmul [B, D] x [D, C] (the unit), the dense head as users have it
(tests/reference.py DenseHead; also with utils/memory.py's setting, which alone gives much on a
CPU), and PartialFC at sample rates 1 and 0.1. Medians of the repeats;
peak memory above what weights and momentum hold, from a process of its own per row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from head.row_update import SGDRows
from losses import ArcFace
from partial_fc import PartialFC
from tests.reference import DenseHead
from utils.memory import keep_freed_memory

WIDTH = 512
HEADS = ("dense", "dense, memory kept", "partial_fc r=1", "partial_fc r=0.1")


def make_step(head: str, num_classes: int, batch: int, learning_rate: float) -> Callable[[], None]:
    """A function that does one step of the head by name, on fixed random input."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, WIDTH, generator=generator).requires_grad_(True)
    labels = torch.randint(num_classes, (batch,), generator=generator)
    if head.startswith("dense"):
        dense = DenseHead(torch.randn(num_classes, WIDTH, generator=generator) * 0.01)
        return lambda: _clear(embeddings, dense.step(embeddings, labels))
    rate = float(head.split("=")[1])
    margin = ArcFace(gradient="straight_through")
    ours = PartialFC(
        margin, WIDTH, num_classes, rate, row_update=SGDRows(), batch_size_per_rank=batch
    )

    def step() -> None:
        loss = ours(embeddings, labels)
        loss.backward()
        ours.step(learning_rate)
        _clear(embeddings, loss)

    return step


def _clear(embeddings: torch.Tensor, loss: torch.Tensor) -> None:
    assert torch.isfinite(loss)
    embeddings.grad = None


def measure(head: str, num_classes: int, batch: int, repeats: int, queue: Any) -> None:
    """Median seconds of a step and of one matmul between steps, and peak memory; in a process."""
    if head != "dense":  # as train_v2.py does on a CPU; users of today do not
        keep_freed_memory()
    product = torch.empty(batch, num_classes)
    left, right = torch.randn(batch, WIDTH), torch.randn(WIDTH, num_classes)
    matmul_times, step_times = [], []
    for _ in range(3):
        torch.mm(left, right, out=product)
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        matmul_times.append(time.perf_counter() - start)
    del product, left, right
    before = resident_mib()
    step = make_step(head, num_classes, batch, 0.1)
    state_mib = 2 * num_classes * WIDTH * 4 / 2**20
    for number in range(repeats + 1):
        start = time.perf_counter()
        step()
        if number:  # the first is the warm-up
            step_times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before - state_mib
    queue.put((statistics.median(step_times), statistics.median(matmul_times), peak))


def resident_mib() -> float:
    """What this process holds in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints a table and optionally writes rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one size, about a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    sizes = [(100_000, 128)] if options.quick else [(100_000, 128), (100_000, 512), (400_000, 128)]
    repeats = 5 if options.quick else 7
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, D = {WIDTH}, fp32, SGD, "
        f"medians of {repeats}"
    )
    header = ("head", "classes", "batch", "step ms", "step / matmul", "of dense", "peak MiB")
    print("{:18} {:>8} {:>6} {:>9} {:>14} {:>9} {:>9}".format(*header))
    rows = []
    context = mp.get_context("spawn")
    for num_classes, batch in sizes:
        dense_seconds = 0.0
        for head in HEADS:
            queue = context.Queue()
            process = context.Process(
                target=measure, args=(head, num_classes, batch, repeats, queue)
            )
            process.start()
            seconds, matmul, peak = queue.get()
            process.join()
            dense_seconds = seconds if head == "dense" else dense_seconds
            print(
                f"{head:18} {num_classes:>8,} {batch:>6} {seconds * 1e3:>9.1f} "
                f"{seconds / matmul:>14.2f} {seconds / dense_seconds:>9.2f} {peak:>9.0f}"
            )
            rows.append({
                "name": head, "params": {"num_classes": num_classes, "batch": batch},
                "median_ms": seconds * 1e3, "peak_mib": peak,
                "ratio_to_baseline": seconds / dense_seconds,
                "ratio_to_matmul": seconds / matmul,
            })  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
