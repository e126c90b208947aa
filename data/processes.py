"""The same batches made by worker processes, for machines where one interpreter is too slow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import Dataset, Sampler

from data.batches import DATA_ERRORS, BatchMaker, Loaded


class _Steps(Sampler[tuple[int, int]]):
    """The (epoch, step) pairs of the next iteration."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs)


class _Batches(Dataset[Loaded | Exception]):
    def __init__(self, make: BatchMaker) -> None:
        self._make = make

    def __getitem__(self, pair: tuple[int, int]) -> Loaded | Exception:
        try:
            return self._make(*pair)
        except DATA_ERRORS as error:
            return error  # as a value: torch would put a traceback into its message


class ProcessPool:
    """PyTorch's worker processes, kept from epoch to epoch; batches come through shared memory.

    Started afresh (forkserver), so that neither CUDA nor threads of this process are copied. The
    index of the records is mapped, not copied.
    """

    def __init__(self, make: BatchMaker, num_workers: int) -> None:
        self._steps = _Steps()
        self._loader: TorchLoader[Any] = TorchLoader(
            _Batches(make), batch_size=None, sampler=self._steps, num_workers=num_workers,
            collate_fn=_as_it_is, multiprocessing_context="forkserver", persistent_workers=True,
            pin_memory=make.pin_memory,
        )  # fmt: skip
        make.pin_memory = False  # the loader's own thread does it; workers must not touch CUDA

    def run(self, epoch: int, steps: range) -> Iterator[Loaded]:
        """The batches of these steps in order; an error comes in the place of its batch."""
        self._steps.pairs = [(epoch, step) for step in steps]
        error: Exception | None = None
        for loaded in self._loader:
            if isinstance(loaded, Exception):
                error = loaded
                break
            yield Loaded(*loaded)
        if error is not None:
            # End the workers now. Left to the garbage collector, torch's pool waits 5 s for each:
            # its queues may be gone before it is. The next iteration starts new ones.
            self._loader._iterator = None
            raise error


def _as_it_is(loaded: Any) -> Any:
    return loaded
