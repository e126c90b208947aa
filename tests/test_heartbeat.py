"""Heartbeat: a rank that others wait for is named, and stands first in a table of all ranks."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing as mp
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.runs import free_port
from training.heartbeat import (
    BEHIND,
    EXIT_RANK_LOST,
    FINE,
    FOLLOWED,
    LEFT,
    ROWS_AT_MOST,
    SILENT,
    STOPPED,
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


def position(beat: int, marks: int, kind: int = FINE, ended: str = "") -> RankStatus:
    return RankStatus(beat, marks, 7, "forward", time.time() - 60, "b", "cuda:1", kind, ended)


def rows_of(message: str) -> list[list[str]]:
    """Rank, host, device, step, last phase, age and state of every line of a message's table."""
    _, heading, *lines = message.splitlines()
    assert heading.split() == [
        "rank",
        "host",
        "device",
        "step",
        "last",
        "phase",
        "age",
        "(s)",
        "state",
    ]
    starts = [
        heading.index(word) for word in ("rank", "host", "device", "step", "last", "age", "state")
    ]
    ends = [*starts[1:], None]
    return [
        [line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines
    ]


def test_the_table_begins_with_the_rank_to_blame():
    """Left with a reason, then silent ones, then those behind, then those that only followed."""
    before = {rank: position(5, 40) for rank in (1, 2, 3, 4, 6, 7, 8)} | {5: None}
    after = {
        1: position(9, 40),  # where this rank is
        2: position(9, 39),  # alive, behind
        3: position(5, 40),  # no word between the readings
        4: position(6, 40, LEFT, "bad\ninput"),
        5: None,
        6: position(6, 40, FOLLOWED, "rank 9 no longer answers"),
        7: position(9, 41),
        8: position(9, 38),  # further behind
    }
    kind, cause, table = find_stragglers(40, before, after)
    assert (kind, cause) == (LEFT, "rank 4 left: bad input")
    seen = ["b", "cuda:1", "7", "forward", "60"]
    assert rows_of(f"cause\n{table}") == [
        ["4", *seen, "left: bad input"],
        ["3", *seen, "no longer answers"],
        ["5", "-", "-", "-", "-", "-", "has not been heard of since the start"],
        ["8", *seen, "is behind"],
        ["2", *seen, "is behind"],
        ["6", *seen, "gave up: rank 9 no longer answers"],
        ["1", *seen, "is at the same place"],
        ["7", *seen, "is ahead"],
    ]


@pytest.mark.parametrize(
    ("of_rank_2", "kind", "cause"),
    [
        (position(5, 40), STOPPED, "rank 2 no longer answers"),
        (None, SILENT, "rank 2 has not been heard of since the start"),
        (position(6, 39), BEHIND, "rank 2 is behind"),
        (position(6, 40, FOLLOWED, "rank 9 is behind"), FOLLOWED, "rank 9 is behind"),
        (position(6, 40), FINE, "every rank still answers: look at the network between them"),
    ],
)
def test_what_is_wrong_is_said_of_the_first_rank(of_rank_2, kind, cause):
    before = {1: position(5, 40), 2: position(5, 40)}
    found = find_stragglers(40, before, {1: position(6, 40), 2: of_rank_2})
    assert found[0] == kind
    assert found[1].startswith(cause)


def test_the_table_of_many_ranks_is_cut_and_the_rest_counted():
    before = {rank: position(5, 40) for rank in range(1, 1000)}
    after = {**{rank: position(6, 40) for rank in before}, 700: position(5, 39)}
    _, _, table = find_stragglers(40, before, after)
    _, first, *_, last = table.splitlines()
    assert first.split()[0] == "700"
    assert last.strip() == f"and {999 - ROWS_AT_MOST} more ranks"
    assert len(table.splitlines()) == ROWS_AT_MOST + 2


def test_a_rank_that_did_not_arrive_is_named_and_the_waiting_one_ends(group, caplog):
    slow = group.join(1, 2)
    slow.mark("forward", 119)
    waiting = group.join(0, 2, timeout_s=0.1)
    for phase, step in (("forward", 119), ("backward", 119), ("data", 120)):
        waiting.mark(phase, step)
    with caplog.at_level(logging.ERROR):
        assert group.has_ended.wait(SOON)
    assert group.ended == {0: EXIT_RANK_LOST} == {0: 5}
    (message,) = caplog.messages
    first_line = r"rank 0 gives up at step 120 \(data\): rank 1 is behind; it has waited \d+ s"
    assert re.fullmatch(first_line, message.splitlines()[0])
    ((rank, host, device, step, phase, age, state),) = rows_of(message)
    assert (rank, host, device) == ("1", socket.gethostname(), "cpu")
    assert (step, phase, state) == ("119", "forward", "is behind")
    assert 0 <= int(age) <= SOON


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
    message = messages.wait_for("rank 0 gives up at step 3 (forward): rank 1 no longer answers")
    assert rows_of(message)[0][3:5] == ["3", "forward"]


def test_a_rank_that_never_spoke_is_named(group, messages):
    group.join(0, 2, timeout_s=0.05)
    assert group.has_ended.wait(SOON)
    messages.wait_for("rank 0 gives up at step 0 (start): rank 1 has not been heard of")


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
    for phase in ("data", "forward"):
        here.mark(phase, 120)
    group.stores[1].wait_for_publications(2)
    dead.close()
    message = here.describe_stragglers(CLOSED)
    first_line = message.splitlines()[0]
    assert first_line.startswith(
        "rank 0 gives up at step 120 (forward): rank 1 no longer answers; "
    )
    assert first_line.endswith("Connection closed by peer [::1]:40")
    dead_row, slower_row = rows_of(message)
    assert [dead_row[i] for i in (0, 3, 4, 6)] == ["1", "120", "forward", "no longer answers"]
    assert [slower_row[i] for i in (0, 3, 4, 6)] == ["2", "120", "data", "is behind"]


def test_a_rank_that_left_with_a_reason_is_quoted(group):
    left, here = group.join(1, 2), group.join(0, 2)
    left.mark("data", 4)
    left.close(ended="label 12 of record 7 is outside 0 .. 9")
    message = here.describe_stragglers(CLOSED)
    reason = "left: label 12 of record 7 is outside 0 .. 9"
    assert f": rank 1 {reason}; the collective failed with" in message
    assert [rows_of(message)[0][i] for i in (3, 4, 6)] == ["4", "data", reason]


def test_after_a_timeout_with_all_alive_those_behind_are_named(group):
    slow, here = group.join(1, 2), group.join(0, 2)
    slow.mark("data", 4)
    for phase in ("data", "forward"):
        here.mark(phase, 4)
    message = here.describe_stragglers(RuntimeError("gloo: Timed out waiting 1800000ms for recv"))
    assert message.startswith("rank 0 gives up at step 4 (forward): rank 1 is behind; ")
    assert rows_of(message)[0][3:5] == ["4", "data"]


def test_who_only_followed_is_not_blamed(group):
    """Rank 0 fails because rank 2 died, and leaves; rank 1, failing later, still names rank 2."""
    first, second, dead = (group.join(rank, 3) for rank in range(3))
    group.stores[2].wait_for_publications(2)
    dead.close()
    assert ": rank 2 no longer answers; " in first.describe_stragglers(CLOSED)
    group.stores[0].wait_for_publications(2)  # its thread goes on for a while
    first.close()
    message = second.describe_stragglers(CLOSED)
    assert message.startswith("rank 1 gives up at step 0 (start): rank 2 no longer answers; ")
    assert [(row[0], row[-1]) for row in rows_of(message)] == [
        ("2", "no longer answers"),
        ("0", "gave up: rank 2 no longer answers"),
    ]


def test_a_rank_that_gave_up_passes_on_whom_it_waited_for(group):
    """Rank 0 waits for rank 1 and leaves; rank 1, which is merely slow, and rank 2 learn of it."""
    first, slow, third = (group.join(rank, 3) for rank in range(3))
    first.mark("step", 1)
    assert ": rank 1 is behind; " in first.describe_stragglers(CLOSED)
    for rank, beat in ((1, slow), (2, third)):
        message = beat.describe_stragglers(CLOSED)
        assert message.startswith(f"rank {rank} gives up at step 0 (start): rank 1 is behind; ")


def test_a_failed_collective_among_ranks_that_all_answer_points_at_the_network(group):
    here, other = group.join(0, 2), group.join(1, 2)
    here.mark("forward", 8)
    other.mark("forward", 8)
    message = here.describe_stragglers(CLOSED)
    assert message.startswith("rank 0 gives up at step 8 (forward): every rank still answers: look")
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


def _wait_for_a_rank_that_never_comes(rank: int, port: int, log: str, release) -> None:
    """Rank 0, whose process holds the store, looks for stragglers before rank 1 does."""
    torch.set_num_threads(1)
    logging.basicConfig(filename=log, level=logging.ERROR)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    timeout_s = (0.5, 1.0, NEVER)[rank]
    beat = Heartbeat(rank, 3, heartbeat_store(), CPU, timeout_s, interval_s=0.2)
    beat.mark("forward", 119)
    if rank == 2:
        release.wait(60)  # stuck in something of its own, alive
        return
    beat.mark("backward", 119)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:  # the other one has given up; as train_v2.py answers it
        logging.error("%s", beat.describe_stragglers(error))
        os._exit(EXIT_RANK_LOST)


def test_all_processes_blocked_in_a_collective_name_the_lost_rank_and_end_with_5(tmp_path):
    context = mp.get_context("spawn")
    release, port = context.Event(), free_port()
    logs = [tmp_path / f"{rank}.log" for rank in range(3)]
    processes = [
        context.Process(
            target=_wait_for_a_rank_that_never_comes, args=(rank, port, str(logs[rank]), release)
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes[:2]:
        process.join(60)
    codes = [process.exitcode for process in processes[:2]]
    processes[2].kill()
    processes[2].join(10)
    assert codes == [EXIT_RANK_LOST] * 2
    for rank in range(2):
        text = logs[rank].read_text()
        message = text[text.index(f"rank {rank} gives up") :]
        assert message.startswith(
            f"rank {rank} gives up at step 119 (backward): rank 2 is behind; "
        )
        row = rows_of(message)[0]
        assert [row[i] for i in (0, 3, 4, 6)] == ["2", "119", "forward", "is behind"]
