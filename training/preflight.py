"""Checks before training: do all ranks agree, can they write, is there space, are they connected?

The ranks exchange messages through the process group's store, a key-value server beside the
collectives. Every rank posts what it found, waits a bounded time for what the others found, and
derives the same verdict from the same messages. So the error is the same on every rank, a rank that
does not arrive is named, and only the last check uses a collective.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist

from utils.distributed import DistContext
from utils.errors import UserError

# The code that a rank runs: these folders, configs/base.py, and the entry points at the top.
CODE_FOLDERS = ("arcshard", "backbones", "data", "eval", "training", "utils")
TOKEN = ".preflight-"  # prefix of files that are made in the output folder and removed again
VISIBLE_WITHIN_SECONDS = 30.0  # a network file system may show a new file late
_POLL_SECONDS = 0.02


def preflight(
    world: DistContext,
    facts: Mapping[str, str],
    folder: Path,
    bytes_needed: int,
    *,
    timeout_s: float = 60.0,
    arrival_s: float = 1800.0,
) -> None:
    """Check, on all ranks at once, that the run can complete.

    Args:
        world: This process among the ranks.
        facts: What must be the same on every rank, in words: config hash, code version, data.
        folder: The run's output folder. It must exist, and be one folder for all ranks.
        bytes_needed: The most bytes the run will have on disk at any one time, over all ranks.
        timeout_s: Seconds for each check, and for the all-reduce.
        arrival_s: Seconds that the last rank may arrive after the first.

    Raises:
        UserError: A check failed. Every rank raises it with the same message.
    """
    meeting = _StoreExchange(world)
    if world.is_main:  # no rank makes a new one before the facts are exchanged
        for left_over in folder.glob(f"{TOKEN}*"):
            left_over.unlink(missing_ok=True)
    notes = meeting.exchange("facts", json.dumps([socket.gethostname(), dict(facts)]), arrival_s)
    hosts, everyone = zip(*(json.loads(note) for note in notes), strict=True)
    meeting.refuse(_differences(everyone, hosts))
    _check_folder(meeting, folder, hosts, timeout_s)
    problem = _no_room(folder, bytes_needed)
    meeting.refuse_any("room", problem, hosts, timeout_s)
    if world.world_size > 1:
        problem = _all_reduce(world, timeout_s)
        # Ranks that fail do so up to `timeout_s` later than those that do not.
        meeting.refuse_any("all-reduce", problem, hosts, 2 * timeout_s)


class _StoreExchange:
    """Messages that every rank posts and reads."""

    def __init__(self, world: DistContext) -> None:
        self.world = world
        self._store: dist.Store | None = None
        if world.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            # The store outlives this call: a second one must not read the first one's notes.
            number = store.add(f"preflight/calls/{world.rank}", 1)
            self._store = dist.PrefixStore(f"preflight/{number}", store)

    def exchange(self, name: str, note: str, timeout_s: float) -> list[str]:
        """Post a message, and return that of every rank in rank order.

        Raises:
            UserError: A rank posted none in time, or another rank has given up.
        """
        if self._store is None:
            return [note]
        keys = [f"{name}/{rank}" for rank in range(self.world.world_size)]
        self._store.set(keys[self.world.rank], note)
        deadline = time.monotonic() + timeout_s
        while not self._store.check(keys):
            if self._store.check(["verdict"]):
                self.refuse("another rank gave up")
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                self.refuse(
                    f"preflight ({name}): {_ranks(missing)} did not arrive within {timeout_s:g} s "
                    "of this one; is the process alive, and what does it wait for? Its own log "
                    "has the reason"
                    if missing
                    else ""
                )
            time.sleep(_POLL_SECONDS)
        return [self._store.get(key).decode() for key in keys]

    def refuse(self, problem: str) -> None:
        """Raise the problem, if there is one; the first verdict of any rank is that of all ranks.

        Raises:
            UserError: There is a problem.
        """
        if not problem:
            return
        if self._store is not None:
            problem = self._store.compare_set("verdict", "", problem).decode()
        raise UserError(problem)

    def refuse_any(self, name: str, problem: str, hosts: Sequence[str], timeout_s: float) -> None:
        """Raise the problems that any rank found; ranks with the same problem share a line.

        Raises:
            UserError: Some rank found a problem.
        """
        by_problem: dict[str, list[int]] = {}
        for rank, note in enumerate(self.exchange(name, problem, timeout_s)):
            if note:
                by_problem.setdefault(note, []).append(rank)
        self.refuse(
            "\n".join(
                f"preflight ({name}): {_ranks(ranks, hosts)}: {note}"
                for note, ranks in by_problem.items()
            )
        )


def _differences(everyone: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Return one line per fact in which the ranks differ, "" if there is none."""
    lines = []
    for key in sorted({key for facts in everyone for key in facts}):
        by_value: dict[str | None, list[int]] = {}
        for rank, facts in enumerate(everyone):
            by_value.setdefault(facts.get(key), []).append(rank)
        if len(by_value) > 1:
            lines.append(
                f"  {key}: "
                + ", ".join(
                    f"{'nothing' if value is None else repr(value)} on {_ranks(ranks, hosts)}"
                    for value, ranks in by_value.items()
                )
            )
    if not lines:
        return ""
    return "\n".join(
        ["the ranks do not agree; all must have the same code, config, data and libraries:", *lines]
    )


def _check_folder(
    meeting: _StoreExchange, folder: Path, hosts: Sequence[str], timeout_s: float
) -> None:
    """Check that every rank can write into `folder`, and that all see the same folder."""
    own = folder / f"{TOKEN}{meeting.world.rank}-{uuid.uuid4().hex}"
    try:
        own.touch()
    except OSError as error:
        problem = (
            f"output={str(folder)!r} cannot be written ({error.strerror or error}); choose a "
            "folder with output=..."
        )
        meeting.refuse_any("output", problem, hosts, timeout_s)
    try:
        meeting.refuse_any("output", "", hosts, timeout_s)
        main_token = meeting.exchange("token", own.name, timeout_s)[0]
        patience = min(timeout_s / 2, VISIBLE_WITHIN_SECONDS)
        problem = ""
        if not _appears(folder / main_token, patience):
            problem = (
                f"output={str(folder)!r} is not the folder that rank 0 (host {hosts[0]}) writes "
                f"to: its file did not appear within {patience:g} s. Several machines need "
                "a shared file system, mounted at the same path"
            )
        meeting.refuse_any("shared output", problem, hosts, timeout_s)
    finally:
        own.unlink(missing_ok=True)


def _appears(path: Path, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _no_room(folder: Path, bytes_needed: int) -> str:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"output={str(folder)!r} does not say how much room it has ({error})"
    if free >= bytes_needed:
        return ""
    return (
        f"output={str(folder)!r} has {free / 2**30:,.2f} GiB free, and the checkpoints of this "
        f"run need {bytes_needed / 2**30:,.2f} GiB: make room, keep fewer (keep_checkpoints), or "
        "choose another output"
    )


def _all_reduce(world: DistContext, timeout_s: float) -> str:
    """Sum a small tensor over all ranks on the device; return what went wrong, "" if nothing."""
    values = torch.full((1024,), float(world.rank + 1), device=world.device)
    options = dist.AllreduceOptions()
    options.asyncOp = True
    if world.device.type == "cpu":
        # gloo then ends the sum itself; an unfinished sum would block the end of the process.
        # NCCL's watchdog would end the process without a message, so the deadline below serves it.
        options.timeout = timedelta(seconds=timeout_s)
    deadline = time.monotonic() + timeout_s + 1
    try:
        assert dist.group.WORLD is not None
        work = dist.group.WORLD.allreduce([values], options)
        while not work.is_completed():
            if time.monotonic() > deadline:
                return _UNFINISHED.format(timeout_s)
            time.sleep(_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        return f"{_UNFINISHED.format(timeout_s)} ({next(iter(str(error).splitlines()), '')})"
    expected = world.world_size * (world.world_size + 1) / 2
    if not bool((values == expected).all()):
        return f"an all-reduce gave {values[0].item():g} instead of {expected:g}"
    return ""


_UNFINISHED = (
    "a small all-reduce did not finish within {:g} s, although all ranks have met in the store: "
    "look at the network between their hosts (a firewall, or the wrong interface: "
    "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more)"
)


def code_version(version: str, root: Path) -> str:
    """Return `version` and a hash over names and contents of the code that a rank runs.

    Args:
        version: Name and version of the project.
        root: Folder of the repository.
    """
    files = [*root.glob("*.py"), root / "configs" / "base.py"]
    for folder in CODE_FOLDERS:
        files += (root / folder).rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{version} ({digest.hexdigest()[:16]})"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that change numbers or file formats."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available() and dist.is_nccl_available():
        versions["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return versions


def device_kind(device: torch.device) -> str:
    """Return the model of the device. Ranks on different models would wait for the slowest."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _ranks(ranks: Sequence[int], hosts: Sequence[str] | None = None) -> str:
    """Format [0, 1, 2, 5] as "ranks 0-2, 5", with their hosts."""
    parts: list[str] = []
    start = 0
    for place, rank in enumerate(ranks):
        if place + 1 == len(ranks) or ranks[place + 1] != rank + 1:
            first = ranks[start]
            parts.append(str(rank) if first == rank else f"{first}-{rank}")
            start = place + 1
    text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)
    if hosts is None:
        return text
    names = sorted({hosts[rank] for rank in ranks})
    more = len(names) - 4
    return f"{text} (host {', '.join(names[:4])}{f' and {more} more' if more > 0 else ''})"
