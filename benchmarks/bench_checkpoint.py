"""What checkpoints cost: the steps during a save, and the memory of a save and of a load.

    python -m benchmarks.bench_checkpoint [--quick] [--json FILE]

steps    configs/demo on 2 ranks as it is, one save every tenth step: a save's steps are those that
         began before it was written. The time of a step is that in metrics.jsonl, so the staging
         copy is in the first step of each save.
memory   the state of C class centers of width D = 512 with momentum and of r_nano, on 1 and 2
         ranks: peak resident memory while saving in one go, while loading, and while saving in the
         background, above what the process held before it built anything, as a multiple of what
         this rank keeps of the state.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from benchmarks.bench_faults import Run
from benchmarks.bench_head import _peak_mib, _used_mib
from benchmarks.runs import free_port
from dataset import Batch
from scripts.make_synthetic import make_synthetic
from training.build import build
from training.checkpoint.checkpointer import Checkpointer, RankGroup, check_intact
from training.divergence import DivergenceMonitor
from training.state import Progress, RunState
from utils.config import load_config
from utils.distributed import DistContext, destroy_distributed, init_distributed
from utils.memory import keep_freed_memory

EVERY = 10  # steps
BATCH_PER_RANK = 32  # the demo's
WRITTEN = re.compile(r"checkpoint \S*step_(\d+) written in ([\d.]+) s")


def steps_of_saves(
    metrics: Path, log: str, batch: int
) -> tuple[list[float], list[float], list[float]]:
    """Divides the logged steps into those during a save and all others.

    Args:
        metrics: Path of metrics.jsonl.
        log: Text of the training log.
        batch: Global batch, in samples.

    Returns:
        The median time of the steps of each save, the times of all other steps, and how long each
        save took, all in seconds.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    times = {line["step"]: batch / line["samples_per_second"] for line in lines if "loss" in line}
    during: list[float] = []
    written: list[float] = []
    touched: set[int] = set()
    for step, seconds in ((int(s), float(t)) for s, t in WRITTEN.findall(log)):
        left, its = seconds, []
        while left > 0 and step + 1 in times:
            step += 1
            its.append(times[step])
            touched.add(step)
            left -= its[-1]
        if its:
            during.append(statistics.median(its))
            written.append(seconds)
    first = 5  # the first steps build what later ones reuse
    others = [seconds for step, seconds in times.items() if step not in touched and step > first]
    return during, others, written


def measure_steps(saves: int) -> dict[str, Any]:
    """Measures the slow-down of the steps during a save, at the demo's size."""
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as temporary:
        folder = Path(temporary)
        make_synthetic(
            folder / "faces", identities=100, images_per_identity=20, verification_pairs=40, seed=1
        )
        run = Run(
            folder / "run",
            folder / "faces",
            2,
            (),
            settings=(
                "configs/demo",
                "val_targets=[]",
                "frequent=1",
                f"checkpoint_every={EVERY}",
                "num_epoch=100",
                f"batch_size={BATCH_PER_RANK}",
                f"max_steps={EVERY * (saves + 1) - 2}",
            ),
        )
        codes = run.wait()
        log = Path(run.log.name).read_text()
        if any(codes):
            raise RuntimeError(f"the run ended with {codes}: {log[-2000:]}")
        metrics = folder / "run" / "metrics.jsonl"
        during, others, written = steps_of_saves(metrics, log, 2 * BATCH_PER_RANK)
    ratio = statistics.median(during) / statistics.median(others)
    print(
        f"{len(during)} saves of {1000 * statistics.median(written):.0f} ms (median): a step takes "
        f"{1000 * statistics.median(others):.0f} ms, during a save "
        f"{1000 * statistics.median(during):.0f} ms: {ratio:.2f} of it",
        flush=True,
    )
    return {
        "name": "steps during a save",
        "params": {"saves": len(during), "ratio": ratio, "each": during, "written_s": written},
        "median_ms": 1000 * statistics.median(during),
    }


def measure_memory(
    rank: int, world_size: int, port: int, classes: int, folder: str, queue: Any
) -> None:
    """Puts the peaks of one rank in MiB into the queue; runs in a separate process."""
    if world_size > 1:
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
        )
    torch.set_num_threads(1)
    world = init_distributed("cpu")
    keep_freed_memory()
    path = Path(folder)
    before = _used_mib("cpu")
    state = _built(classes, world)
    kept = (
        sum(stored.local.numel() * stored.local.itemsize for stored in state.tensors().values())
        / 2**20
    )
    ranks = RankGroup(world)
    checkpointer = Checkpointer(path, ranks, keep=1, max_failed=1)
    facts = {**state.facts(Progress())}
    peaks = {"state": kept, "built": _used_mib("cpu") - before}
    peaks["save"] = _peak_of(lambda: checkpointer.save(1, state.tensors(), facts, wait=True))
    found = check_intact(path / "step_00000001", ranks)
    peaks["load"] = _peak_of(lambda: state.load(found, ranks))

    def in_the_background() -> None:
        checkpointer.save(2, state.tensors(), facts)
        checkpointer.wait()

    peaks["background"] = _peak_of(in_the_background)
    for name in ("save", "load", "background"):
        peaks[name] -= before
    if checkpointer.failed_in_a_row:
        raise RuntimeError(checkpointer.last_error)
    ranks.gather(None)
    queue.put(peaks)
    destroy_distributed()


def _built(classes: int, world: DistContext) -> RunState:
    """Returns the complete state of a run after one step."""
    cfg = load_config(
        "configs/ms1mv3_r50",
        [
            "network=r_nano",
            "rec=synthetic",
            f"num_classes={classes}",
            "num_image=1000",
            "batch_size=2",
            "val_targets=[]",
            "precision=fp32",
            "embedding_size=512",
            "num_workers=0",
            "output=unused",
            "device=cpu",
        ],
    )
    parts = build(cfg, world)
    parts.step.model.train()
    parts.loader.set_epoch(0, 0)
    batch: Batch = next(iter(parts.loader))
    parts.step([batch], 0.01)
    return RunState(parts, world, DivergenceMonitor(world.device), cfg.seed)


def _peak_of(action: Any) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    action()
    return _peak_mib("cpu")


def compare_memory(classes: int, world_size: int) -> dict[str, Any]:
    """Returns the largest peaks over the ranks, each relative to the rank's own state."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    with tempfile.TemporaryDirectory(prefix="bench_checkpoint_") as folder:
        spawned = mp.spawn(
            measure_memory,
            (world_size, free_port(), classes, folder, queue),
            nprocs=world_size,
            join=False,
        )
        rows = [queue.get(timeout=1800) for _ in range(world_size)]
        while not spawned.join():
            pass
    ratios = {
        name: max(row[name] / row["state"] for row in rows)
        for name in ("built", "save", "load", "background")
    }
    print(
        f"{classes:>9,} {world_size:>5} {max(row['state'] for row in rows):>10,.0f}"
        + "".join(f"{ratios[name]:>12.2f}" for name in ratios),
        flush=True,
    )
    return {
        "name": f"memory C={classes} ranks={world_size}",
        "params": {"classes": classes, "ranks": world_size, **ratios},
        "peak_bytes": int(max(row["background"] for row in rows) * 2**20),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two saves, 100,000 classes")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows = [measure_steps(2 if options.quick else 10)]
    print("\npeak above the process before the run was built, as multiples of one rank's state")
    print(
        f"{'classes':>9} {'ranks':>5} {'state, MiB':>10} {'built':>11} {'save':>11} {'load':>11} "
        f"{'background':>11}"
    )
    for ranks in (1, 2):
        rows.append(compare_memory(100_000 if options.quick else 1_000_000, ranks))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
