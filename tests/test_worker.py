"""A worker process returns results, passes errors on, and is replaced after it dies or hangs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import lives, start_sleeper, wait_until
from utils.worker import ChildTraceback, Worker, WorkerDied

ROOT = Path(__file__).resolve().parent.parent


class Odd(Exception):
    """An exception that pickle can write and cannot read."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail(odd: bool) -> None:
    raise Odd(1, 2) if odd else ValueError("three")


class Large:
    """What stands for a tensor."""


LARGE: weakref.WeakSet[Large] = weakref.WeakSet()  # those that are alive


def fail_with_memory() -> None:
    gc.disable()
    large = Large()
    LARGE.add(large)
    raise ValueError(f"{len(LARGE)} alive")


def count_alive() -> int:
    return len(LARGE)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_lock() -> Any:
    return threading.Lock()


def child_result() -> int:
    """What a child process of the worker's own says, as a loader's would."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(abs, (-3,))


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


def test_one_process_runs_one_function_after_another(worker: Worker) -> None:
    assert worker.run(abs, -3) == 3
    first = worker.run(os.getpid)
    assert first != os.getpid()
    large = b"x" * 3_000_000  # more than a pipe takes
    assert worker.run(bytes.upper, large) == large.upper()
    assert worker.run(os.getpid) == first
    worker.close()
    assert not lives(first)
    worker.close()
    assert worker.run(os.getpid) != first


def test_an_exception_comes_with_its_traceback_and_the_process_stays(worker: Worker) -> None:
    first = worker.run(os.getpid)
    with pytest.raises(ValueError, match="three") as caught:
        worker.run(fail, False)
    assert isinstance(caught.value.__cause__, ChildTraceback)
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        worker.run(fail, True)
    with pytest.raises(SystemExit):
        worker.run(sys.exit, 3)
    assert worker.run(os.getpid) == first


def test_what_a_failed_function_held_is_freed(worker: Worker) -> None:
    with pytest.raises(ValueError, match="1 alive"):
        worker.run(fail_with_memory)
    assert worker.run(count_alive) == 0


def test_a_process_that_dies_says_how_and_is_replaced(worker: Worker) -> None:
    first = worker.run(os.getpid)
    with pytest.raises(WorkerDied, match=r"killed by SIGKILL; memory may have run out"):
        worker.run(kill_itself)
    second = worker.run(os.getpid)
    assert second != first
    with pytest.raises(WorkerDied, match=r"_exit: the process ended with exit code 3"):
        worker.run(os._exit, 3)
    third = worker.run(os.getpid)
    os.kill(third, signal.SIGKILL)  # between two runs
    os.waitid(os.P_PID, third, os.WEXITED | os.WNOWAIT)
    assert worker.run(os.getpid) not in (first, second, third)


def test_a_process_that_hangs_is_killed_and_replaced(worker: Worker, tmp_path: Path) -> None:
    first = worker.run(os.getpid)
    file = tmp_path / "pid"
    with pytest.raises(TimeoutError, match=r"start_sleeper did not end within 1 seconds"):
        worker.run(start_sleeper, str(file), True, seconds=1)
    assert not lives(first)
    wait_until(lambda: not lives(int(file.read_text())))
    assert worker.run(os.getpid, seconds=60) != first


def test_what_a_function_started_ends_with_the_worker(worker: Worker, tmp_path: Path) -> None:
    started = worker.run(start_sleeper, str(tmp_path / "pid"), False)
    assert lives(started)
    worker.close()
    wait_until(lambda: not lives(started))


def test_a_function_may_have_child_processes(worker: Worker) -> None:
    assert worker.run(child_result) == 3


def test_what_cannot_be_pickled_is_said(worker: Worker) -> None:
    assert worker.run(abs, -3) == 3
    with pytest.raises(TypeError, match=r"print or an argument of it cannot be pickled.*lock"):
        worker.run(print, threading.Lock())
    with pytest.raises(TypeError, match=r"lambda.* or an argument of it cannot be pickled"):
        worker.run(lambda: 3)
    with pytest.raises(TypeError, match=r"the result of make_lock cannot be pickled.*lock"):
        worker.run(make_lock)
    assert worker.run(abs, -3) == 3


PARENT = """
import sys
from tests.helpers import start_sleeper
from utils.worker import Worker

if __name__ == "__main__":
    Worker().run(abs, -3)
    if len(sys.argv) > 1:
        Worker().run(start_sleeper, sys.argv[1], True)
"""


def start_parent(script: Path, *words: str) -> subprocess.Popen[bytes]:
    script.write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, str(script), *words], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_a_worker_whose_parent_is_killed_ends_in_the_middle_of_a_function(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = start_parent(tmp_path / "parent.py", str(file))
    wait_until(lambda: file.exists() and file.read_text() != "")
    parent.kill()
    parent.wait(20)
    wait_until(lambda: not lives(int(file.read_text())))


def test_a_worker_that_nobody_closed_does_not_keep_its_parent(tmp_path: Path) -> None:
    assert start_parent(tmp_path / "parent.py").wait(20) == 0
