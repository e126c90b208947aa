"""Loads ahead in threads and returns results and errors in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class OrderedPrefetch(Generic[T]):
    """Iterates over `load(i)` for i in `steps`, in order, with threads that work ahead.

    One task is one whole batch: JPEG decoding releases the GIL for too short a time to be worth
    handing over image by image. An exception in `load(i)` is raised where result i was due, and
    ends the iteration.

    Args:
        load: Makes the result of a step.
        steps: The steps.
        num_workers: Number of threads; with 0 `load` runs in the consumer.
        ahead: At most `num_workers + ahead` results exist or are being made.
    """

    def __init__(
        self, load: Callable[[int], T], steps: range, num_workers: int, ahead: int = 2
    ) -> None:
        self._load = load
        self._todo = iter(steps)
        self._depth = num_workers + ahead
        self._futures: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, "data") if num_workers else None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> T:
        if self._pool is None:
            return self._load(next(self._todo))
        while len(self._futures) < self._depth:
            step = next(self._todo, None)
            if step is None:
                break
            self._futures.append(self._pool.submit(self._load, step))
        if not self._futures:
            raise StopIteration
        return self._futures.popleft().result()

    def close(self) -> None:
        """Drops what is planned and lets the threads end, without waiting. May be called twice."""
        self._todo = iter(())
        self._futures.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
