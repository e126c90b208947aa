"""What several test modules use, and what child processes of tests run; imports no torch."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from utils.environment import CODE_FOLDERS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = CODE_FOLDERS
"""Folders with Python code of the project."""
ENTRY_POINTS = ("dataset", "losses", "partial_fc", "torch2onnx", "train_v2")
"""Modules beside them."""

GOLDEN = ROOT / "tests" / "golden"
"""Outputs of published code that ours is compared with; its README.md says how they were made."""


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Look again and again, for things in other processes that cannot tell when they are done.

    Raises:
        TimeoutError: the condition still does not hold after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come about in {seconds} s")
        time.sleep(0.01)


def lives(pid: int) -> bool:
    """Whether there is such a process; one that has ended and was not waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal by now."""
    return _has_signal(pid, "SigCgt", number)


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal that was sent to the process has not been handled yet."""
    return _has_signal(pid, "ShdPnd", number)


def _has_signal(pid: int, mask: str, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{mask}:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    raise AssertionError(f"/proc/{pid}/status has no {mask}")


# --- child processes -------------------------------------------------------------------------


def start_sleeper(file: str, hang: bool) -> int:
    """The process id of a child, which is also in the file."""
    pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid
    Path(file).write_text(str(pid))
    time.sleep(60 if hang else 0)
    return pid


def row_of_process() -> dict[str, Any]:
    """Which process measured the row."""
    return {"pid": os.getpid()}


def broken_row() -> dict[str, Any]:
    """A row that fails."""
    raise RuntimeError("planted")


def passes() -> None:
    """Does nothing."""


def hangs() -> Any:
    """Takes a minute, unless it is killed."""
    time.sleep(60)


def write_rows(folder: Path) -> None:
    """Rows without end, as fast as they can be written."""
    from benchmarks.gpu_bench import Bench, Task

    bench = Bench(folder, 1e9)
    for number in range(10**9):
        bench.run(Task("head", f"row {number}", {}, dict, missing="no time " * 40))


def write_and_be_killed(folder: str) -> None:
    """20 processes, one after another, that write rows and are killed at a moment of their own.

    That is whenever it is seen that the file of rows has come to a length drawn for the process.
    """
    from benchmarks.gpu_bench import REPORT, ROWS

    random.seed(0)
    for number in range(20):
        rows = Path(folder, str(number))
        process = os.fork()
        if process == 0:
            write_rows(rows)
        wait_until((rows / REPORT).exists)
        wait_until(partial(_is_longer, rows / ROWS, random.randrange(20_000)))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _is_longer(path: Path, size: int) -> bool:
    return path.stat().st_size > size
