"""Heartbeat: a rank that others wait for is named, with its host and the place it was last seen."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing as mp
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from training.heartbeat import (
    EXIT_RANK_LOST,
    Heartbeat,
    RankStatus,
    find_stragglers,
    heartbeat_store,
    is_collective_failure,
)

CPU = torch.device("cpu")
SOON = 10.0  # seconds a thread is given for what takes it a fraction of one
NEVER = 1000.0


class CountedStore:
    """Passes everything on, and counts what a heartbeat has asked for, failed requests too."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self.publications = self.readings = 0
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        finally:
            with self._changed:
                self.publications += 1
                self._changed.notify_all()

    def check(self, keys: list[str]) -> bool:
        try:
            return self._store.check(keys)
        finally:
            with self._changed:
                self.readings += 1
                self._changed.notify_all()

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def wait_for_publications(self, count: int) -> None:
        """Until it has published so many times more; the second time shows all that was before."""
        with self._changed:
            wanted = self.publications + count
            assert self._changed.wait_for(lambda: self.publications >= wanted, SOON)

    def wait_for_looks(self, count: int) -> None:
        """Until it has looked around so many times more, among two ranks, and begun once more."""
        with self._changed:
            wanted = self.readings + 2 * count + 1  # a look reads the other rank twice
            assert self._changed.wait_for(lambda: self.readings >= wanted, SOON)


class Messages(logging.Handler):
    """What a heartbeat logs, to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._changed = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            self.texts.append(record.getMessage())
            self._changed.notify_all()

    def wait_for(self, words: str) -> str:
        """The first message with these words."""

        def found() -> str:
            return next((text for text in self.texts if words in text), "")

        with self._changed:
            text = self._changed.wait_for(found, SOON)
        assert text, f"nothing logged with {words!r}: {self.texts}"
        return text


@pytest.fixture
def messages() -> Iterator[Messages]:
    handler, logger = Messages(), logging.getLogger("train")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


class Group:
    """Heartbeats of several ranks in one process, over one store."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.stores: dict[int, CountedStore] = {}
        self.ended: dict[int, int] = {}
        self.has_ended = threading.Event()
        self._beats: list[Heartbeat] = []

    def join(
        self, rank: int, world_size: int, timeout_s: float = NEVER, interval_s: float = 0.05
    ) -> Heartbeat:
        def end(code: int) -> None:
            self.ended[rank] = code
            self.has_ended.set()

        store: Any = CountedStore(self.store)
        self.stores[rank] = store
        self._beats.append(
            Heartbeat(rank, world_size, store, CPU, timeout_s, interval_s=interval_s, end=end)
        )
        return self._beats[-1]

    def close(self) -> None:
        for beat in self._beats:
            beat.close()


@pytest.fixture
def group() -> Iterator[Group]:
    with contextlib.closing(Group()) as made:
        yield made


def position(beat: int, marks: int, **rest: str) -> RankStatus:
    return RankStatus(beat, marks, 7, "forward", 0.0, "b", "cpu", **rest)


def test_a_rank_is_lost_if_it_left_stopped_is_behind_or_never_spoke():
    before = {rank: position(5, 40) for rank in (1, 2, 3, 4, 6)} | {5: None}
    after = {
        1: position(9, 40),  # where we are
        2: position(9, 39),  # alive, behind
        3: position(5, 40),  # no word between the readings
        4: position(6, 40, ended="bad input"),
        5: None,
        6: position(6, 40, missed="rank 9 did not arrive"),
    }
    lost = find_stragglers(40, before, after)
    assert lost == ([4], [3], [2], [5], ["rank 9 did not arrive"])


def test_a_rank_that_did_not_arrive_is_named_and_the_waiting_one_ends(group, caplog):
    slow = group.join(1, 2)
    slow.mark("forward", 119)
    waiting = group.join(0, 2, timeout_s=0.1)
    for where, step in (("forward", 119), ("backward", 119), ("data", 120)):
        waiting.mark(where, step)
    with caplog.at_level(logging.ERROR):
        assert group.has_ended.wait(SOON)
    assert group.ended == {0: EXIT_RANK_LOST} == {0: 5}
    (message,) = caplog.messages
    assert message.startswith("rank 0 gives up: rank 1 (host ")
    assert ", cpu) did not arrive at step 120 (data): last seen at step 119 (forward) " in message
    assert message.endswith(" s ago")


def test_the_slow_rank_itself_only_warns(group, messages):
    slow = group.join(1, 2, timeout_s=0.05)
    ahead = group.join(0, 2)
    slow.mark("data", 1)
    for step in (1, 2):
        ahead.mark("data", step)
    message = messages.wait_for("no other rank is behind")
    assert message.startswith("rank 1 has been at step 1 (data) for ")
    assert not group.ended


def test_all_in_one_long_phase_warn_once_each_and_go_on(group, messages):
    beats = [group.join(rank, 2, timeout_s=0.05) for rank in range(2)]
    for beat in beats:
        beat.mark("evaluation", 30)
    for rank in range(2):
        messages.wait_for(f"rank {rank} has been at step 30 (evaluation)")
    for rank in range(2):
        group.stores[rank].wait_for_looks(2)
    assert len(messages.texts) == 2
    assert not group.ended


def test_a_rank_whose_heartbeat_stopped_is_named_although_it_came_as_far(group, messages):
    dead = group.join(1, 2)
    dead.mark("forward", 3)
    group.stores[1].wait_for_publications(2)
    dead.close()  # without a word, as a killed process
    waiting = group.join(0, 2, timeout_s=0.1)
    waiting.mark("forward", 3)
    assert group.has_ended.wait(SOON)
    assert "rank 1 (host " in messages.wait_for("answers no more: last seen at step 3 (forward)")


def test_a_rank_that_never_spoke_is_named(group, messages):
    group.join(0, 2, timeout_s=0.05)
    assert group.has_ended.wait(SOON)
    messages.wait_for("rank 1 has not been heard of since the start")


def test_a_rank_that_makes_marks_suspects_nobody(group):
    group.join(1, 2)
    busy = group.join(0, 2, timeout_s=0.3)
    end = time.monotonic() + 0.6  # twice the timeout
    while time.monotonic() < end:
        busy.mark("forward", group.stores[0].publications)
        group.stores[0].wait_for_publications(1)
    assert not group.ended


def test_a_mark_costs_no_look_at_the_store(group):
    beat = group.join(0, 2, interval_s=NEVER)
    before = group.store.get("rank0")
    beat.mark("forward", 9)
    assert group.store.get("rank0") == before


def test_one_rank_has_no_thread():
    before = threading.active_count()
    beat = Heartbeat(0, 1, None, CPU, 0.01)
    beat.mark("forward", 1)
    assert threading.active_count() == before
    assert beat.describe_stragglers(RuntimeError("out of memory\nmore")) == "out of memory"
    beat.close()


def test_several_ranks_without_a_store_are_refused():
    with pytest.raises(ValueError, match="among 2 ranks needs a store"):
        Heartbeat(0, 2, None, CPU, 1.0)


def test_close_ends_the_thread(group):
    beat = group.join(0, 2)
    assert any(thread.name == "heartbeat" for thread in threading.enumerate())
    beat.close()
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
    beat.close()  # twice does no harm


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:40\nmore")


def test_after_a_failed_collective_the_dead_rank_is_named_and_not_the_slower_one(group):
    dead, slower, here = (group.join(rank, 3) for rank in (1, 2, 0))
    dead.mark("forward", 120)
    slower.mark("data", 120)
    for where in ("data", "forward"):
        here.mark(where, 120)
    group.stores[1].wait_for_publications(2)
    dead.close()
    message = here.describe_stragglers(CLOSED)
    assert message.startswith("rank 1 (host ")
    assert "answers no more: last seen at step 120 (forward)" in message
    assert "rank 2" not in message
    assert message.endswith("Connection closed by peer [::1]:40")


def test_a_rank_that_left_with_a_reason_is_quoted(group):
    left, here = group.join(1, 2), group.join(0, 2)
    left.mark("data", 4)
    left.close(ended="label 12 of record 7 is outside 0 .. 9")
    message = here.describe_stragglers(CLOSED)
    assert "left at step 4 (data) " in message
    assert ": label 12 of record 7 is outside 0 .. 9; the collective" in message


def test_after_a_timeout_with_all_alive_those_behind_are_named(group):
    slow, here = group.join(1, 2), group.join(0, 2)
    slow.mark("data", 4)
    for where in ("data", "forward"):
        here.mark(where, 4)
    message = here.describe_stragglers(RuntimeError("gloo: Timed out waiting 1800000ms for recv"))
    assert "did not arrive at step 4 (forward): last seen at step 4 (data)" in message


def test_who_only_followed_is_not_blamed(group):
    """Rank 0 fails because rank 2 died, and leaves; rank 1, failing later, still names rank 2."""
    first, second, dead = (group.join(rank, 3) for rank in range(3))
    group.stores[2].wait_for_publications(2)
    dead.close()
    assert "rank 2 (host " in first.describe_stragglers(CLOSED)
    group.stores[0].wait_for_publications(2)  # its thread goes on for a while
    first.close()
    message = second.describe_stragglers(CLOSED)
    assert "rank 2 (host " in message
    assert "rank 0" not in message


def test_a_failed_collective_among_ranks_that_all_answer_points_at_the_network(group):
    here, other = group.join(0, 2), group.join(1, 2)
    here.mark("forward", 8)
    other.mark("forward", 8)
    message = here.describe_stragglers(CLOSED)
    assert "failed at step 8 (forward), but every rank still answers" in message
    assert "NCCL_DEBUG=INFO" in message


@pytest.mark.parametrize(
    ("with_torchrun", "holder"),
    [("True", "torchrun on the machine of rank 0 holds it"), ("False", "the process of rank 0")],
)
def test_a_store_that_is_gone_points_at_its_holder_and_ends_nothing(
    messages, monkeypatch, with_torchrun, holder
):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", with_torchrun)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    address = ("127.0.0.1", server.port)
    client: Any = CountedStore(dist.TCPStore(*address, timeout=timedelta(seconds=5)))
    ended = threading.Event()
    beat = Heartbeat(1, 2, client, CPU, 0.1, interval_s=0.02, end=lambda code: ended.set())
    del server
    messages.wait_for("the store of the process group cannot be reached")
    assert f"cannot be reached: {holder}" in beat.describe_stragglers(CLOSED)
    client.wait_for_publications(20)
    beat.close()
    assert not ended.is_set()
    assert sum("cannot be reached" in message for message in messages.texts) == 1


def test_errors_of_collectives_are_told_from_others():
    assert is_collective_failure(CLOSED)
    assert is_collective_failure(dist.DistBackendError("NCCL error in: ..."))
    assert is_collective_failure(dist.DistNetworkError("connection reset"))
    assert not is_collective_failure(RuntimeError("CUDA out of memory"))


def _wait_for_a_rank_that_never_comes(rank: int, store: str, log: str, release) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(filename=log, level=logging.ERROR)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    beat = Heartbeat(rank, 2, heartbeat_store(), CPU, 0.5 if rank == 0 else NEVER, interval_s=0.05)
    beat.mark("forward", 119)
    if rank == 1:
        release.wait(60)  # stuck in something of its own, alive
        return
    beat.mark("backward", 119)
    dist.all_reduce(torch.ones(1))


def test_a_process_blocked_in_a_collective_ends_with_the_documented_code(tmp_path):
    context = mp.get_context("spawn")
    release = context.Event()
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = [
        context.Process(
            target=_wait_for_a_rank_that_never_comes,
            args=(rank, str(tmp_path / "store"), str(logs[rank]), release),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[0].join(60)
    code = processes[0].exitcode
    processes[1].kill()
    processes[1].join(10)
    assert code == EXIT_RANK_LOST
    text = logs[0].read_text()
    assert "did not arrive at step 119 (backward): last seen at step 119 (forward)" in text
    assert "rank 1 (host " in text
