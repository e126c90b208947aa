"""Makes the batches in worker processes, for machines where one interpreter is too slow."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset, Sampler

from data.collate import DATA_ERRORS, BatchLoader, LoadedBatch

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class _Steps(Sampler[tuple[int, int]]):
    """The (epoch, step) pairs of the next iteration."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)


class _Batches(Dataset[LoadedBatch | Exception]):
    def __init__(self, make: BatchLoader) -> None:
        self._make = make

    def __getitem__(self, pair: tuple[int, int]) -> LoadedBatch | Exception:
        try:
            return self._make(*pair)
        except DATA_ERRORS as error:
            return error  # as a value: torch would put a traceback into its message


class ProcessPool:
    """PyTorch's worker processes, kept from epoch to epoch; batches come through shared memory.

    They are started by forkserver, so that neither CUDA nor threads of this process are copied. The
    index of the records is mapped, not copied.

    Args:
        make: Makes a batch.
        num_workers: Number of processes.
    """

    def __init__(self, make: BatchLoader, num_workers: int) -> None:
        self._steps = _Steps()
        self._loader: TorchLoader[Any] = TorchLoader(
            _Batches(make),
            batch_size=None,
            sampler=self._steps,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            multiprocessing_context="forkserver",
            persistent_workers=True,
            pin_memory=make.pin_memory,
            worker_init_fn=_begin_worker,
        )
        make.pin_memory = False  # the loader's own thread pins; workers must not touch CUDA

    def run(self, epoch: int, steps: range) -> Iterator[LoadedBatch]:
        """Yields the batches of these steps in order; an error is raised in place of its batch."""
        self._steps.pairs = [(epoch, step) for step in steps]
        error: Exception | None = None
        for loaded in self._start():
            if isinstance(loaded, Exception):
                error = loaded
                break
            yield LoadedBatch(*loaded)
        if error is not None:
            # End the workers now. Left to the garbage collector, torch's pool waits 5 s for each:
            # its queues may be gone before it is. The next iteration starts new ones.
            self._loader._iterator = None
            raise error

    def _start(self) -> Iterator[Any]:
        with _signals_held_back():
            return iter(self._loader)  # starts the workers, the first time


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Blocks the signals that ask a run to stop, in all processes started within.

    torchrun, Slurm and a terminal send them to every process. Workers, and the server that forks
    them, would die at once, and the steps that remain until all ranks have saved would be lost. A
    blocked signal stays blocked in children, whatever they execute; in this process it is only
    late.
    """
    resource_tracker.ensure_running()  # its start unblocks two of the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(number: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # the server may be older than this pool
    threading.Thread(target=_end_when_our_process_says_so, daemon=True).start()


def _end_when_our_process_says_so() -> None:
    """Exits on a SIGTERM of the process that reads the batches, and on no other one."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent.pid:
            os._exit(0)


def _as_it_is(loaded: Any) -> Any:
    return loaded
