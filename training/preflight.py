"""Checks before training: do all ranks agree, can they write, is there space, are they connected?

The ranks exchange messages through the process group's store, a key-value server beside the
collectives. Every rank posts what it found, waits a bounded time for what the others found, and
derives the same verdict from the same messages. So the error is the same on every rank, a rank that
does not arrive is named, and only the last check uses a collective.

torch.distributed.monitored_barrier does not serve here: it exists for gloo alone, only rank 0
learns who is missing, and the other ranks wait for rank 0 until the timeout of the group, whatever
timeout they were given (torch 2.13).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

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
    exchange = _StoreExchange(world)
    if world.is_main:  # no rank makes a new one before the facts are exchanged
        for left_over in folder.glob(f"{TOKEN}*"):
            left_over.unlink(missing_ok=True)
    found = exchange.gather("facts", [socket.gethostname(), dict(facts)], arrival_s)
    hosts, everyone = zip(*found, strict=True)
    exchange.refuse(_differences(everyone, hosts))
    own = folder / f"{TOKEN}{world.rank}-{uuid.uuid4().hex}"
    try:
        problems = _check_folder(own, bytes_needed)
        found = exchange.gather("output", [own.name, problems], timeout_s)
        exchange.refuse(_problems([problems for _, problems in found], hosts))
        problems = _compare_folder(folder, found[0][0], hosts[0], timeout_s)
        if world.world_size > 1:
            problems |= _all_reduce(world, timeout_s)
        # Ranks on which these checks time out come later than the others by that time.
        found = exchange.gather("connection", problems, 3 * timeout_s)
        exchange.refuse(_problems(found, hosts))
    finally:
        if os.path.exists(own):  # False, not an error, where the rank may not look
            own.unlink()


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

    def gather(self, name: str, note: Any, timeout_s: float) -> list[Any]:
        """Post a value of JSON, and return that of every rank in rank order.

        Raises:
            UserError: A rank posted none in time.
        """
        if self._store is None:
            return [note]
        keys = [f"{name}/{rank}" for rank in range(self.world.world_size)]
        self._store.set(keys[self.world.rank], json.dumps(note))
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError:  # DistStoreError, but not of every kind of store
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if missing:
                self.refuse(
                    f"preflight ({name}): {_ranks(missing)} did not arrive within {timeout_s:g} s "
                    "of this one; is the process alive, and what does it wait for? Its own log "
                    "has the reason"
                )
        return [json.loads(text) for text in self._store.multi_get(keys)]

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


def _differences(everyone: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Return one line per fact in which the ranks differ, "" if there is none."""
    lines = []
    for key in sorted({key for facts in everyone for key in facts}):
        ranks_of = _by_value([facts.get(key) for facts in everyone], hosts)
        parts = [
            f"{'nothing' if value is None else repr(value)} on {ranks}"
            for value, ranks in ranks_of.items()
        ]
        if len(parts) > 1:
            lines.append(f"  {key}: {', '.join(parts)}")
    if not lines:
        return ""
    return "\n".join(
        ["the ranks do not agree; all must have the same code, config, data and libraries:", *lines]
    )


def _problems(found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str:
    """Return one line per problem that any rank found, with the ranks that found it."""
    return "\n".join(
        f"preflight ({check}): {ranks}: {problem}"
        for check in sorted({check for problems in found for check in problems})
        for problem, ranks in _by_value([problems.get(check) for problems in found], hosts).items()
        if problem
    )


def _by_value(values: Sequence[str | None], hosts: Sequence[str]) -> dict[str | None, str]:
    """Return the ranks that have a value, as text, for every value."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return {value: _ranks(those, hosts) for value, those in ranks.items()}


def _check_folder(own: Path, bytes_needed: int) -> dict[str, str]:
    """Make the file `own`, and return what is wrong with its folder."""
    output = f"output={str(own.parent)!r}"
    try:
        own.touch()
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}); choose a folder with output=..."
        return {"output": f"{output} {problem}"}
    try:
        free = shutil.disk_usage(own.parent).free
    except OSError as error:
        return {"disk space": f"{output} does not say how much space is free ({error})"}
    if free >= bytes_needed:
        return {}
    return {
        "disk space": f"{output} has {free / 2**30:,.2f} GiB free, and the checkpoints of this run "
        f"need {bytes_needed / 2**30:,.2f} GiB: free some of it, keep fewer (keep_checkpoints), "
        "or choose another output"
    }


def _compare_folder(folder: Path, token: str, host: str, timeout_s: float) -> dict[str, str]:
    """Wait until the file `token`, which rank 0 has made, appears; return what is wrong."""
    patience = min(timeout_s / 2, VISIBLE_WITHIN_SECONDS)
    deadline = time.monotonic() + patience
    while not (folder / token).exists():
        if time.monotonic() > deadline:
            return {
                "shared output": f"output={str(folder)!r} is not the folder that rank 0 (host "
                f"{host}) writes to: its file did not appear within {patience:g} s. Several "
                "machines need a shared file system, mounted at the same path"
            }
        time.sleep(_POLL_SECONDS)
    return {}


def _all_reduce(world: DistContext, timeout_s: float) -> dict[str, str]:
    """Sum a small tensor over all ranks on the device, and return what went wrong."""
    unfinished = (
        f"a small all-reduce did not finish within {timeout_s:g} s, although all ranks have met in "
        "the store: look at the network between their hosts (a firewall, or the wrong interface: "
        "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more)"
    )
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
                return {"all-reduce": unfinished}
            time.sleep(_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        return {"all-reduce": f"{unfinished} ({next(iter(str(error).splitlines()), '')})"}
    expected = world.world_size * (world.world_size + 1) / 2
    if not bool((values == expected).all()):
        return {"all-reduce": f"an all-reduce gave {values[0].item():g} instead of {expected:g}"}
    return {}


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
    runs = groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])  # rank - place is constant
    spans = [[rank for _, rank in run] for _, run in runs]
    parts = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(parts)
    if hosts is None:
        return text
    names = sorted({hosts[rank] for rank in ranks})
    more = len(names) - 4
    return f"{text} (host {', '.join(names[:4])}{f' and {more} more' if more > 0 else ''})"
