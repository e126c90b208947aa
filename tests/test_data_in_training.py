"""The config's data keys reach the loader, and late data is announced with its remedy."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from configs.base import Config
from data.augment import Augmentation
from data.sampling import BlockShuffleSampler, ClassBalancedSampler, RandomSampler, WeightedSampler
from tests.record_helpers import SIZE, jpeg, write_set
from train_v2 import run_on
from training import build as building
from training import build_data
from training.divergence import StepStats
from training.metrics_logger import MetricsLogger
from utils.distributed import DistContext
from utils.meter import Rates

CPU = DistContext(0, 0, 1, torch.device("cpu"))
SETTINGS = {
    "network": "r_nano",
    "embedding_size": 16,
    "input_size": SIZE,
    "batch_size": 6,
    "device": "cpu",
    "verbose": 0,
    "frequent": 1,
    "max_steps": 2,
    "num_epoch": 1,
}


def parts_of(rec: object, **changes: object) -> building.TrainComponents:
    cfg = Config(**{**SETTINGS, "rec": rec, **changes})  # type: ignore[arg-type]
    assert not cfg.problems()
    return building.build(cfg, CPU)


def test_every_data_key_reaches_the_loader(records: Path, tmp_path: Path) -> None:
    root = str(records)
    assert isinstance(parts_of(root).loader._make.order, RandomSampler)
    assert isinstance(parts_of(root, shuffle_block=4).loader._make.order, BlockShuffleSampler)
    assert isinstance(parts_of(root, samples_per_class=2).loader._make.order, ClassBalancedSampler)
    (tmp_path / "list.txt").write_text("class 0\n")
    parts = parts_of(
        [root, root],
        rec_weights=[1.0, 2.0],
        exclude=["-", str(tmp_path / "list.txt")],
        augment=["erase=0.3"],
        on_bad_record="skip",
    )
    make = parts.loader._make
    assert isinstance(make.order, WeightedSampler)
    assert make.order.shares.tolist() == [27, 54]
    assert (parts.loader.num_classes, parts.head.num_classes) == (10, 10)
    assert make.augmentation == Augmentation(erase=0.3)
    assert make.skips_bad_records


def test_the_published_augmentation_works_where_dali_is_not_installed(
    records: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_data, "dali_is_installed", lambda: False)
    published = Augmentation(resize=0.1, blur=0.2, hsv=0.2, gray=0.1)
    parts = parts_of(str(records), dali=True, augment=["dali_aug"])
    assert parts.loader._make.augmentation == published
    assert "NVIDIA DALI is not installed" in caplog.text


def test_a_run_goes_on_over_bad_records_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = [(jpeg(i), float(i % 3)) for i in range(12)]
    images[5] = (b"bad", 2.0)
    root = write_set(tmp_path, images, f"3,{SIZE},{SIZE}\n")
    cfg = Config(**{**SETTINGS, "rec": str(root), "on_bad_record": "skip"})  # type: ignore[arg-type]
    parts = run_on(cfg, CPU, tmp_path)
    assert parts.loader.num_skipped == 1
    assert "bad record skipped (1 so far): " in caplog.text
    assert "record with key 5 at byte" in caplog.text
    assert (tmp_path / "model.pt").is_file()


def test_late_data_is_announced_with_its_remedy_but_not_on_every_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    reporter = MetricsLogger(tmp_path, is_main=True)
    report = StepStats(1.0, 0, 0, 1.0, 1.0)

    def line(step: int, share: float) -> int:
        caplog.clear()
        reporter.step(step, 0, 0.1, report, Rates(100.0, share, 1.0, 1.0))
        return caplog.text.count("raise num_workers towards cores / ranks")

    assert line(1, 0.9) == 0  # workers were starting
    assert line(2, 0.2) == 0
    assert line(3, 0.21) == 1
    assert "21% of the time goes into waiting for data" in caplog.text
    assert [line(step, 0.9) for step in range(4, 104)] == [0] * 100
    assert line(104, 0.9) == 1
    reporter.close()
