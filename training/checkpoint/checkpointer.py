"""The folder of checkpoints: each is written under another name, verified, then renamed.

    checkpoints/step_00001200/   *.distcp, .metadata   tensors (training/checkpoint/sharded_io.py)
                                 checkpoint.json       everything else, and every file's SHA-256
    checkpoints/latest           the name of the newest; best: of the best so far

The pointers are replaced last. A folder with a final name is complete, because it was read back
before it was renamed. What a killed process leaves (`*.saving`, `*.deleting`, `.*.tmp`) is removed
at the next start. A checkpoint that no longer matches its checksums is renamed (`*.damaged`), never
used and never deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from training.checkpoint import sharded_io
from training.checkpoint.sharded_io import FileDigest, State, StorageError, TensorShard
from utils.distributed import DistContext
from utils.errors import UserError
from utils.files import TEMPORARY, atomic_write, sync_folder

logger = logging.getLogger("train")

FOLDER = "checkpoints"
LATEST, BEST = "latest", "best"
MANIFEST = "checkpoint.json"
FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_SAVING, _DELETING, _DAMAGED = ".saving", ".deleting", ".damaged"
# The last two are the pointers' of earlier versions.
_UNFINISHED = re.compile(
    rf"{_NAME.pattern}({_SAVING}|{_DELETING})|\..+{TEMPORARY}|{LATEST}\.tmp|{BEST}\.tmp"
)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written or used. The message says why."""


@dataclass(frozen=True)
class Manifest:
    """The content of checkpoint.json.

    Attributes:
        step: Optimizer steps done.
        facts: Plain values of the run.
        files: Size and SHA-256 of every file by name.
    """

    step: int
    facts: dict[str, Any]
    files: dict[str, FileDigest] = field(default_factory=dict)

    def to_text(self) -> str:
        """Return canonical JSON with its own SHA-256, so that every changed byte is detected."""
        body = {"format": FORMAT, **asdict(self)}
        body["files"] = {name: list(digest) for name, digest in self.files.items()}
        canonical = json.dumps(body, sort_keys=True)
        sums = hashlib.sha256(canonical.encode()).hexdigest()
        return json.dumps({"sha256": sums, **body}, sort_keys=True, indent=1) + "\n"

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """Read the manifest of a checkpoint's folder.

        Raises:
            StorageError: It cannot be read, or is not what was written.
        """
        path = checkpoint / MANIFEST
        try:
            text = path.read_bytes().decode()
            body = json.loads(text)
            manifest = cls(
                int(body["step"]),
                dict(body["facts"]),
                {str(n): FileDigest(int(s), str(d)) for n, (s, d) in body["files"].items()},
            )
        except OSError as error:
            raise StorageError(f"{path} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(f"{path} is damaged: it is no manifest of ours") from error
        if manifest.to_text() != text:
            raise StorageError(f"{path} is damaged, or of another version than {FORMAT}")
        if any(Path(name).name != name for name in manifest.files):
            raise StorageError(f"{path} names files outside its folder")
        return manifest


class Checkpoint(NamedTuple):
    """A checkpoint that passed its checks.

    Attributes:
        path: Its folder.
        manifest: The content of its checkpoint.json.
    """

    path: Path
    manifest: Manifest


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name; -1 for any other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if step_of(p) >= 0 and p.is_dir()), key=step_of)


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed process left unfinished in the folder of a run or of checkpoints."""
    for path in folder.glob("*") if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            logger.info("removing what an interrupted process left: %s", path)
            _remove(path)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps, as after a rollback, and update `latest`."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            _remove(path)
    last = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    _point(folder / LATEST, last[-1])


def find_corruption(found: Checkpoint, rank: int = 0, world_size: int = 1) -> str | None:
    """Return what is wrong with this rank's share of the files, None if nothing is."""
    for name in sorted(found.manifest.files)[rank::world_size]:
        problem = sharded_io.verify_file(found.path / name, found.manifest.files[name])
        if problem:
            return problem
    return None


class RankGroup:
    """Exchanges values about checkpoints between ranks, over a separate process group.

    A background thread uses the group, so nothing else may.
    """

    def __init__(self, world: DistContext) -> None:
        self.rank, self.world_size = world.rank, world.world_size
        self.is_main, self.is_alone = world.is_main, world.world_size == 1
        # Gloo on GPUs too, because the exchanged values are in host memory.
        self.group = None if self.is_alone else dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all_ranks(self, action: Callable[[], Any], only_main: bool = False) -> list[Any]:
        """Run `action` on every rank or only the first; a failure on one rank fails on all.

        Args:
            action: What to run.
            only_main: Whether only the first rank runs it.

        Returns:
            The results in rank order, None for ranks that did not run it.

        Raises:
            CheckpointError: It failed on a rank. The message has the failure of each rank.
        """
        result, problem = None, None
        if self.is_main or not only_main:
            try:
                result = action()
            except Exception as error:
                problem = str(error) or type(error).__name__
                if not isinstance(error, StorageError):
                    problem = f"rank {self.rank}: {problem} ({type(error).__name__})"
        answers = self.gather((problem, result))
        problems = [problem for problem, _ in answers if problem]
        if problems:
            raise CheckpointError("; ".join(dict.fromkeys(problems)))
        return [result for _, result in answers]


def find_intact(folder: Path, ranks: RankGroup, at_most: int | None = None) -> Checkpoint | None:
    """Find the newest checkpoint whose files match their checksums, the same one on every rank.

    Damaged ones are logged and renamed. Every rank reads its share of the files.

    Args:
        folder: Folder of checkpoints.
        ranks: The ranks.
        at_most: Largest step of the checkpoint, None for any.

    Returns:
        The checkpoint, None if there is none.
    """
    refused: set[Path] = set()
    while True:
        candidates = [
            path
            for path in list_checkpoints(folder)
            if path not in refused and (at_most is None or step_of(path) <= at_most)
        ]
        path = ranks.gather(candidates[-1] if candidates else None)[0]
        if path is None:
            return None
        try:
            return check_intact(path, ranks)
        except CheckpointError as error:
            refused.add(path)
            logger.error("%s. Using the one before.", error)
            if ranks.is_main:
                _archive(path)
        ranks.gather(None)  # the next listing comes after the renaming


def check_intact(path: Path, ranks: RankGroup) -> Checkpoint:
    """Check that the files of a given checkpoint match their checksums.

    Raises:
        CheckpointError: A file does not. Every rank raises it, and the message says what is wrong.
    """

    def check() -> Checkpoint:
        found = Checkpoint(path, Manifest.read(path))
        problem = find_corruption(found, ranks.rank, ranks.world_size)
        if problem:
            raise StorageError(problem)
        return found

    try:
        return Checkpoint(*ranks.run_on_all_ranks(check)[ranks.rank])
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


class Checkpointer:
    """Saves states of the run into its folder, in the background unless told to wait.

    In the background, the caller only waits for the staging copy: every tensor that this rank
    writes is copied to host memory, which is kept from save to save. That is one copy of the rank's
    share of the state, and no more.

    Args:
        folder: Folder of the checkpoints, on a file system that all ranks share.
        ranks: The ranks.
        keep: Number of the newest checkpoints that are kept; the best one is kept too.
        max_failed: Number of failed saves in a row after which `gave_up` is true.

    Attributes:
        failed_in_a_row: Number of failed saves since the last successful one.
        last_error: Message of the last failure.
    """

    def __init__(self, folder: Path, ranks: RankGroup, keep: int, max_failed: int) -> None:
        self.folder, self.ranks, self.keep, self.max_failed = folder, ranks, keep, max_failed
        self.failed_in_a_row = 0
        self.last_error = ""
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is still writing a save."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def gave_up(self) -> bool:
        """Whether too many saves in a row have failed."""
        return self.failed_in_a_row >= self.max_failed

    def save(
        self,
        step: int,
        state: State,
        facts: dict[str, Any],
        *,
        is_best: bool = False,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint; all ranks call this at the same step.

        A failure is logged and counted, never raised: the run continues, and the earlier checkpoint
        does not change. This first waits for a save that is still being written.

        Args:
            step: Optimizer steps done.
            state: The tensors.
            facts: Plain values.
            is_best: Whether the checkpoint is the best so far.
            wait: Whether to return only when it is written. Then no staging copy is made.
        """
        self.wait()
        if wait:
            self._save(step, state, facts, is_best)
            return
        # torch.distributed.checkpoint often waits for the thread's stream. A new thread would have
        # the stream of the training, and that of the host's first GPU, whatever GPU this rank has.
        stream = torch.cuda.Stream() if torch.cuda.is_initialized() else None
        arguments = (stream, step, self._stage(state), facts, is_best)
        self._thread = threading.Thread(target=self._save_on, args=arguments, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _stage(self, state: State) -> dict[str, TensorShard]:
        """Copy what this rank writes to host memory."""
        staged = {}
        for name, stored in state.items():
            if not stored.is_written:
                continue
            local = stored.local.detach()
            on_device = local.device.type != "cpu"
            buffer = self._staged.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=on_device)
                self._staged[name] = buffer
            buffer.copy_(local, non_blocking=on_device)
            staged[name] = replace(stored, local=buffer)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def _save_on(self, stream: torch.cuda.Stream | None, *arguments: Any) -> None:
        with torch.cuda.stream(stream):
            self._save(*arguments)

    def _save(self, step: int, state: State, facts: dict[str, Any], is_best: bool) -> None:
        start = time.perf_counter()
        target = self.folder / f"step_{step:08d}"
        aside = self.folder / (target.name + _SAVING)
        try:
            self.ranks.run_on_all_ranks(lambda: _make_empty(aside), only_main=True)
            digests = self.ranks.run_on_all_ranks(
                lambda: sharded_io.write(aside, state, self.ranks.group, self.ranks.is_alone)
            )
            files = {name: digest for each in digests for name, digest in each.items()}
            manifest = Manifest(step, json.loads(json.dumps(facts)), files)  # as it reads back
            self.ranks.run_on_all_ranks(
                lambda: self._publish(aside, target, manifest, is_best), only_main=True
            )
        except Exception as error:
            self.failed_in_a_row += 1
            self.last_error = str(error)
            if self.ranks.is_main:
                _remove(aside)
                logger.error(
                    "THE CHECKPOINT OF STEP %d COULD NOT BE WRITTEN (%d in a row, "
                    "max_failed_saves=%d): %s. Training goes on; those before are unharmed.",
                    step,
                    self.failed_in_a_row,
                    self.max_failed,
                    error,
                )
        else:
            self.failed_in_a_row = 0
            seconds = time.perf_counter() - start
            logger.info("checkpoint %s written in %.3f s", target, seconds)

    def _publish(self, aside: Path, target: Path, manifest: Manifest, is_best: bool) -> None:
        """Rename a checkpoint that all ranks have written, update pointers, remove expired ones."""
        with atomic_write(aside / MANIFEST) as file:
            file.write(manifest.to_text().encode())
        if Manifest.read(aside) != manifest:
            raise StorageError(f"{aside / MANIFEST} does not read back as it was written")
        sync_folder(aside)
        if target.exists():  # an earlier attempt at this step
            target.rename(target.with_name(target.name + _DELETING))
        aside.rename(target)
        sync_folder(self.folder)
        _point(self.folder / LATEST, target)
        if is_best:
            _point(self.folder / BEST, target)
        for path in self.expired():
            doomed = path.with_name(path.name + _DELETING)
            path.rename(doomed)
            _remove(doomed)
        _remove(target.with_name(target.name + _DELETING))

    def expired(self) -> list[Path]:
        """Return the checkpoints that are neither among the newest `keep` nor the best."""
        best = resolve_pointer(self.folder, BEST)
        return [path for path in list_checkpoints(self.folder)[: -self.keep] if path != best]


def resolve_pointer(folder: Path, pointer: str) -> Path | None:
    """Return the checkpoint that `latest` or `best` names, if it exists."""
    with contextlib.suppress(OSError):
        path = folder / (folder / pointer).read_text(errors="replace").strip()
        if step_of(path) >= 0 and path.is_dir():
            return path
    return None


def _point(pointer: Path, checkpoint: Path) -> None:
    with atomic_write(pointer) as file:
        file.write(f"{checkpoint.name}\n".encode())


def _make_empty(folder: Path) -> None:
    _remove(folder)
    folder.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Delete a file or folder if it exists; log it if that fails."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed (%s)", path, error)


def _archive(path: Path) -> None:
    numbers: Iterator[int] = iter(range(1, 10_000))
    target = path.with_name(path.name + _DAMAGED)
    while target.exists():
        target = path.with_name(f"{path.name}{_DAMAGED}_{next(numbers)}")
    try:
        path.rename(target)
    except OSError as error:  # it is refused again at the next start
        logger.warning("%s could not be renamed (%s)", path, error)
