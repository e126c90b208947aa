"""Preflight: what would end a run later is found before it, with one error on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import RankFailure
from tests.helpers import ENTRY_POINTS, PACKAGES
from training import preflight as module
from training.preflight import (
    CODE_FOLDERS,
    code_version,
    device_kind,
    library_versions,
    preflight,
)
from utils.distributed import DistContext
from utils.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def check(
    rank: int,
    world_size: int,
    facts: list[dict[str, str]],
    folders: list[str],
    bytes_needed: int = 0,
    timeout_s: float = 20.0,
) -> None:
    """One rank of the pool with its own facts and folder."""
    world = DistContext(rank, rank, world_size, CPU)
    folder = Path(folders[rank % len(folders)])
    own = facts[rank % len(facts)]
    preflight(world, own, folder, bytes_needed, timeout_s=timeout_s, arrival_s=timeout_s)


def refusal(ranks, world_size: int, *arguments: object) -> str:
    """The message with which every rank refused; the same on all."""
    with pytest.raises(RankFailure) as caught:
        ranks.run(world_size, check, *arguments)
    errors = caught.value.errors
    assert sorted(errors) == list(range(world_size))
    assert {type(error) for error in errors.values()} == {UserError}
    (message,) = {str(error) for error in errors.values()}
    return message


SAME = [{"config": "12ab", "torch": "2.13.0"}]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_agree_pass_and_leave_nothing_behind(ranks, tmp_path, world_size):
    (tmp_path / "model.pt").touch()
    (tmp_path / ".preflight-0-of-a-killed-run").touch()
    for _ in range(2):  # the second one does not read the first one's notes
        ranks.run(world_size, check, SAME, [str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_one_rank_needs_no_group(tmp_path):
    world = DistContext(0, 0, 1, CPU)
    preflight(world, SAME[0], tmp_path, 0)
    with pytest.raises(UserError, match="cannot be written"):
        preflight(world, SAME[0], tmp_path / "missing", 0)


def test_facts_that_differ_are_named_with_the_ranks_that_have_them(ranks, tmp_path):
    facts = [
        {"config": "12ab", "torch": "2.13.0"},
        {"config": "12ab", "torch": "2.11.0"},
        {"config": "12ab", "torch": "2.13.0", "nccl": "2.27"},
    ]
    message = refusal(ranks, 3, facts, [str(tmp_path)])
    first, *lines = message.splitlines()
    assert first.startswith("the ranks do not agree")
    assert [line.split(" (host")[0] for line in lines] == [
        "  nccl: nothing on ranks 0-1",
        "  torch: '2.13.0' on ranks 0, 2",
    ]
    assert "'2.11.0' on rank 1 (host " in lines[1]
    assert "config" not in message.replace("same code, config", "")


def test_folders_that_only_share_their_name_are_found(ranks, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    message = refusal(ranks, 2, SAME, [str(folder) for folder in folders], 0, 1.0)
    assert "preflight (shared output): rank 1 (host " in message
    assert "is not the folder that rank 0 (host " in message
    assert "shared file system" in message
    assert not [*folders[0].iterdir(), *folders[1].iterdir()]


def test_a_folder_one_rank_cannot_write_is_named_with_the_rank(ranks, tmp_path):
    (tmp_path / "b").touch()  # a file
    message = refusal(ranks, 2, SAME, [str(tmp_path), str(tmp_path / "b")])
    assert message.startswith("preflight (output): rank 1 (host ")
    assert "cannot be written (Not a directory)" in message


def test_too_little_room_is_said_with_both_sizes(ranks, tmp_path):
    message = refusal(ranks, 2, SAME, [str(tmp_path)], 2**60)
    assert "preflight (disk space): ranks 0-1 (host " in message
    assert "GiB free, and the checkpoints of this run need 1,073,741,824.00 GiB" in message
    assert "keep_checkpoints" in message


def _without(rank: int, world_size: int, missing: int, folder: str) -> None:
    if rank != missing:
        check(rank, world_size, SAME, [folder], 0, 0.5)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come_is_named_by_the_others(ranks, tmp_path, missing):
    with pytest.raises(RankFailure) as caught:
        ranks.run(3, _without, missing, str(tmp_path))
    assert sorted(caught.value.errors) == [rank for rank in range(3) if rank != missing]
    for error in caught.value.errors.values():
        assert f"preflight (facts): rank {missing} did not arrive within 0.5 s" in str(error)


def _stop(own: Path, bytes_needed: int) -> dict[str, str]:
    raise ZeroDivisionError


def _rank_1_stops_after_the_facts(rank: int, world_size: int, folder: str) -> None:
    real = module._check_folder
    try:
        if rank == 1:
            module._check_folder = _stop
        check(rank, world_size, SAME, [folder], 0, 0.5)
    finally:
        module._check_folder = real


def test_a_rank_that_stops_between_two_checks_is_named_by_the_others(ranks, tmp_path):
    with pytest.raises(RankFailure) as caught:
        ranks.run(3, _rank_1_stops_after_the_facts, str(tmp_path))
    assert isinstance(caught.value.errors.pop(1), ZeroDivisionError)
    assert sorted(caught.value.errors) == [0, 2]
    (message,) = {str(error) for error in caught.value.errors.values()}
    assert message.startswith("preflight (output): rank 1 did not arrive within 0.5 s")
    assert not [*tmp_path.iterdir()]


def _rank_1_sums_nothing(rank: int, world_size: int, folder: str) -> None:
    real = module._all_reduce
    try:
        if rank == 1:
            module._all_reduce = lambda world, timeout_s: {}
        check(rank, world_size, SAME, [folder], 0, 2.0)
    finally:
        module._all_reduce = real


def test_an_all_reduce_that_hangs_ends_and_points_at_the_network(ranks, tmp_path):
    with pytest.raises(RankFailure) as caught:
        ranks.run(2, _rank_1_sums_nothing, str(tmp_path))
    (message,) = {str(error) for error in caught.value.errors.values()}
    assert sorted(caught.value.errors) == [0, 1]
    assert message.startswith("preflight (all-reduce): rank 0 (host ")
    assert "did not finish within 2 s" in message
    assert "GLOO_SOCKET_IFNAME" in message


@given(st.sets(st.integers(0, 70), min_size=1))
def test_ranks_are_named_in_ranges_that_hold_exactly_them(ranks_named):
    text = module._ranks(sorted(ranks_named))
    found: list[int] = []
    for part in text.split(" ", 1)[1].split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(ranks_named)


def test_the_code_version_moves_with_any_file_a_rank_runs(tmp_path):
    not_run = {"configs", "scripts", "tests", "benchmarks", "head", "margins", "parallel"}
    assert set(CODE_FOLDERS) | not_run == set(PACKAGES)
    for name in ("train_v2.py", "arcshard/head/fused.py", "configs/base.py", "configs/demo.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    before = code_version("ArcShard 1", tmp_path)
    assert before.startswith("ArcShard 1 (")
    (tmp_path / "configs/demo.py").write_text("a = 2\n")  # the config has a hash of its own
    assert code_version("ArcShard 1", tmp_path) == before
    seen = {before}
    for name in ("train_v2.py", "arcshard/head/fused.py", "configs/base.py"):
        (tmp_path / name).write_text("a = 3\n")
        seen.add(code_version("ArcShard 1", tmp_path))
    (tmp_path / "arcshard/head/fused.py").rename(tmp_path / "arcshard/head/motor.py")
    seen.add(code_version("ArcShard 1", tmp_path))
    assert len(seen) == 5


def test_this_repository_has_a_code_version():
    assert all((ROOT / f"{name}.py").exists() for name in ENTRY_POINTS)
    assert code_version("x", ROOT) == code_version("x", ROOT)


def test_versions_and_device_are_words():
    versions = library_versions()
    assert {"python", "torch", "numpy"} <= set(versions)
    assert json.loads(json.dumps(versions)) == versions
    assert device_kind(CPU) == "cpu"
