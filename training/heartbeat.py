"""Finds the rank that does not respond, and where it was last, by marks in the store.

A collective waits for every rank and cannot say for which. So the loop marks where it is, and a
thread of each rank puts its newest mark into the process group's store (a key-value server beside
the collectives) about once a second. A rank that has waited too long reads the others' marks and
logs a table, in which the ranks that are to blame come first:

    rank 0 gives up at step 120 (verification): rank 3 no longer answers; it has waited 1800 s
      rank  host  device  step  last phase    age (s)  state
      3     b     cuda:1  119   step          1812     no longer answers
      1     a     cuda:1  120   verification  1801     is at the same place
      2     b     cuda:0  120   verification  1801     is at the same place

On CUDA the host runs ahead of the device. There a mark counts when the device has reached it: each
mark records an event, which the thread queries and never waits for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

import torch
import torch.distributed as dist

logger = logging.getLogger("train")

EXIT_RANK_LOST = 5  # exit code of a rank that waited for another one in vain
SETTLE_INTERVALS = 5  # a rank that publishes nothing for this many intervals has stopped
MARKS_UNDER_WAY = 10_000  # more marks than a device's queue can hold
ROWS_AT_MOST = 16  # of the table
JOIN_WITHIN_SECONDS = 10
LEFT, STOPPED, SILENT, BEHIND, FOLLOWED, FINE = range(6)  # kinds of ranks; most to blame first
HEADING = ["rank", "host", "device", "step", "last phase", "age (s)", "state"]


class RankStatus(NamedTuple):
    """What a rank last published."""

    beat: int  # how often it has published
    marks: int  # number of marks it had reached
    step: int  # optimizer step of the newest mark
    phase: str  # phase of the newest mark
    at: float  # time of the newest mark, in seconds since 1970 by the clock of the rank
    host: str
    device: str
    kind: int = FINE  # LEFT, or FOLLOWED if it left because of another rank
    ended: str = ""  # why it has left


Reading = dict[int, RankStatus | None]


def find_stragglers(own_marks: int, before: Reading, after: Reading) -> tuple[int, str, str]:
    """Compare two readings of the other ranks' status, SETTLE_INTERVALS apart.

    Args:
        own_marks: Number of marks this rank has reached. All ranks make the same ones.
        before: The earlier reading.
        after: The later reading.

    Returns:
        The kind of the rank that is most to blame, what is wrong as a sentence, and the table.
    """
    rows = []
    for rank, now in after.items():
        earlier, row = before[rank], ["-"] * 5
        if now is None:
            kind, state = SILENT, "has not been heard of since the start"
        elif now.kind != FINE:
            kind = now.kind
            state = f"{'left' if kind == LEFT else 'gave up'}: {' '.join(now.ended.split())}"
        elif earlier is not None and earlier.beat == now.beat:
            kind, state = STOPPED, "no longer answers"
        elif now.marks < own_marks:
            kind, state = BEHIND, "is behind"
        else:
            kind, state = FINE, "is at the same place" if now.marks == own_marks else "is ahead"
        if now is not None:
            age = max(time.time() - now.at, 0)
            row = [now.host, now.device, str(now.step), now.phase, f"{age:.0f}"]
        rows.append((kind, now.marks if now else 0, rank, [str(rank), *row, state]))
    rows.sort()
    kind, _, rank, cells = rows[0]
    cause = f"rank {rank} {cells[-1]}"
    if kind == FOLLOWED:  # what that rank has found holds here, too
        cause = cells[-1].removeprefix("gave up: ")
    elif kind == FINE:
        cause = (
            "every rank still answers: look at the network between them (NCCL_DEBUG=INFO, "
            "GLOO_SOCKET_IFNAME)"
        )
    table = [HEADING, *(cells for *_, cells in rows[:ROWS_AT_MOST])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    if len(rows) > ROWS_AT_MOST:
        lines.append(f"  and {len(rows) - ROWS_AT_MOST} more ranks")
    return kind, cause, "\n".join(lines)


class Heartbeat:
    """Publishes this rank's marks, and names the ranks that this one waits for in vain.

    All ranks must make the same marks in the same order. What one rank does alone (writing a file)
    has no mark.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        store: A store that the ranks share, for the heartbeat alone (`heartbeat_store`). None for
            one rank: there is no thread then, and all methods do nothing.
        device: Device of this rank.
        timeout_s: Seconds without a new mark after which this rank looks for missing ranks. It must
            be longer than anything a rank does alone between two marks, and shorter than the
            timeout of the collectives.
        interval_s: Seconds between two publications.
        end: Function that ends the process; tests replace it.

    Raises:
        ValueError: There are several ranks and no store.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store | None,
        device: torch.device,
        timeout_s: float,
        *,
        interval_s: float = 1.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        if store is None and world_size > 1:
            raise ValueError(f"a heartbeat among {world_size} ranks needs a store they share")
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._store, self._device = store, device
        self._interval_s, self._end = interval_s, end
        self._beat = self._made = 0
        self._reached = (0, 0, "start", time.time())  # marks, step, phase, time
        self._under_way: deque[tuple[tuple[int, int, str, float], torch.cuda.Event]] = deque(
            maxlen=MARKS_UNDER_WAY
        )
        self._ended = (FINE, "")  # kind and reason, see RankStatus
        self._closing = threading.Event()
        self._lock = threading.Lock()  # `describe_stragglers` publishes from the main thread
        self._store_has_failed = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        if store is not None:
            self._publish()  # from here on the others can distinguish "not yet" from "never"
            self._thread.start()

    def mark(self, phase: str, step: int) -> None:
        """Mark that this rank begins `phase` ("step", "verification") of optimizer step `step`.

        This takes microseconds: it neither accesses the store nor waits for the device.
        """
        if self._store is None:
            return
        self._made += 1
        newest = (self._made, step, phase, time.time())
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._under_way.append((newest, event))
        else:
            self._reached = newest

    def describe_stragglers(self, error: BaseException) -> str:
        """Describe which ranks caused an error that a collective raised here, with the table.

        Waits SETTLE_INTERVALS to see which heartbeats continue, and tells the ranks that fail later
        that this one only followed. The first line ends with the first line of the error.
        """
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if self._store is None:
            return first_line
        failed = f"the collective failed with: {first_line}"
        try:
            _, cause, table = self._look_around()
        except RuntimeError as unreachable:
            return f"{_store_problem(unreachable)}; {failed}"
        return self._give_up(cause, failed, table)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, and tell the others why; end the process where a collective failed."""
        if isinstance(error, RuntimeError) and is_collective_failure(error):
            logger.error("%s", self.describe_stragglers(error))
            logging.shutdown()
            self._end(EXIT_RANK_LOST)  # threads that wait for the lost rank cannot be ended
        elif error is None or isinstance(error, Exception):
            self.close("" if error is None else f"{type(error).__name__}: {error}")

    def close(self, ended: str = "") -> None:
        """End the thread. Call this before the process group is destroyed.

        Args:
            ended: Why this rank leaves although the others may continue. They are told.
        """
        self._closing.set()
        if not self._thread.is_alive():
            return
        self._thread.join(JOIN_WITHIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("the heartbeat's thread hangs in the store and is left behind")
        elif ended:
            self._ended = (LEFT, ended)
            self._publish()

    def _run(self) -> None:
        """Publish in the thread, and look for stragglers when this rank does not advance."""
        marks, look_at, has_warned = -1, 0.0, False
        while not self._closing.wait(self._interval_s):
            self._publish()
            if self._reached[0] != marks:
                marks, has_warned = self._reached[0], False
                look_at = time.monotonic() + self.timeout_s
            if time.monotonic() < look_at:
                continue
            look_at = time.monotonic() + self.timeout_s
            try:
                kind, cause, table = self._look_around()
            except RuntimeError as error:
                self._warn_of_store(error)
                continue
            if self._closing.is_set() or self._reached[0] != marks:
                continue  # this rank has advanced in the meantime
            waited = f"{time.time() - self._reached[3]:.0f} s"
            if kind != FINE:
                logger.error("%s", self._give_up(cause, f"it has waited {waited}", table))
                # The store may end with this process: others look at about the same time.
                self._closing.wait(SETTLE_INTERVALS * self._interval_s)
                # The main thread is blocked in a collective, which nothing interrupts.
                self._end(EXIT_RANK_LOST)
                return
            if not has_warned:
                text = "rank %d has been at %s for %s, and no other rank is behind"
                logger.warning(text, self.rank, self._place(), waited)
                has_warned = True

    def _look_around(self) -> tuple[int, str, str]:
        before = self._read()
        for _ in range(SETTLE_INTERVALS):
            self._closing.wait(self._interval_s)
            self._publish()  # other ranks may read the status of this one at the same time
        return find_stragglers(self._reached[0], before, self._read())

    def _give_up(self, cause: str, why: str, table: str) -> str:
        """Tell the ranks that give up later what this one waited for; return what to log."""
        self._ended = (FOLLOWED, cause)  # the thread publishes it until `close`
        self._publish()
        return f"rank {self.rank} gives up at {self._place()}: {cause}; {why}\n{table}"

    def _place(self) -> str:
        return f"step {self._reached[1]} ({self._reached[2]})"

    def _publish(self) -> None:
        """Take the newest mark that the device has reached, and publish it."""
        assert self._store is not None
        with self._lock:
            try:
                while self._under_way and self._under_way[0][1].query():
                    self._reached = self._under_way.popleft()[0]
            except RuntimeError as error:  # the main thread gets the error of the device, too
                logger.error("rank %d: %s does not answer: %s", self.rank, self._device, error)
                self._under_way.clear()
            self._beat += 1
            place = (*self._reached, socket.gethostname(), str(self._device))
            try:
                self._store.set(_key(self.rank), json.dumps([self._beat, *place, *self._ended]))
            except RuntimeError as error:
                self._warn_of_store(error)

    def _read(self) -> Reading:
        assert self._store is not None
        reading: Reading = {}
        for rank in set(range(self.world_size)) - {self.rank}:
            # `get` of a missing key would wait for it.
            known = self._store.check([_key(rank)])
            reading[rank] = RankStatus(*json.loads(self._store.get(_key(rank)))) if known else None
        return reading

    def _warn_of_store(self, error: RuntimeError) -> None:
        if not self._store_has_failed:
            logger.warning("rank %d: %s", self.rank, _store_problem(error))
        self._store_has_failed = True


def is_collective_failure(error: RuntimeError) -> bool:
    """Return whether a collective raised the error, because of another rank or the network.

    NCCL and the stores raise torch.distributed.DistError. Gloo's plain RuntimeErrors are recognized
    by their words.
    """
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def heartbeat_store() -> dist.Store:
    """Return the default process group's store, with a prefix and a connection of its own."""
    store = dist.distributed_c10d._get_default_store()
    # A connection carries one request at a time: a main thread that waits for a key would
    # silence the heartbeat.
    return dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]


def _key(rank: int) -> str:
    return f"rank{rank}"


def _store_problem(error: RuntimeError) -> str:
    # torchrun may hold the store in its own process, or leave it to rank 0's.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        holder = "torchrun on the machine of rank 0 holds it"
    else:
        holder = "the process of rank 0 holds it and has probably ended"
    first_line = next(iter(str(error).splitlines()), "")
    return (
        f"the store of the process group cannot be reached: {holder}; look there first "
        f"({first_line})"
    )
