"""PartialFC on any number of ranks equals the readable dense twin: loss and both gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.losses import ArcFace, CombinedMargin, CosFace, SphereFace
from arcshard.partial_fc import PartialFC, UpdateMode
from tests.conftest import RankFailure
from tests.helpers import GOLDEN
from tests.reference import dense_loss
from tests.run_helpers import PATHS, batch_for, loss_and_gradients

MARGINS = {
    "arcface": ArcFace(0.5, 16.0),
    "arcface_straight_through": ArcFace(0.5, 16.0, gradient="straight_through"),
    "cosface": CosFace(0.4, 16.0),
    "sphereface": SphereFace(1.7, 16.0),
    "combined": CombinedMargin(0.9, 0.4, 0.15, 16.0),
    "cosface_removed": CosFace(0.4, 16.0, interclass_filtering_threshold=0.2),
    "arcface_legacy": ArcFace(
        0.5, 16.0, interclass_filtering_threshold=0.2, interclass_filtering_mode="legacy"
    ),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", MARGINS)
def test_loss_and_both_gradients_equal_the_dense_twin(ranks, name, path, sample_rate, world_size):
    margin, num_classes, width = MARGINS[name], 37, 8
    sizes = [5, 3, 0, 4][:world_size]  # ragged, one rank without a row
    parts = ranks.run(
        world_size,
        loss_and_gradients,
        margin,
        num_classes,
        sizes,
        sample_rate,
        width,
        *PATHS[path],
    )
    _, _, embeddings, labels = batch_for(0, sizes, num_classes, width)
    embeddings.requires_grad_(True)
    weight = torch.cat([part["weight"] for part in parts]).requires_grad_(True)
    assert weight.shape == (num_classes, width)
    classes = torch.cat([part["classes"] for part in parts])
    loss = dense_loss(margin, embeddings, labels, weight, classes)
    loss.backward()

    for part in parts:
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    grad_weight = torch.cat([part["grad_weight"] for part in parts])
    grad_embeddings = torch.cat([part["grad_embeddings"] for part in parts])
    torch.testing.assert_close(grad_weight, weight.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grad_embeddings, embeddings.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5])
def test_fewer_classes_than_ranks(ranks, num_classes):
    parts = ranks.run(4, loss_and_gradients, ArcFace(0.5, 16.0), num_classes, [2, 2, 2, 2], 1.0, 8)
    _, _, embeddings, labels = batch_for(0, [2, 2, 2, 2], num_classes, 8)
    weight = torch.cat([part["weight"] for part in parts]).requires_grad_(True)
    loss = dense_loss(ArcFace(0.5, 16.0), embeddings, labels, weight)
    loss.backward()
    grad_weight = torch.cat([part["grad_weight"] for part in parts])
    torch.testing.assert_close(parts[3]["loss"], loss.detach())
    torch.testing.assert_close(grad_weight, weight.grad, rtol=1e-9, atol=1e-12)
    if num_classes < 4:
        assert parts[3]["range"][0] == parts[3]["range"][1]


def golden_head(
    rank: int,
    world_size: int,
    margin: CombinedMargin,
    path: str,
    dtype: torch.dtype,
    update: UpdateMode,
):
    with np.load(path) as golden:
        embeddings = torch.from_numpy(golden["embeddings"]).to(dtype)
        labels, weight = torch.from_numpy(golden["labels"]), torch.from_numpy(golden["weight"])
    rule = SGDRows(0.0, 0.0)  # at a learning rate of 1 centers move by their gradient
    head = PartialFC(margin, 16, 37, dtype=dtype, row_optimizer=rule, update=update)
    weight = weight[head.class_range.start : head.class_range.stop].to(dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    share = 16 // world_size
    part = slice(rank * share, (rank + 1) * share)
    local = embeddings[part].clone().requires_grad_(True)
    loss = head(local, labels[part], 1.0)
    loss.backward()
    head.step(1.0)
    return loss.detach(), local.grad, weight - head.weight.detach()


def close_to_golden(value: torch.Tensor, golden: np.ndarray) -> bool:
    expected = torch.from_numpy(np.asarray(golden)).double()
    return float((value.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("update", ["fused", "autograd"])
@pytest.mark.parametrize("mode", ["published", "exact"])
@pytest.mark.parametrize("name", ["arcface", "cosface", "arcface_filter04", "cosface_filter04"])
def test_golden_head(ranks, name, mode, update, world_size):
    options = {"gradient": "straight_through" if mode == "published" else "exact"}
    if "filter04" in name:
        options |= {"interclass_filtering_threshold": 0.4, "interclass_filtering_mode": "legacy"}
    margin = (ArcFace if "arcface" in name else CosFace)(**options)
    path = GOLDEN / "head" / "arcface_torch_head.npz"
    dtype = torch.float32 if mode == "published" else torch.float64
    parts = ranks.run(world_size, golden_head, margin, str(path), dtype, update)
    with np.load(path) as golden:
        key = f"{name}/exact" if mode == "exact" else f"{name}/ranks{world_size}"
        assert close_to_golden(parts[0][0], golden[f"{key}/loss"])
        grad_embeddings = torch.cat([part[1] for part in parts])
        assert close_to_golden(grad_embeddings, golden[f"{key}/grad_embeddings"])
        grad_weight = torch.cat([part[2] for part in parts])
        assert close_to_golden(grad_weight, golden[f"{key}/grad_weight"])


def steps_of_head(
    rank: int, world_size: int, rule: str, sample_rate: float, steps: int
) -> list[dict[str, torch.Tensor]]:
    """Weight, state and sample after each of some steps on changing batches."""
    update = SGDRows(0.9, 1e-2) if rule == "sgd" else AdamWRows(weight_decay=1e-2)
    head = PartialFC(
        CosFace(0.2, 8.0),
        8,
        41,
        sample_rate,
        row_optimizer=update,
        dtype=torch.float64,
        seed=1,
        update="autograd",
    )
    history = []
    for step in range(steps):
        embeddings, labels, _, _ = batch_for(rank, [3] * world_size, 41, 8, seed=step)
        before = head.weight.detach().clone()
        head(embeddings, labels).backward()
        assert head.weight.grad is not None
        _, sample = head.sampled_centers()
        rows = torch.arange(head.num_classes_local) if sample is None else sample
        gradient = head.weight.grad.clone()
        head.step(0.1)
        history.append(
            {
                "before": before,
                "after": head.weight.detach().clone(),
                "rows": rows,
                "gradient": gradient,
                **{k: v.clone() for k, v in update.state(head.weight).items()},
            }
        )
    return history


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_rows_move_as_one_torch_optim_per_row_stepped_when_sampled(ranks, rule, sample_rate):
    for history in ranks.run(2, steps_of_head, rule, sample_rate, 50):
        rows = [torch.nn.Parameter(row.clone()) for row in history[0]["before"]]
        if rule == "sgd":
            optims = [torch.optim.SGD([r], 0.1, momentum=0.9, weight_decay=1e-2) for r in rows]
        else:
            optims = [torch.optim.AdamW([r], 0.1, weight_decay=1e-2) for r in rows]
        previous: dict[str, torch.Tensor] = {}
        for now in history:
            for row in now["rows"].tolist():
                rows[row].grad = now["gradient"][row].clone()
                optims[row].step()
            expected = torch.stack([row.detach() for row in rows])
            torch.testing.assert_close(now["after"], expected, rtol=0, atol=1e-6)
            still = torch.ones(len(rows), dtype=torch.bool)
            still[now["rows"]] = False
            assert torch.equal(now["after"][still], now["before"][still])
            for name in set(now) & {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}:
                if name in previous:
                    assert torch.equal(now[name][still], previous[name][still])
                previous[name] = now[name]


def test_a_plain_torch_optim_is_refused_on_a_sampled_head():
    head = PartialFC(CosFace(), 8, 41, 0.3)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    embeddings, labels, _, _ = batch_for(0, [4], 41, 8)
    head(embeddings.float(), labels).backward()
    before = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="not sampled"):
        optimizer.step()
    assert torch.equal(before, head.weight)


def test_a_plain_torch_optim_serves_the_full_head():
    head = PartialFC(CosFace(), 8, 41)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    embeddings, labels, _, _ = batch_for(0, [4], 41, 8)
    head(embeddings.float(), labels).backward()
    before = head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, head.weight)


@pytest.mark.parametrize("bad", [False, True])
def test_a_bad_step_moves_no_row_and_no_state(bad):
    head = PartialFC(CosFace(), 8, 41, 0.3, row_optimizer=AdamWRows(weight_decay=1e-2))
    embeddings, labels, _, _ = batch_for(0, [4], 41, 8)
    loss = head(embeddings.float() * (math.nan if bad else 1.0), labels)
    loss.backward()
    before = head.weight.detach().clone()
    head.step(0.1, bad=~torch.isfinite(loss))
    assert torch.equal(before, head.weight) == bad
    assert bool((head.row_optimizer.state(head.weight)["step"] == 0).all()) == bad


def initial_centers(rank: int, world_size: int) -> torch.Tensor:
    return PartialFC(CosFace(), 8, 1003, seed=7).weight.detach()


def test_initial_centers_do_not_depend_on_the_number_of_ranks(ranks):
    alone = initial_centers(0, 1)
    assert len(alone.unique(dim=0)) == 1003
    for world_size in (2, 3, 4):
        assert torch.equal(torch.cat(ranks.run(world_size, initial_centers)), alone)


def count_collectives(rank: int, world_size: int, sample_rate: float) -> dict[str, int]:
    head = PartialFC(CosFace(), 8, 41, sample_rate, row_optimizer=SGDRows(), batch_size_per_rank=4)
    embeddings, labels, _, _ = batch_for(rank, [4] * world_size, 41, 8)
    with torch.profiler.profile() as profile:
        head(embeddings.float(), labels).backward()
        head.step(0.1)
    counts = {event.key: event.count for event in profile.key_averages()}
    return {key: count for key, count in counts.items() if key.startswith("c10d::")}


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_a_step_costs_two_all_gathers_and_one_reduce_scatter(ranks, sample_rate):
    for counts in ranks.run(2, count_collectives, sample_rate):
        assert counts == {"c10d::_allgather_base_": 2, "c10d::_reduce_scatter_base_": 1}


def bad_batch(rank: int, world_size: int, what: str, capacity: int | None) -> None:
    head = PartialFC(CosFace(), 8, 41, batch_size_per_rank=capacity)
    embeddings, labels = torch.randn(4, 8), torch.arange(4)
    if rank == 1:
        match what:
            case "label too large":
                labels[2] = 41
            case "label negative":
                labels[2] = -1
            case "wrong width":
                embeddings = torch.randn(4, 9)
            case "integer embeddings":
                embeddings = embeddings.long()
            case "too many labels":
                labels = torch.arange(5)
            case "floating labels":
                labels = labels.float()
    if what == "empty":
        embeddings, labels = embeddings[:0], labels[:0]
    head(embeddings, labels)


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("label too large", r"label 41 in row 2 of rank 1's batch: labels must be in \[0, 41\)"),
        ("label negative", r"label -1 in row 2 of rank 1's batch"),
        ("wrong width", "rank 1 brought"),
        ("integer embeddings", "rank 1 brought"),
        ("too many labels", "rank 1 brought"),
        ("floating labels", "rank 1 brought"),
        ("empty", "global batch is empty"),
    ],
)
def test_every_rank_raises_for_a_bad_batch_on_any_rank(ranks, what, words, capacity):
    with pytest.raises(RankFailure, match=words) as failure:
        ranks.run(2, bad_batch, what, capacity)
    assert sorted(failure.value.errors) == [0, 1]
    assert all(isinstance(error, ValueError) for error in failure.value.errors.values())


def accumulated(rank: int, world_size: int, sample_rate: float, micro_steps: int):
    head = PartialFC(
        ArcFace(0.3, 8.0), 8, 41, sample_rate, row_optimizer=SGDRows(), dtype=torch.float64, seed=5
    )
    _, _, embeddings, labels = batch_for(0, [12 * world_size], 41, 8)
    gradients = []
    chunks = [
        (e.clone().requires_grad_(True), y)
        for e, y in zip(embeddings.chunk(micro_steps), labels.chunk(micro_steps), strict=True)
    ]
    mine = [
        (e.detach().chunk(world_size)[rank].clone().requires_grad_(True), y.chunk(world_size)[rank])
        for e, y in chunks
    ]
    if micro_steps > 1:
        head.prepare([y for _, y in mine])
    for e, y in mine:
        (head(e, y) / micro_steps).backward()
        gradients.append(e.grad)
    head.step(0.1)
    return head.weight.detach(), torch.cat(gradients)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_accumulated_micro_batches_equal_the_big_batch(ranks, sample_rate):
    big = ranks.run(2, accumulated, sample_rate, 1)
    small = ranks.run(2, accumulated, sample_rate, 3)
    for (weight, _), (expected, _) in zip(small, big, strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-9, atol=1e-12)


def test_a_second_forward_without_prepare_is_refused():
    head = PartialFC(CosFace(), 8, 41, 0.3, row_optimizer=SGDRows())
    head(torch.randn(4, 8), torch.arange(4)).backward()
    with pytest.raises(RuntimeError, match=r"head\.prepare"):
        head(torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"num_classes": 0}, "num_classes"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"dtype": torch.int64}, "dtype"),
        ({"batch_size_per_rank": 0}, "batch_size_per_rank"),
    ],
)
def test_arguments_outside_their_domain_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        PartialFC(**{"margin": CosFace(), "embedding_size": 8, "num_classes": 4, **arguments})
