"""For the first epochs only the class centers move; then the whole network does."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.bench_faults import whole_state
from configs.base import Config
from tests.conftest import Ranks
from tests.run_helpers import CHECKPOINTED_RUN, assert_same, copy_of_run, whole_run
from training.build import TrainComponents, build
from training.checkpoint.checkpointer import FOLDER
from utils.distributed import DistContext

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(rank: int = 0, world_size: int = 1, **changes: Any) -> TrainComponents:
    settings = {**CHECKPOINTED_RUN, "batch_size": 12 // world_size, "output": "unused", **changes}
    return build(Config(**settings), DistContext(rank, rank, world_size, torch.device("cpu")))


def of_backbone(parts: TrainComponents) -> dict[str, Tensor]:
    """Copies of everything that training the backbone moves."""
    state = dict(parts.backbone.state_dict())
    for number, kept in enumerate(parts.step.optimizer.state.values()):
        state |= {f"{number} {key}": value for key, value in kept.items()}
    if parts.average is not None:
        averages = parts.average.model.state_dict().items()
        state |= {f"average {name}": value for name, value in averages}
        state["updates"] = parts.average.updates
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def frozen_then_free(rank: int, world_size: int, changes: dict[str, Any]) -> None:
    parts = parts_of(rank, world_size, **{"dropout": 0.5, **changes})
    batches, count = iter(parts.loader), changes.get("gradient_acc", 1)
    same = torch.Generator().manual_seed(0)
    parts.batch_norm.statistics.uniform_(0.5, 1.5, generator=same)  # whose sums are rounded
    if parts.average is not None:
        parts.average.start_over()
    first, generator = of_backbone(parts), torch.get_rng_state()
    gradients: list[Tensor] = []
    next(parts.backbone.parameters()).register_hook(gradients.append)
    for _ in range(2):
        centers = parts.head.weight.clone()
        outcome = parts.step(list(islice(batches, count)), 0.05, is_frozen=True)
        parts.evaluated[1].average(world_size)  # as verification does
        assert not outcome.bad
        assert not torch.equal(parts.head.weight, centers)
        found = of_backbone(parts)
        assert found.keys() == first.keys()
        assert all(torch.equal(found[name], value) for name, value in first.items())
        assert float(outcome.grad_norm) == len(gradients) == 0  # there was no backward pass
        assert torch.equal(torch.get_rng_state(), generator)  # and no dropout
    while parts.step(list(islice(batches, count)), 0.05).bad:
        assert parts.step.scaler, "only a loss scaler has to find its scale"
    assert gradients
    for name, parameter in parts.backbone.named_parameters():
        assert torch.equal(parameter, first[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {"ema_decay": 0.9, "precision": "fp16", "optimizer": "adamw"}),
        (2, {"gradient_acc": 2, "sample_rate": 0.5, "clip_grad_norm": 0.0, "ema_decay": 0.9}),
        (2, {"zero_stage": 1, "head_update": "autograd"}),
        (3, {"gradient_acc": 2, "loss": "adaface"}),  # which looks at the whole batch
        (
            2,
            {
                "task": "classification",
                "parallel_dim": None,
                "loss": "softmax",
                "dropout": 0.0,
                "network": "resnet_nano",
                "embedding_size": 128,
            },
        ),
    ],
    ids=str,
)
def test_the_backbone_rests_to_the_bit_while_centers_move_and_then_moves(
    ranks: Ranks, world_size: int, changes: dict[str, Any]
) -> None:
    ranks.run(world_size, frozen_then_free, changes)


@pytest.mark.parametrize("loss", ["cosface", "adaface"])
def test_centers_move_as_on_the_embeddings_of_inference(loss: str) -> None:
    options: dict[str, Any] = {"precision": "fp64", "loss": loss}
    whole, shared, twin = (
        parts_of(**options, **more) for more in ({}, {"gradient_acc": 3, "batch_size": 4}, {})
    )
    for batch in islice(iter(twin.loader), 2):
        shares = [type(batch)(*part) for part in zip(*(t.split(4) for t in batch), strict=True)]
        outcomes = [
            whole.step([batch], 0.1, is_frozen=True),
            shared.step(shares, 0.1, is_frozen=True),
        ]
        expected = twin.head(twin.embedder(batch.images).requires_grad_(True), batch.labels)
        expected.backward()
        twin.head.step(0.1)
        for parts, outcome in zip((whole, shared), outcomes, strict=True):
            torch.testing.assert_close(outcome.loss, expected.detach(), rtol=1e-10, atol=0)
            torch.testing.assert_close(parts.head.weight, twin.head.weight, rtol=0, atol=1e-12)


def test_centers_rest_too_in_a_bad_step() -> None:
    parts = parts_of()
    (batch,) = islice(iter(parts.loader), 1)
    with torch.no_grad():
        parts.head.weight[0] = torch.nan
    before = parts.head.weight.clone()
    assert parts.step([batch], 0.1, is_frozen=True).bad
    assert torch.equal(parts.head.weight[1:], before[1:])


ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3}


@pytest.mark.parametrize(
    ("world_size", "more"),
    [(1, ADAMW), (2, {}), pytest.param(1, {**ADAMW, "precision": "fp16"}, marks=pytest.mark.slow)],
)
def test_a_run_thaws_after_its_frozen_epochs_and_resumes_bit_for_bit_in_them_and_after(
    ranks: Ranks, tmp_path: Path, world_size: int, more: dict[str, Any]
) -> None:
    changes = {"freeze_epoch": 1, "checkpoint_every": 4, **more}
    left_alone = ranks.run(world_size, whole_run, str(tmp_path / "run"), changes)
    folder = tmp_path / "run" / FOLDER
    frozen, still, free = (whole_state(folder / f"step_{n:08d}") for n in (4, 8, 16))
    names = [n for n in frozen if n.startswith(("backbone/", "optimizer/", "ranks/batch_norm"))]
    assert all(torch.equal(frozen[name], still[name]) for name in names)
    assert not torch.equal(frozen["head/weight"], still["head/weight"])
    assert not torch.equal(free["backbone/conv1.weight"], still["backbone/conv1.weight"])
    for step in (4, 8) if more else (4,):
        resumed = copy_of_run(tmp_path / "run", tmp_path / f"from_{step}", step)
        again = ranks.run(world_size, whole_run, str(resumed), {**changes, "resume": "auto"})
        assert_same(again, left_alone)
