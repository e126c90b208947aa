"""Checkpoints: any shards go back to any other shards, and no failure harms what was saved."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings

from arcshard.shard import class_range
from tests.conftest import Ranks as Pool
from tests.run_helpers import Disk, some_state
from training.checkpoint import sharded_io
from training.checkpoint.checkpointer import (
    Checkpointer,
    CheckpointError,
    Manifest,
    RankGroup,
    find_intact,
    list_checkpoints,
    remove_incomplete,
    resolve_pointer,
)
from training.checkpoint.sharded_io import FileDigest, StorageError, TensorShard
from utils.distributed import DistContext
from utils.files import atomic_write

ALONE = DistContext(0, 0, 1, torch.device("cpu"))


def shards(whole: torch.Tensor, world_size: int, per_class: int, fill: bool) -> list[TensorShard]:
    """The rows of each rank, or room for them."""
    found = []
    for rank in range(world_size):
        own = class_range(len(whole) // per_class, rank, world_size)
        rows = whole[own.start * per_class : own.stop * per_class]
        local = rows.clone() if fill else torch.full_like(rows, -1)
        found.append(TensorShard(local, own.start * per_class, len(whole)))
    return found


def write_as(folder: Path, states: list[dict[str, TensorShard]]) -> None:
    """What `sharded_io.write` does on many ranks, in this process, without the collectives."""
    writers = [dcp.FileSystemWriter(folder) for _ in states]
    planners = [sharded_io._SavePlanner() for _ in states]
    plans = []
    for rank, (planner, writer, state) in enumerate(zip(planners, writers, states, strict=True)):
        planner.set_up_planner(state, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    results = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for planner, writer, plan in zip(planners, writers, plans, strict=True)
    ]
    writers[0].finish(metadata, results)


@settings(max_examples=60)
@given(
    classes=st.integers(1, 90),
    per_class=st.sampled_from([1, 3]),
    before=st.integers(1, 16),
    after=st.integers(1, 16),
    piece=st.sampled_from([1, 40, 2**24]),
)
def test_any_number_of_classes_goes_from_any_ranks_to_any_others(
    tmp_path_factory: pytest.TempPathFactory,
    classes: int,
    per_class: int,
    before: int,
    after: int,
    piece: int,
) -> None:
    folder = tmp_path_factory.mktemp("reshard")
    rows = classes * per_class
    weight = torch.arange(rows * 5, dtype=torch.float32).view(rows, 5)
    step = torch.arange(rows, dtype=torch.float64) / 7
    pieces = sharded_io.PIECE_BYTES
    sharded_io.PIECE_BYTES = piece
    try:
        saved = zip(
            shards(weight, before, per_class, True),
            shards(step, before, per_class, True),
            strict=True,
        )
        write_as(folder, [{"weight": w, "step": s} for w, s in saved])
    finally:
        sharded_io.PIECE_BYTES = pieces
    wanted = zip(
        shards(weight, after, per_class, False),
        shards(step, after, per_class, False),
        strict=True,
    )
    states = [{"weight": w, "step": s} for w, s in wanted]
    for state in states:
        sharded_io.read(folder, state, None, True)
    assert torch.equal(torch.cat([state["weight"].local for state in states]), weight)
    assert torch.equal(torch.cat([state["step"].local for state in states]), step)


def save_and_load(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    ranks = RankGroup(world)
    whole = torch.arange(35.0).view(7, 5)
    (mine,) = shards(whole, world_size, 1, True)[rank : rank + 1]
    state = {
        "head": mine,
        "scalar": TensorShard.whole(torch.tensor(2.5), rank == world_size - 1),
        "own": TensorShard.of_rank(torch.tensor([rank, 10 + rank]), rank, world_size),
        "own scalar": TensorShard.of_rank(torch.tensor(float(rank)), rank, world_size),
    }
    saver = Checkpointer(Path(folder), ranks, keep=2, max_failed=2)
    saver.save(3, state, {"a": [1, (2, 3)]}, wait=True)
    assert not saver.failed_in_a_row
    room = {
        name: TensorShard(torch.zeros_like(s.local), s.first_row, s.num_rows)
        for name, s in state.items()
    }
    found = find_intact(Path(folder), ranks)
    assert found is not None
    assert found.manifest.facts == {"a": [1, [2, 3]]}
    sharded_io.read(found.path, room, ranks.group, ranks.is_alone)
    return [{name: bool(torch.equal(room[name].local, state[name].local)) for name in state}]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_every_rank_holds_alike_or_of_its_own_comes_back(
    ranks: Pool, tmp_path: Path, world_size: int
) -> None:
    for (answer,) in ranks.run(world_size, save_and_load, str(tmp_path)):
        assert all(answer.values()), answer


def test_another_name_size_or_dtype_is_refused(tmp_path: Path) -> None:
    sharded_io.write(tmp_path / "a", some_state(), None, True)
    for state, words in (
        ({"y": TensorShard.whole(torch.zeros(1000), True)}, "y is not in the saved state"),
        ({"x": TensorShard.whole(torch.zeros(999), True)}, "was saved as [1000]"),
        ({"x": TensorShard.whole(torch.zeros(1000).half(), True)}, "torch.float16"),
    ):
        with pytest.raises(StorageError) as refused:
            sharded_io.read(tmp_path / "a", state, None, True)
        assert words in str(refused.value)


def test_a_pickle_in_place_of_the_metadata_runs_nothing(tmp_path: Path) -> None:
    sharded_io.write(tmp_path / "a", some_state(), None, True)

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made by the pickle"),)

    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(StorageError, match="refused"):
        sharded_io.describe(tmp_path / "a")
    with pytest.raises(StorageError, match="refused"):
        sharded_io.read(tmp_path / "a", some_state(), None, True)
    assert not (tmp_path / "made by the pickle").exists()


def test_metadata_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    sharded_io.write(tmp_path / "a", some_state(), None, True)
    path = tmp_path / "a" / ".metadata"
    content = path.read_bytes()
    assert b"__0_0.distcp" in content
    path.write_bytes(content.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(StorageError, match="points outside"):
        sharded_io.describe(tmp_path / "a")


@given(st.data())
def test_any_changed_byte_of_a_manifest_is_seen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest = Manifest(7, {"progress": {"best": 0.5, "name": "é"}}, {"f": FileDigest(3, "ab")})
    content = bytearray(manifest.to_text().encode())
    at = data.draw(st.integers(0, len(content) - 1))
    value = data.draw(st.integers(0, 255))
    was = content[at]
    content[at] = value
    (folder / "checkpoint.json").write_bytes(content)
    if value == was:
        assert Manifest.read(folder) == manifest
    else:
        with pytest.raises(StorageError):
            Manifest.read(folder)


def test_a_failed_save_is_told_harms_nothing_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path / "checkpoints")
    disk.save(1)
    (disk.folder / "step_00000002.saving").write_text("in the way")
    os.chmod(disk.folder, 0o500)
    blocked = tmp_path / "elsewhere"
    disk.folder.rename(blocked)
    disk.folder.write_text("no folder")  # what a lost mount looks like, also to root
    disk.save(2)
    assert disk.saver.failed_in_a_row == 1
    assert not disk.saver.gave_up
    assert "THE CHECKPOINT OF STEP 2 COULD NOT BE WRITTEN" in caplog.text
    disk.save(3)
    assert disk.saver.gave_up
    disk.folder.unlink()
    blocked.rename(disk.folder)
    os.chmod(disk.folder, 0o700)
    found = find_intact(disk.folder, RankGroup(ALONE))
    assert found is not None
    assert found.manifest.step == 1
    disk.save(4)
    assert not disk.saver.gave_up
    assert [p.name for p in list_checkpoints(disk.folder)] == ["step_00000001", "step_00000004"]
    remove_incomplete(disk.folder)
    assert {p.name for p in disk.folder.iterdir()} == {
        "latest",
        "step_00000001",
        "step_00000004",
    }


def test_what_a_kill_leaves_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("step_00000002.saving", "step_00000001.deleting"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.distcp").touch()
    for name in ("latest.tmp", "best.tmp"):  # of earlier versions
        (tmp_path / name).touch()
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "latest"):
        (unfinished,) = tmp_path.glob(".*")
        shutil.copy(unfinished, tmp_path / f".model.pt{unfinished.name.removeprefix('.latest')}")
        raise KeyboardInterrupt
    (tmp_path / "step_00000003.damaged").mkdir()
    for name in ("notes.tmp", "latest", "wanted.saving", ".hidden"):
        (tmp_path / name).touch()
    remove_incomplete(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_00000003.damaged", "notes.tmp", "latest", "wanted.saving", ".hidden"}


FULL_DISK = """
import logging, resource, sys, torch
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.run_helpers import Disk, some_state
from training.checkpoint.sharded_io import TensorShard
logging.basicConfig(level=logging.INFO)
disk = Disk(Path({folder!r}))
disk.save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # then EFBIG
large = {{"x": TensorShard.whole(torch.ones(100_000), True)}}
disk.saver.save(2, large, {{}}, wait=True)
print("failed", disk.saver.failed_in_a_row, disk.saver.last_error)
disk.save(3)
print("failed", disk.saver.failed_in_a_row)
"""


def test_a_file_that_cannot_grow_is_a_failed_save_and_the_next_may_succeed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    root = str(Path(__file__).resolve().parent.parent)
    code = FULL_DISK.format(root=root, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed 1" in done.stdout
    assert "File too large" in done.stdout
    assert "failed 0" in done.stdout.splitlines()[-1]
    assert {p.name for p in folder.iterdir()} == {"latest", "step_00000001", "step_00000003"}


def test_what_does_not_read_back_is_never_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path)
    disk.save(1)
    close = sharded_io._HashingStream.close

    def lose_a_byte(stream: sharded_io._HashingStream) -> None:
        stream.raw.flush()
        os.pwrite(stream.raw.fileno(), b"\xff\x00", 100)
        close(stream)

    monkeypatch.setattr(sharded_io._HashingStream, "close", lose_a_byte)
    disk.save(2)
    assert "does not read back" in disk.saver.last_error
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step_00000001"]


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for step in range(1, 8):
        disk.save(step, is_best=step in (1, 3))
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step_00000003",
        "step_00000006",
        "step_00000007",
    ]
    assert resolve_pointer(tmp_path, "best") == tmp_path / "step_00000003"


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    disk.save(5, value=1.0)
    disk.save(5, value=2.0)
    room = some_state(0.0)
    sharded_io.read(tmp_path / "step_00000005", room, None, True)
    assert room["x"].local[0] == 2.0
    assert {p.name for p in tmp_path.iterdir()} == {"latest", "step_00000005"}


def test_training_may_move_on_while_the_state_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = sharded_io.write

    def slow_write(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(sharded_io, "write", slow_write)
    saver = Checkpointer(tmp_path, RankGroup(ALONE), keep=2, max_failed=2)
    state = some_state(1.0)
    saver.save(1, state, {})
    assert saver.is_busy
    state["x"].local.fill_(-5.0)  # the next step
    go_on.set()
    saver.wait()
    room = some_state(0.0)
    sharded_io.read(tmp_path / "step_00000001", room, None, True)
    assert room["x"].local.eq(1.0).all()


def test_on_a_gpu_the_writing_thread_has_a_stream_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new thread stands on the first GPU and on the stream of the training."""
    entered: list[tuple[object, str]] = []

    @contextlib.contextmanager
    def stream(chosen: object) -> Iterator[None]:
        entered.append((chosen, threading.current_thread().name))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "made by the main thread")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    saver = Checkpointer(tmp_path, RankGroup(ALONE), keep=2, max_failed=2)
    saver.save(1, some_state(1.0), {})
    saver.wait()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert entered[0][0] == "made by the main thread"
    assert entered[0][1] != threading.current_thread().name


def fails_on_one_rank(rank: int, world_size: int, folder: str) -> tuple[int, str, list[str]]:
    logging.disable(logging.CRITICAL)
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    saver = Checkpointer(Path(folder), RankGroup(world), keep=2, max_failed=2)
    state = {"x": TensorShard(torch.ones(2, 3), 2 * rank, 2 * world_size)}
    saver.save(1, state, {}, wait=True)
    write = _no_space if rank == 1 else sharded_io._HashingStream.write
    with unittest.mock.patch.object(sharded_io._HashingStream, "write", write):
        saver.save(2, state, {}, wait=True)
    failed = saver.failed_in_a_row, saver.last_error
    saver.save(3, state, {}, wait=True)
    logging.disable(logging.NOTSET)
    return *failed, [p.name for p in list_checkpoints(Path(folder))]


def _no_space(stream: sharded_io._HashingStream, data: Any) -> int:
    stream.files.failure = OSError(28, "No space left on device")
    raise stream.files.failure


def test_a_disk_full_for_one_rank_fails_the_save_on_all(ranks: Pool, tmp_path: Path) -> None:
    for failed, error, names in ranks.run(3, fails_on_one_rank, str(tmp_path)):
        assert failed == 1
        assert "rank 1" in error
        assert "No space left on device" in error
        assert names == ["step_00000001", "step_00000003"]
    assert {p.name for p in tmp_path.iterdir()} == {"latest", "step_00000001", "step_00000003"}


def test_without_any_checkpoint_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert find_intact(tmp_path / "not there", RankGroup(ALONE)) is None
    with pytest.raises(CheckpointError, match="rank 0"):
        RankGroup(ALONE).run_on_all_ranks(lambda: 1 / 0)
