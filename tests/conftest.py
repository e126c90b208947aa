"""A pool of gloo ranks started once per session, and where the shared test data lies."""

from __future__ import annotations

import gc
import logging
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
import pytest

MAX_RANKS = 4
ANSWER_WITHIN_SECONDS = 120


class ModuleFreezer:
    """Takes what modules hold out of all later searches for garbage, when many were imported.

    It is most of the heap and no garbage. Searching it takes 0.2 to 0.5 s, and was 80 % of the time
    between two groups of the pool, because the end of a group searches (destroy_distributed).
    """

    def __init__(self) -> None:
        self.num_modules = 0

    def __call__(self) -> None:
        if len(sys.modules) > self.num_modules + 20:
            self.num_modules = len(sys.modules)
            gc.collect()
            gc.freeze()


freeze_modules = ModuleFreezer()


def _serve(rank: int, connection: Connection) -> None:
    """One rank of the pool: run what comes, in a default gloo group of the size asked for."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    from utils.distributed import destroy_distributed

    torch.set_num_threads(1)
    current: str | None = None
    while True:
        freeze_modules()
        order = connection.recv()
        if order is None:
            break
        store, world_size, function, arguments = order
        try:
            if current != store:
                destroy_distributed()
                if world_size > 1:
                    dist.init_process_group(
                        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
                    )
                current = store
            connection.send((True, function(rank, world_size, *arguments)))
        except Exception as error:
            connection.send((False, (error, traceback.format_exc())))
    gc.unfreeze()
    destroy_distributed()


class RankFailure(AssertionError):
    """A function failed on a rank of the pool; `errors` holds the exception of each that did."""

    def __init__(self, errors: dict[int, Exception], text: str) -> None:
        super().__init__(text)
        self.errors = errors


class Ranks:
    """`run(n, function, *args)` calls function(rank, n, *args) on n ranks and collects."""

    def __init__(self, folder: Path, seconds: float = ANSWER_WITHIN_SECONDS) -> None:
        self._folder, self.seconds = folder, seconds
        self._stores: dict[int, str] = {}
        self._groups_made = 0
        self._last_size = 0
        self._pool: list[tuple[Any, Connection]] = []

    def _start(self) -> None:
        # The server imports the modules once, and each rank is a copy of it.
        mp.set_forkserver_preload(["tests.run_helpers"])
        context = mp.get_context("forkserver")
        for rank in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._pool.append((process, ours))

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results in rank order; RankFailure with all ranks' tracebacks if one raises.

        A rank that does not answer in time, or ends, is a TimeoutError or EOFError and the end of
        the pool; the next call starts a new one.
        """
        assert 1 <= world_size <= MAX_RANKS
        if not self._pool:
            self._start()
        if world_size != self._last_size:
            self._groups_made += 1
            self._stores[world_size] = str(self._folder / f"store{self._groups_made}")
            self._last_size = world_size
        members = self._pool[:world_size]
        for _, connection in members:
            connection.send((self._stores[world_size], world_size, function, arguments))
        results, errors, texts = [], {}, []
        for rank, (_, connection) in enumerate(members):
            if not connection.poll(self.seconds):
                for other, (_, theirs) in enumerate(members[rank + 1 :], rank + 1):
                    ok, value = theirs.recv() if theirs.poll() else (True, ("", ""))
                    texts += [] if ok else [f"rank {other}:\n{value[1]}"]
                self.stop(kill=True)
                words = f"rank {rank} did not answer in {self.seconds:g} s"
                raise TimeoutError("\n".join([words, *texts]))
            try:
                ok, value = connection.recv()
            except EOFError:
                self.stop(kill=True)
                raise EOFError(f"rank {rank} ended without an answer") from None
            results.append(value)
            if not ok:
                errors[rank] = value[0]
                texts.append(f"rank {rank}:\n{value[1]}")
        if errors:
            self._last_size = 0  # a group whose collectives were interrupted is not used again
            raise RankFailure(errors, "\n".join(texts))
        return results

    def stop(self, kill: bool = False) -> None:
        """End the pool."""
        for process, connection in self._pool:
            if kill:
                process.kill()
            else:
                connection.send(None)
        for process, _ in self._pool:
            process.join(10)
        self._pool, self._last_size = [], 0


def pytest_configure() -> None:
    """On a shared machine an example may take its time: no deadline per hypothesis example."""
    hypothesis.settings.register_profile("unhurried", deadline=None)
    hypothesis.settings.load_profile("unhurried")
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and all their
    # processes with them: those that are interrupted on purpose would not notice.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders each module by the number of ranks: the pool makes a new group where it changes."""

    def place(item: pytest.Item) -> tuple[int, int]:
        callspec = getattr(item, "callspec", None)  # none without parameters
        return modules.index(item.path), callspec.params.get("world_size", 0) if callspec else 0

    modules = list(dict.fromkeys(item.path for item in items))
    items.sort(key=place)


def pytest_collection_finish() -> None:
    freeze_modules()


def pytest_runtest_teardown() -> None:
    freeze_modules()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions report what is left at the end


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp())))
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: on a shared machine threads would mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real test data: TEST_DATA_DIR, or ../shared beside the repository."""
    default = Path(__file__).resolve().parent.parent.parent / "shared"
    folder = Path(os.environ.get("TEST_DATA_DIR", default))
    if not all((folder / part).is_dir() for part in ("data", "facts")):
        pytest.skip(f"no shared test data at {folder} (set TEST_DATA_DIR)")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five class folders with nine images each."""
    from tests.record_helpers import NUM_CLASSES, PER_CLASS, jpeg

    root = tmp_path_factory.mktemp("faces")
    for label in range(NUM_CLASSES):
        (root / f"person_{label}").mkdir()
        for i in range(PER_CLASS):
            (root / f"person_{label}" / f"{i}.jpg").write_bytes(jpeg(label * 100 + i))
    return root


@pytest.fixture(scope="session")
def records(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `folder` as records."""
    from scripts.pack import list_folder, pack_listing
    from tests.record_helpers import SIZE

    out = tmp_path_factory.mktemp("records")
    pack_listing(list_folder(folder), out, size=SIZE)
    return out


@pytest.fixture
def run_main(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, str]]]:
    """main() of train_v2.py with TINY_RUN and changes; returns (exit code, stderr and log)."""
    from tests.run_helpers import TINY_RUN
    from train_v2 import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "tiny.py"
    config.write_text(f"config = { ({**TINY_RUN, 'output': str(tmp_path / 'run')})!r}\n")

    def run(*words: str) -> tuple[int, str]:
        code = main([str(config), *words])
        return code, capsys.readouterr().err

    yield run
    logging.getLogger().handlers.clear()
