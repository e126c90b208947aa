"""Checkpoints that an earlier commit wrote are resumed, on their number of ranks and on others."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.datasets import SyntheticDataset
from data.fingerprint import join_samples
from tests import checkpoint_fixtures as fixtures
from tests.conftest import Ranks


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed checkpoints, unpacked."""
    folder = tmp_path_factory.mktemp("fixtures")
    with tarfile.open(fixtures.ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_all_cases_are_in_the_archive(unpacked: Path) -> None:
    names = {fixtures.name_of(*case) for case in fixtures.CASES}
    assert {path.name for path in unpacked.iterdir()} == names


@pytest.mark.parametrize("case", fixtures.CASES, ids=lambda case: fixtures.name_of(*case))
def test_its_data_set_is_recognized(unpacked: Path, case: tuple[str, int, int]) -> None:
    manifest = unpacked / fixtures.name_of(*case) / "checkpoint" / "checkpoint.json"
    settings = fixtures.SETTINGS
    source = SyntheticDataset(
        settings["num_classes"], settings["num_image"], settings["input_size"]
    )
    saved = json.loads(manifest.read_text())["facts"]["data set"]
    assert saved == join_samples(source.samples())


@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize("case", fixtures.CASES, ids=lambda case: fixtures.name_of(*case))
def test_it_is_resumed_with_the_same_centers_and_the_same_losses(
    ranks: Ranks, tmp_path: Path, unpacked: Path, case: tuple[str, int, int], other: int
) -> None:
    optimizer, centers, saved_on = case
    world_size = (saved_on + other - 1) % 3 + 1  # its own number of ranks, and another
    folder = unpacked / fixtures.name_of(*case)
    expected = json.loads((folder / "expected.json").read_text())
    changes: dict[str, Any] = {
        "resume": str(folder / "checkpoint"),
        "max_steps": fixtures.LAST_STEP,
        "keep_checkpoints": 0,
    }
    found = ranks.run(world_size, fixtures.train, str(tmp_path), optimizer, centers, changes)
    assert fixtures.sums([one["loaded"] for one in found]) == expected["sha256"]
    losses = found[0]["losses"]
    assert sorted(losses) == list(range(fixtures.SAVED_STEP + 1, fixtures.LAST_STEP + 1))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected["losses"][str(step)], rel=0, abs=1e-8)
