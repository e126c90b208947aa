"""Finds the rank that does not respond, and where it was last, by marks in the store.

A collective waits for every rank and cannot say for which. So the loop marks where it is, and a
thread of each rank puts its newest mark into the process group's store (a key-value server beside
the collectives) about once a second. A rank that has waited too long reads the others' marks:

    rank 3 (host b, cuda:3) did not arrive at step 120 (backward): last seen at step 119
    (forward) 612 s ago

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
from typing import NamedTuple

import torch
import torch.distributed as dist

logger = logging.getLogger("train")

EXIT_RANK_LOST = 5  # exit code of a rank that waited for another one in vain
SETTLE_INTERVALS = 5  # a rank that publishes nothing for this many intervals has stopped
MARKS_UNDER_WAY = 10_000  # more marks than a device's queue can hold
NAMED_AT_MOST = 16  # most ranks that one sentence names
JOIN_WITHIN_SECONDS = 10


class RankStatus(NamedTuple):
    """What a rank last published.

    Attributes:
        beat: How often it has published.
        marks: Number of marks it had reached.
        step: Optimizer step of the newest mark.
        where: Phase of the newest mark.
        at: Time of the newest mark, in seconds since 1970 by the clock of the rank.
        host: Name of its host.
        device: Its device.
        ended: Why it has left, "" while it runs.
        missed: Which rank it waited for when it left, "" otherwise.
    """

    beat: int
    marks: int
    step: int
    where: str
    at: float
    host: str
    device: str
    ended: str = ""
    missed: str = ""

    def place(self) -> str:
        """Describe where the rank was."""
        return f"step {self.step} ({self.where})"


class Stragglers(NamedTuple):
    """Ranks in trouble.

    Attributes:
        left: Ranks that have left and said why.
        stopped: Ranks that publish nothing any more.
        behind: Ranks that respond, but have not reached as many marks as this one.
        silent: Ranks that have never published.
        missed: Sentences of the ranks that left because they waited for another.
    """

    left: list[int]
    stopped: list[int]
    behind: list[int]
    silent: list[int]
    missed: list[str]


Reading = dict[int, RankStatus | None]


def find_stragglers(own_marks: int, before: Reading, after: Reading) -> Stragglers:
    """Compare two readings of the other ranks' status, SETTLE_INTERVALS apart.

    Args:
        own_marks: Number of marks this rank has reached. All ranks make the same ones.
        before: The earlier reading.
        after: The later reading.

    Returns:
        The ranks in trouble, by kind.
    """
    lost = Stragglers([], [], [], [], [])
    for rank, now in sorted(after.items()):
        earlier = before.get(rank)
        if now is None:
            lost.silent.append(rank)
        elif now.missed:
            lost.missed.append(now.missed)
        elif now.ended:
            lost.left.append(rank)
        elif earlier is not None and earlier.beat == now.beat:
            lost.stopped.append(rank)
        elif now.marks < own_marks:
            lost.behind.append(rank)
    return lost


class Heartbeat:
    """Publishes this rank's marks, and names the ranks that this one waits for in vain.

    All ranks must make the same marks in the same order. What one rank does alone (writing a file)
    has no mark. With a world size of 1 there is no thread, and all methods do nothing.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks.
        store: A store that the ranks share, for the heartbeat alone (`heartbeat_store`); None for
            one rank.
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
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._interval_s, self._end = interval_s, end
        self._device = device
        self._host = socket.gethostname()
        self._beat = self._made = 0
        self._ended = self._missed = ""  # see RankStatus
        self._reached = (0, 0, "start", time.time())  # marks, step, where, time
        self._under_way: deque[tuple[tuple[int, int, str, float], torch.cuda.Event]] = deque(
            maxlen=MARKS_UNDER_WAY
        )
        self._store: dist.Store | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()  # `describe_stragglers` reads from the main thread
        self._store_has_failed = False
        self._thread: threading.Thread | None = None
        if world_size == 1:
            return
        if store is None:
            raise ValueError(f"a heartbeat among {world_size} ranks needs a store they share")
        self._store = store
        self._publish()  # from here on the others can distinguish "not yet" from "never"
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, where: str, step: int) -> None:
        """Mark that this rank begins `where` ("data", "forward", ...) of optimizer step `step`.

        This takes microseconds: it neither accesses the store nor waits for the device.
        """
        if self._thread is None:
            return
        self._made += 1
        newest = (self._made, step, where, time.time())
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._under_way.append((newest, event))
        else:
            self._reached = newest

    def describe_stragglers(self, error: BaseException) -> str:
        """Describe in one sentence which ranks caused an error that a collective raised here.

        Waits SETTLE_INTERVALS to see which heartbeats continue, and tells the ranks that fail later
        that this one only followed. The sentence ends with the first line of the error.
        """
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if self._store is None:
            return first_line
        try:
            lost, after = self._look_twice()
        except RuntimeError as unreachable:
            return f"{self._without_store(unreachable)}; the collective failed with: {first_line}"
        # A rank that is behind may only be slower to fail. It is named only if no rank has left.
        gone = lost._replace(behind=[]) if lost.left or lost.stopped or lost.silent else lost
        sentence = self._sentence(gone, after)
        if not sentence:
            sentence = (
                f"a collective failed at {self._position().place()}, but every rank still "
                "answers: look at the network between them (NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME)"
            )
        self._missed = sentence  # the thread publishes it until `close`
        self._try_to_publish()
        return f"{sentence}; the collective failed with: {first_line}"

    def close(self, ended: str = "") -> None:
        """End the thread. Call this before the process group is destroyed.

        Args:
            ended: Why this rank leaves although the others may continue. They are told.
        """
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join(JOIN_WITHIN_SECONDS)
        if self._thread.is_alive():
            logger.warning("the heartbeat's thread hangs in the store and is left behind")
        elif ended:
            self._ended = ended
            self._try_to_publish()
        self._thread = None

    def _run(self) -> None:
        """Publish in the thread, and look for stragglers when this rank does not advance."""
        marks, warned = -1, False
        look_at = time.monotonic() + self.timeout_s
        while not self._closing.wait(self._interval_s):
            self._follow_device()
            self._try_to_publish()
            if self._reached[0] != marks:
                marks, warned = self._reached[0], False
                look_at = time.monotonic() + self.timeout_s
            if time.monotonic() < look_at:
                continue
            sentence = self._look_around()
            if self._closing.is_set() or self._reached[0] != marks:
                continue  # this rank has advanced in the meantime
            if sentence:
                logger.error("rank %d gives up: %s", self.rank, sentence)
                self._missed = sentence
                self._try_to_publish()
                # The main thread is blocked in a collective, which nothing interrupts.
                self._end(EXIT_RANK_LOST)
                return
            if not warned:
                logger.warning(
                    "rank %d has been at %s for %.0f s, and no other rank is behind",
                    self.rank,
                    self._position().place(),
                    time.time() - self._reached[3],
                )
                warned = True
            look_at = time.monotonic() + self.timeout_s

    def _look_around(self) -> str:
        """Describe whom this rank waits for; "" if nobody is behind or the store cannot be read."""
        try:
            lost, after = self._look_twice()
        except RuntimeError as error:
            self._warn_of_store(error)
            return ""
        return self._sentence(lost, after)

    def _look_twice(self) -> tuple[Stragglers, Reading]:
        before = self._read()
        for _ in range(SETTLE_INTERVALS):
            self._closing.wait(self._interval_s)
            self._follow_device()
            self._publish()  # other ranks may read the status of this one at the same time
        after = self._read()
        return find_stragglers(self._reached[0], before, after), after

    def _sentence(self, lost: Stragglers, after: Reading) -> str:
        ours, now = self._position(), time.time()
        parts = []
        for rank in sorted([*lost.left, *lost.stopped, *lost.behind, *lost.silent]):
            theirs = after[rank]
            if theirs is None:
                parts.append(f"rank {rank} has not been heard of since the start")
                continue
            name = f"rank {rank} (host {theirs.host}, {theirs.device})"
            ago = f"{max(now - theirs.at, 0):.0f} s ago"
            if rank in lost.left:
                parts.append(f"{name} left at {theirs.place()} {ago}: {theirs.ended}")
            elif rank in lost.stopped:
                parts.append(f"{name} answers no more: last seen at {theirs.place()} {ago}")
            else:
                parts.append(
                    f"{name} did not arrive at {ours.place()}: last seen at {theirs.place()} {ago}"
                )
        if not parts:
            return lost.missed[0] if lost.missed else ""
        more = len(parts) - NAMED_AT_MOST
        return "; ".join(parts[:NAMED_AT_MOST]) + (f"; and {more} more ranks" if more > 0 else "")

    def _follow_device(self) -> None:
        """Take the newest mark that the device has reached."""
        try:
            with self._lock:
                while self._under_way and self._under_way[0][1].query():
                    self._reached = self._under_way.popleft()[0]
        except RuntimeError as error:  # the device has failed; the main thread gets the error too
            logger.error("rank %d: %s does not answer: %s", self.rank, self._device, error)
            self._under_way.clear()

    def _position(self) -> RankStatus:
        marks, step, where, at = self._reached
        return RankStatus(
            self._beat,
            marks,
            step,
            where,
            at,
            self._host,
            str(self._device),
            self._ended,
            self._missed,
        )

    def _publish(self) -> None:
        assert self._store is not None
        with self._lock:
            self._beat += 1
            self._store.set(_key(self.rank), json.dumps(self._position()))

    def _try_to_publish(self) -> None:
        try:
            self._publish()
        except RuntimeError as error:
            self._warn_of_store(error)

    def _read(self) -> Reading:
        assert self._store is not None
        reading: Reading = {}
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            # `get` of a missing key would wait for it.
            known = self._store.check([_key(rank)])
            text = self._store.get(_key(rank)) if known else None
            reading[rank] = None if text is None else RankStatus(*json.loads(text))
        return reading

    def _warn_of_store(self, error: RuntimeError) -> None:
        if not self._store_has_failed:
            logger.warning("rank %d: %s", self.rank, self._without_store(error))
        self._store_has_failed = True

    def _without_store(self, error: RuntimeError) -> str:
        # torchrun may hold the store in its own process, or leave it to rank 0's.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            holder = "torchrun on the machine of rank 0 holds it"
        else:
            holder = "the process of rank 0 holds it and has probably ended"
        return (
            f"the store of the process group cannot be reached: {holder}; look there first "
            f"({next(iter(str(error).splitlines()), '')})"
        )


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
