"""Which rank is silent, and where it was last: each rank's newest mark, kept in the store.

A collective waits for every rank and cannot say for whom. So the loop marks where it is, and a
thread of each rank puts its newest mark into the process group's store (a key-value server beside
the collectives) about once a second. A rank that has waited too long reads the others' marks:

    rank 3 (host b, cuda:3) did not arrive at step 120 (backward): last seen at step 119
    (forward) 612 s ago

On CUDA the host runs ahead of the device; there a mark counts when the device has come to it (an
event per mark, looked at by the thread, never waited for).
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
SETTLE_INTERVALS = 5  # a rank that publishes nothing for so many intervals has stopped
MARKS_UNDER_WAY = 10_000  # more marks than a device's queue can hold
NAMED_AT_MOST = 16  # ranks in one sentence
JOIN_WITHIN_SECONDS = 10


class RankStatus(NamedTuple):
    """What a rank last published.

    beat: how often it has published. marks: how many marks it had reached; step and where: the
    newest of them, made at `at` (seconds since 1970, its own clock).
    ended: why it has left, "" while it runs. missed: whom it missed when it left, "" otherwise.
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
        """Where it was, in words."""
        return f"step {self.step} ({self.where})"


class Stragglers(NamedTuple):
    """Ranks in trouble: left (said why), stopped (say nothing any more), behind (alive, but have
    not come as far as we have), silent (never said a word); and whom ranks that left missed.
    """

    left: list[int]
    stopped: list[int]
    behind: list[int]
    silent: list[int]
    missed: list[str]


Reading = dict[int, RankStatus | None]


def find_stragglers(own_marks: int, before: Reading, after: Reading) -> Stragglers:
    """Compare two readings of the other ranks' positions, SETTLE_INTERVALS apart.

    Args:
        own_marks: how many marks this rank has reached. All ranks make the same ones.
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
    """Publishes this rank's marks and names the ranks that this one waits for in vain.

    All ranks must make the same marks in the same order; what one rank does alone (writing a
    file) has none. A world of one does nothing and has no thread.

    Args:
        rank, world_size: of this process.
        store: shared by the ranks, for the heartbeat alone (`heartbeat_store`); None for one rank.
        device: of this rank.
        timeout_s: without a new mark for so long this rank looks for who is missing. Longer than
            anything a rank does alone between two marks; shorter than the collectives' timeout.
        interval_s: between two publications.
        end: what ends the process; for tests.
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
        self._lock = threading.Lock()  # the main thread looks too, in `describe_stragglers`
        self._store_has_failed = False
        self._thread: threading.Thread | None = None
        if world_size == 1:
            return
        if store is None:
            raise ValueError(f"a heartbeat among {world_size} ranks needs a store they share")
        self._store = store
        self._publish()  # from here on the others can tell "not yet" from "never"
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def mark(self, where: str, step: int) -> None:
        """This rank begins `where` ("data", "forward", ...) of optimizer step `step`.

        Microseconds: no look at the store, no wait for the device.
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
        """Who is to blame for an error that a collective raised here, in one sentence.

        Waits SETTLE_INTERVALS to see whose heartbeat goes on, and tells the ranks that fail
        later that this one only followed. The sentence ends with the error's first line.
        """
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        if self._store is None:
            return first_line
        try:
            lost, after = self._look_twice()
        except RuntimeError as unreachable:
            return f"{self._without_store(unreachable)}; the collective failed with: {first_line}"
        # Who is merely behind may just be slower to fail: named only if nobody has gone.
        gone = lost._replace(behind=[]) if lost.left or lost.stopped or lost.silent else lost
        sentence = self._sentence(gone, after)
        if not sentence:
            sentence = (
                f"a collective failed at {self._position().place()}, but every rank still "
                "answers: look at the network between them (NCCL_DEBUG=INFO, GLOO_SOCKET_IFNAME)"
            )
        self._missed = sentence  # from here on: the thread goes on publishing until `close`
        self._try_to_publish()
        return f"{sentence}; the collective failed with: {first_line}"

    def close(self, ended: str = "") -> None:
        """End the thread; call it before the process group is torn down.

        Args:
            ended: why this rank leaves although the others may go on: they will be told.
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
        """The thread: publish, and look around when this rank has not moved for too long."""
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
                continue  # it has gone on in the meantime
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
        """Whom this rank waits for, "" if nobody is behind or the store cannot say."""
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
            self._publish()  # others may be looking at this rank just now
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
        """Take the newest mark that the device has come to."""
        try:
            with self._lock:
                while self._under_way and self._under_way[0][1].query():
                    self._reached = self._under_way.popleft()[0]
        except RuntimeError as error:  # the device has failed; the main thread will hear of it
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


def is_collective_error(error: BaseException) -> bool:
    """A collective failed because of another rank or the network, not of what this rank did.

    nccl and the stores raise torch.distributed.DistError; gloo plain RuntimeErrors that begin
    with the place in its source.
    """
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def is_collective_failure(error: RuntimeError) -> bool:
    """Whether a collective raised it: gloo's errors are known by their words only."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def heartbeat_store() -> dist.Store:
    """The default process group's store, in a corner and over a connection of its own."""
    store = dist.distributed_c10d._get_default_store()
    # A connection carries one request at a time: a main thread that waits for a key would
    # silence the heartbeat.
    return dist.PrefixStore("heartbeat", store.clone())  # type: ignore[attr-defined]


def _key(rank: int) -> str:
    return f"rank{rank}"
