"""Distributes work over processes and returns the results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TypeVar

import cv2

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 3  # tasks per process that are planned or finished but not yet taken


def ordered_map(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_processes: int
) -> Generator[Result]:
    """Yields `map(function, tasks)`, computed by several processes.

    A few tasks per process are planned ahead, whatever their number, so memory stays bounded. The
    worker processes ignore Ctrl-C and end when this one does, even when it is killed. Close the
    iterator (`contextlib.closing`) when leaving it early.

    Args:
        function: Function at module level.
        tasks: Its arguments.
        num_processes: Number of processes; 1 works in this one.
    """
    if num_processes <= 1:
        yield from map(function, tasks)
        return
    # "spawn": a fork of a process that has threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer=_begin_worker)
    todo = iter(tasks)
    planned: deque[Future[Result]] = deque()
    try:
        while True:
            while len(planned) < _AHEAD * num_processes:
                try:
                    planned.append(pool.submit(function, next(todo)))
                except StopIteration:
                    break
            if not planned:
                return
            yield planned.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    cv2.setNumThreads(0)  # one process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone. A killed parent cannot tell its workers to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
