"""Runs train_v2.py as processes and reads their files, so that no benchmark has a second loop.

`in_a_process` serves what is measured without the loop.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, TypeVar

from utils.worker import Worker

REPOSITORY = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 30  # for ranks whose peer is gone, as torchrun gives them
ENTRY = ("train_v2.py",)
# The same with glibc's default allocator settings (utils/memory.py says what we change).
ENTRY_PLAIN_ALLOCATOR = (
    "-c",
    "import sys, utils.memory; utils.memory.keep_freed_memory = lambda: False; "
    "import train_v2; sys.exit(train_v2.main())",
)
T = TypeVar("T")
_CONFIG = "config = dict(rec='synthetic', verbose=0, keep_checkpoints=0)\n"


def in_a_process(function: Callable[..., T], *arguments: Any) -> T:
    """Computes `function(*arguments)` in a separate process, which has ended when this returns.

    Errors of `function` are raised here.

    Raises:
        WorkerDied: The process was killed, for example for lack of memory.
    """
    with Worker() as worker:
        return worker.run(function, *arguments)


class RunFailed(RuntimeError):
    """A training run failed; the message has the end of its log."""


class Reading(NamedTuple):
    """Figures of a run, without its first log interval.

    Attributes:
        samples_per_second: Over all ranks, the median of the intervals.
        data_wait_share: Share of the time that waits for data, the mean of the intervals.
        peak_mib: Peak of rank 0 from start to end: the whole process on a CPU, PyTorch's reserved
            memory on a GPU.
        compile_seconds: Time of compiling if the log states it (compile=True), else None.
    """

    samples_per_second: float
    data_wait_share: float
    peak_mib: float
    compile_seconds: float | None = None


def read_metrics(lines: Sequence[str], log: str = "") -> Reading:
    """Reads the figures of a run.

    Args:
        lines: Lines of metrics.jsonl.
        log: Text of training.log.

    Raises:
        ValueError: There are fewer than two log intervals; the first contains the start.
    """
    logged = [record for record in map(json.loads, lines) if "samples_per_second" in record]
    if len(logged) < 2:
        raise ValueError(
            f"metrics.jsonl has {len(logged)} log interval(s): 2 or more are needed, the first is "
            "left out. Raise max_steps or lower frequent"
        )
    warm = logged[1:]
    found = re.search(r"compile: the first pass took ([\d.]+) s", log)
    return Reading(
        median(record["samples_per_second"] for record in warm),
        mean(record["data_wait_share"] for record in warm),
        max(record["peak_memory_gib"] for record in logged) * 1024,
        float(found[1]) if found else None,
    )


def run_training(
    keys: Mapping[str, Any],
    *,
    ranks: int = 1,
    entry: Sequence[str] = ENTRY,
    profile_to: Path | None = None,
) -> Reading:
    """Trains on generated images (unless `keys` has rec), without verification and checkpoints.

    Args:
        keys: Keys of the config.
        ranks: Number of ranks; more than one have a thread each.
        entry: Arguments of Python that start the training.
        profile_to: Folder for what the key `profile` makes the run write.

    Raises:
        RunFailed: A rank ends with an exit code other than 0.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "bench.py").write_text(_CONFIG)
        words = [str(folder / "bench.py"), f"output={folder / 'run'}"]
        words += [f"{key}={value}" for key, value in keys.items()]
        with (folder / "log").open("wb") as log:
            processes = start_ranks([*entry, *words], ranks, log, 1 if ranks > 1 else None)
            try:
                codes = wait_for(processes)
            finally:
                for process in processes:
                    process.kill()  # has no effect on a process that has ended
        if any(codes):
            end = (folder / "log").read_text(errors="replace")[-2000:]
            raise RunFailed(f"exit codes {codes} of train_v2.py {' '.join(words)}:\n{end}")
        output = folder / "run"
        if profile_to is not None:
            shutil.copytree(output / "profile", profile_to)
        return read_metrics(
            (output / "metrics.jsonl").read_text().splitlines(),
            (output / "training.log").read_text(),
        )


def start_ranks(
    words: Sequence[str], world_size: int, log: Any, threads: int | None
) -> list[subprocess.Popen[bytes]]:
    """Starts a Python process per rank with these words, in the repository's folder.

    Args:
        words: Arguments of Python.
        world_size: Number of ranks.
        log: File for stdout and stderr.
        threads: Threads per rank; None leaves the environment as it is, for one rank.
    """
    shared = dict(os.environ)
    if threads is not None:
        shared |= {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world_size),
        }
    return [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            env=shared
            if threads is None
            else {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]


def wait_for(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Returns exit codes; ranks that outlive a failed one by too long are killed."""
    deadline = None
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() for process in processes)
        if failed and deadline is None:
            deadline = time.monotonic() + SECONDS_TO_END
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.returncode for process in processes]


def free_port() -> int:
    """Returns a TCP port that no process listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
