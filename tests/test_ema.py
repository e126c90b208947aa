"""The average of the backbone follows the formula, is what is scored and saved, and is not lost."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.weights import load_model
from benchmarks.bench_faults import whole_state
from configs.base import Config
from eval.model import Embedder
from eval.verification import verify
from tests.conftest import Ranks
from tests.run_helpers import CHECKPOINTED_RUN, assert_same, copy_of_run, whole_run, write_pairs
from train_v2 import run_on
from training.build import TrainComponents, build
from training.checkpoint.checkpointer import FOLDER
from training.planner.memory import estimate_requirements
from training.precision import POLICIES
from utils.distributed import DistContext

ALONE = DistContext(0, 0, 1, torch.device("cpu"))
RUN: dict[str, Any] = {"ema_decay": 0.4, "max_steps": 7, "checkpoint_every": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(folder: Path, **changes: Any) -> TrainComponents:
    parts = build(Config(**{**CHECKPOINTED_RUN, "output": str(folder), **changes}), ALONE)
    parts.step.model.train()
    return parts


def floats(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of weights and running statistics."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_and_statistics_follow_the_formula_and_rest_in_bad_steps(
    tmp_path: Path, optimizer: str
) -> None:
    parts = parts_of(tmp_path, ema_decay=0.3, precision="fp64", optimizer=optimizer)
    assert parts.average is not None
    expected = floats(parts.backbone)
    norm = next(m for m in parts.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))
    good = 0
    for step, batch in enumerate(islice(iter(parts.loader), 6)):
        is_poisoned = step in (0, 3)
        if is_poisoned:
            poison = norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.nan,))
        outcome = parts.step([batch], 0.05)
        assert bool(outcome.bad) == is_poisoned
        if is_poisoned:
            poison.remove()
        else:
            kept = min(0.3, (1 + good) / (10 + good))
            now = floats(parts.backbone)
            expected = {n: kept * old + (1 - kept) * now[n] for n, old in expected.items()}
            good += 1
        found = floats(parts.average.model)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)
    assert int(parts.average.updates) == good == 4
    assert not torch.equal(found["bn1.running_mean"], now["bn1.running_mean"])
    assert not torch.equal(found["conv1.weight"], now["conv1.weight"])


def test_training_goes_on_beside_it_as_if_it_were_not_there(tmp_path: Path) -> None:
    ends = []
    for decay in (0.0, 0.5):
        parts = parts_of(tmp_path, ema_decay=decay)
        for batch in islice(iter(parts.loader), 3):
            parts.step([batch], 0.05)
        ends.append([*parts.backbone.state_dict().values(), parts.head.weight])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_it_is_what_is_verified_and_saved_and_the_weights_stay_in_the_checkpoint(
    tmp_path: Path,
) -> None:
    write_pairs(tmp_path)
    changes = {"val_targets": ["pairs"], "val_dir": str(tmp_path), "max_steps": 3, "ema_decay": 0.4}
    out = tmp_path / "run"
    out.mkdir()
    parts = run_on(Config(**{**CHECKPOINTED_RUN, **changes, "output": str(out)}), ALONE, out)
    assert parts.average is not None
    averaged, raw = parts.average.model.state_dict(), parts.backbone.state_dict()
    assert not torch.equal(averaged["conv1.weight"], raw["conv1.weight"])
    for name in ("model.pt", "model_best.pt"):
        saved = torch.load(out / name, weights_only=True)
        assert saved.keys() == raw.keys()
        assert all(torch.equal(saved[key], value) for key, value in averaged.items())
    images = next(iter(parts.loader)).images
    alone = parts.average.model.eval()((images.float() - 127.5) / 127.5)
    torch.testing.assert_close(parts.embedder(images), alone.detach())
    stored = whole_state(out / FOLDER / "step_00000003")
    for name, parameter in parts.backbone.named_parameters():
        assert torch.equal(stored[f"backbone/{name}"], parameter)
        assert torch.equal(stored[f"ema/backbone/{name}"], averaged[name])


def test_on_several_ranks_the_score_is_that_of_the_saved_model(
    ranks: Ranks, tmp_path: Path
) -> None:
    faces = write_pairs(tmp_path)
    changes = {**RUN, "val_targets": ["pairs"], "val_dir": str(tmp_path), "keep_checkpoints": 0}
    ranks.run(2, whole_run, str(tmp_path / "run"), changes)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    scored = [record["eval"]["pairs"] for record in map(json.loads, lines) if "eval" in record][-1]
    model, _ = load_model(tmp_path / "run")
    again = verify(Embedder(model), [faces], input_size=CHECKPOINTED_RUN["input_size"])["pairs"]
    assert scored["xnorm"] == pytest.approx(again["xnorm"], rel=1e-6)


def test_a_resumed_run_has_the_same_average_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    left_alone = ranks.run(2, whole_run, str(tmp_path / "run"), RUN)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 4)
    again = ranks.run(2, whole_run, str(resumed), {**RUN, "resume": "auto"})
    assert_same(again, left_alone)
    first, second = (
        torch.load(path / "model.pt", weights_only=True) for path in (tmp_path / "run", resumed)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    # what was saved at the end had become the mean over the ranks
    one, two = whole_state(tmp_path / "run" / FOLDER / "step_00000007")["ranks/ema_batch_norm"]
    assert torch.equal(one, two)
    assert torch.equal(first["bn1.running_mean"], one[:16])


def test_on_another_number_of_ranks_its_statistics_are_the_mean_over_those_that_were(
    ranks: Ranks, tmp_path: Path
) -> None:
    changes = {**RUN, "max_steps": 5}
    ranks.run(2, whole_run, str(tmp_path / "run"), changes)
    alone = copy_of_run(tmp_path / "run", tmp_path / "alone", 4)
    stored = whole_state(alone / FOLDER / "step_00000004")
    whole_run(0, 1, str(alone), {**changes, "max_steps": 4, "resume": "auto"})
    found = torch.load(alone / "model.pt", weights_only=True)
    rows = stored["ranks/ema_batch_norm"]
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(found["bn1.running_mean"], rows.mean(dim=0)[:16])  # the first of all
    assert torch.equal(found["conv1.weight"], stored["ema/backbone/conv1.weight"])


def test_it_starts_from_the_weights_of_a_checkpoint_without_one_and_is_left_out_if_not_wanted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path)
    caplog.set_level(logging.INFO)
    whole_run(0, 1, out, {**RUN, "ema_decay": 0.0, "max_steps": 2})
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    whole_run(0, 1, out, {**RUN, "max_steps": 2, "resume": "auto"})
    assert "has no average of the weights: it starts from them now" in caplog.text
    average = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(average[key], value) for key, value in weights.items())
    whole_run(0, 1, out, {**RUN, "max_steps": 4, "resume": "auto"})
    averaged = torch.load(tmp_path / "model.pt", weights_only=True)
    whole_run(0, 1, out, {**RUN, "ema_decay": 0.0, "max_steps": 4, "resume": "auto"})
    assert "has an average of the weights; ema_decay=0 leaves it out" in caplog.text
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not torch.equal(averaged["conv1.weight"], plain["conv1.weight"])


def test_the_plan_counts_it_as_often_as_it_is_there() -> None:
    def weights(**changes: Any) -> int:
        cfg = Config(**{**CHECKPOINTED_RUN, "output": "unused", **changes})
        return estimate_requirements(cfg, 1, 23, POLICIES["fp32"], "cpu").footprint.weights

    assert weights(ema_decay=0.9) == pytest.approx(2 * weights(), rel=1e-4)
    frozen = {"freeze_batch_norm": True}
    assert weights(**frozen, ema_decay=0.9) == pytest.approx(2 * weights(**frozen), rel=1e-4)


def test_classification_is_refused_an_average_that_its_last_layer_does_not_fit() -> None:
    cfg = Config(task="classification", loss="softmax", rec="x", ema_decay=0.9, val_targets=[])
    (problem,) = cfg.problems()
    assert "ema_decay=0.9 averages the backbone alone" in problem
