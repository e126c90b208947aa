"""Model groups beside data groups, DDP, ZeRO, FSDP2 and AMP: the same steps as one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from arcshard.parallel import (
    Groups,
    ParallelCrossEntropyLoss,
    ParallelLinear,
    collect_state_dict,
    gather,
    init_process_group,
    parallel_splits,
    register_ddp_parameters_to_ignore,
    relocate_state_dict,
)
from tests.conftest import RankFailure

NUM_CLASSES, WIDTH, STEPS = 7, 11, 3  # on 2, 3 and 4 ranks no part is empty, which FSDP2 refuses


class Classifier(nn.Module):
    """A backbone, and a classifier that sees the rows of its whole model group."""

    def __init__(self, dim: int | None, groups: Groups) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.fc = ParallelLinear(WIDTH, NUM_CLASSES, dim=dim, process_group=groups.model)
        self.group = groups.model

    def forward(self, x: Tensor) -> Tensor:
        embeddings = gather(self.backbone(x), 0, self.group, under_ddp=True)
        return self.fc(embeddings)


def twin() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh()),
            "fc": nn.Linear(WIDTH, NUM_CLASSES),
        }
    )


def batches(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """STEPS global batches of sum(sizes) rows."""
    generator = torch.Generator().manual_seed(1)
    count = sum(sizes)
    return [
        (
            torch.randn(count, 4, generator=generator),
            torch.randint(NUM_CLASSES, (count,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def optimizers(kind, model, groups):
    options = {"lr": 0.1, "momentum": 0.9}
    if kind == "sgd":
        return [torch.optim.SGD(model.parameters(), **options)]
    splits = parallel_splits(model)
    split = [p for name, p in model.named_parameters() if name in splits]
    whole = [p for name, p in model.named_parameters() if name not in splits]
    made = [ZeroRedundancyOptimizer(whole, torch.optim.SGD, **options)]
    if split:  # ZeroRedundancyOptimizer takes no DTensor; the state of parts is split already
        made.append(torch.optim.SGD(split, **options))
    return made


def train(rank, world_size, state, sizes, group_size, dim, kind, accumulate=False):
    """STEPS steps under DDP; (losses, the whole state on rank 0)."""
    groups = init_process_group(group_size)
    torch.manual_seed(rank)  # every rank starts elsewhere; loading and DDP bring them together
    model = Classifier(dim, groups)
    if dist.get_rank(groups.data) == 0:
        model.load_state_dict(relocate_state_dict(model, state))
    register_ddp_parameters_to_ignore(model, groups.data)
    ddp = DistributedDataParallel(model)
    chosen = optimizers(kind, model, groups)
    loss_of = ParallelCrossEntropyLoss()
    start = sum(sizes[:rank])
    losses = []
    for x, labels in batches(sizes):
        mine = slice(start, start + sizes[rank])
        whole_labels = gather(labels[mine], 0, groups.model)
        if accumulate:
            with ddp.no_sync():
                (loss_of(ddp(x[mine]), whole_labels) / 2).backward()
        loss = loss_of(ddp(x[mine]), whole_labels)
        (loss / 2 if accumulate else loss).backward()
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), collect_state_dict(model)


def train_twin(state, sizes, group_size):
    """The same on one process: the mean over model groups of the mean over their rows."""
    model = twin()
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for x, labels in batches(sizes):
        logits = model["fc"](model["backbone"](x))
        rows = [sum(sizes[k : k + group_size]) for k in range(0, len(sizes), group_size)]
        groups = [
            cross_entropy(a, b) for a, b in zip(logits.split(rows), labels.split(rows), strict=True)
        ]
        torch.stack(groups).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(torch.stack(groups).detach())
    return torch.stack(losses), model.state_dict()


def assert_same(parts: list[Any], state: dict[str, Tensor], sizes: list[int], group_size: int):
    losses, expected = train_twin(state, sizes, group_size)
    for rank, (found, _) in enumerate(parts):
        torch.testing.assert_close(found, losses[:, rank // group_size], rtol=1e-6, atol=1e-6)
    found = parts[0][1]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


LAYOUTS = [(2, 2), (2, 1), (3, 3), (4, 4), (4, 2)]


@pytest.mark.parametrize("kind", ["sgd", "zero"])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize(("world_size", "group_size"), LAYOUTS)
def test_steps_under_ddp_equal_one_process(ranks, world_size, group_size, dim, kind):
    """Ragged batches; 4 ranks in groups of 2 are 2-way model x 2-way data."""
    sizes, state = [3, 2, 4, 1][:world_size], twin().state_dict()
    parts = ranks.run(world_size, train, state, sizes, group_size, dim, kind)
    assert_same(parts, state, sizes, group_size)


@pytest.mark.parametrize("dim", [0, 1])
def test_accumulated_gradients_are_averaged_once(ranks, dim):
    sizes, state = [2, 2, 2, 2], twin().state_dict()
    parts = ranks.run(4, train, state, sizes, 2, dim, "sgd", True)
    assert_same(parts, state, sizes, 2)


def train_fsdp(rank, world_size, state, sizes, group_size, dim):
    """FSDP2 over the data groups; each model group trains on the same rows."""
    groups = init_process_group(group_size)
    model = nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh()),
            "fc": ParallelLinear(WIDTH, NUM_CLASSES, dim=dim, process_group=groups.model),
        }
    )
    mesh = groups.mesh["data"]
    fully_shard(model["fc"], mesh=mesh)
    fully_shard(model["backbone"], mesh=mesh)
    model.load_state_dict(relocate_state_dict(model, state))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses, loss_of = [], ParallelCrossEntropyLoss()
    replica = rank // group_size
    start = sum(sizes[: replica * group_size])
    mine = slice(start, start + sum(sizes[replica * group_size : (replica + 1) * group_size]))
    for x, labels in batches(sizes):
        loss = loss_of(model["fc"](model["backbone"](x[mine])), labels[mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), collect_state_dict(model)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("group_size", [2, 4])
def test_steps_under_fsdp2_equal_one_process(ranks, group_size, dim):
    sizes, state = [3, 2, 4, 1], twin().state_dict()
    parts = ranks.run(4, train_fsdp, state, sizes, group_size, dim)
    assert_same(parts, state, sizes, group_size)


# --- AMP ------------------------------------------------------------------------------------


def run_amp(rank, world_size, state, x, labels, dim):
    fc = ParallelLinear(WIDTH, NUM_CLASSES, dim=dim)
    fc.load_state_dict(relocate_state_dict(fc, state))
    x = x.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fc(x)
        loss = ParallelCrossEntropyLoss()(logits, labels)
    loss.backward()
    return {
        "dtypes": (logits.dtype, loss.dtype, fc.weight.grad.dtype, x.grad.dtype),
        "loss": loss.detach(),
        "dx": x.grad,
    }


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("world_size", [1, 3])
def test_autocast_computes_in_half_and_keeps_the_loss_in_fp32(ranks, world_size, dim):
    fc, x = nn.Linear(WIDTH, NUM_CLASSES), torch.randn(6, WIDTH)
    labels = torch.tensor([0, 1, 2, 3, 6, -100])
    leaf = x.clone().requires_grad_(True)
    loss = cross_entropy(fc(leaf), labels)
    loss.backward()
    half, full = torch.bfloat16, torch.float32
    for part in ranks.run(world_size, run_amp, fc.state_dict(), x, labels, dim):
        assert part["dtypes"] == (half, full, full, full)
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(part["dx"], leaf.grad, rtol=0.05, atol=0.02)


def overflow_on_one_rank(rank, world_size):
    """A loss scaler that asks the other ranks: all skip the step, or none."""
    torch.manual_seed(0)
    fc = ParallelLinear(4, 6, dim=1)
    before = fc.weight.to_local().detach().clone()
    optimizer = torch.optim.SGD(fc.parameters(), 0.1)
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0, process_group=dist.group.WORLD)
    loss = ParallelCrossEntropyLoss()(fc(torch.ones(2, 4)), torch.tensor([0, 5]))
    scaler.scale(loss).backward()
    if rank == 1:
        fc.weight.grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(fc.weight.to_local(), before), scaler.get_scale()


def test_an_overflow_of_one_part_skips_the_step_on_all(ranks):
    assert ranks.run(3, overflow_on_one_rank) == [(True, 4.0)] * 3


# --- groups ---------------------------------------------------------------------------------


def members(rank, world_size, group_size) -> tuple[list[int], list[int]]:
    groups = init_process_group(group_size)
    return dist.get_process_group_ranks(groups.model), dist.get_process_group_ranks(groups.data)


def test_groups_are_consecutive_ranks_and_their_copies(ranks):
    expected = [([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3])]
    assert ranks.run(4, members, 2) == expected
    assert ranks.run(3, members, None) == [([0, 1, 2], [rank]) for rank in range(3)]


@pytest.mark.parametrize(("world_size", "group_size"), [(3, 2), (4, 3), (2, 4), (2, 0)])
def test_a_group_size_that_does_not_divide_the_world_is_an_error(ranks, world_size, group_size):
    with pytest.raises(RankFailure) as caught:
        ranks.run(world_size, members, group_size)
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for error in caught.value.errors.values():
        assert isinstance(error, ValueError)
        assert f"group_size={group_size} does not divide {world_size} ranks" in str(error)
        assert f"one of {divisors}" in str(error)


def test_one_process_needs_no_groups():
    assert init_process_group() == Groups(None, None, None)
    with pytest.raises(ValueError, match="group_size=2 does not divide 1 ranks"):
        init_process_group(2)


def forget_data_group(rank, world_size) -> None:
    groups = init_process_group(2)
    register_ddp_parameters_to_ignore(ParallelLinear(3, 4, dim=1, process_group=groups.model))


def test_copies_that_would_drift_apart_are_an_error(ranks):
    with pytest.raises(RankFailure, match="weight is split over 2 of 4 ranks and the data group"):
        ranks.run(4, forget_data_group)


def ignored(rank, world_size, group_size) -> list[str]:
    groups = init_process_group(group_size)
    model = nn.Sequential(
        nn.Linear(2, 3),
        ParallelLinear(3, 4, dim=1, process_group=groups.model),
        ParallelLinear(4, 2, dim=0, process_group=groups.model),
    )
    return register_ddp_parameters_to_ignore(model, groups.data)


def test_ddp_ignores_split_parameters_only(ranks):
    assert ranks.run(2, ignored, 2) == [["1.weight", "1.bias", "2.weight"]] * 2
    assert ranks.run(2, ignored, 1) == [[]] * 2  # a group of one holds all of it


def ddp_of_one_layer(rank, world_size):
    """The model is the parallel layer itself: names without a module in front."""
    torch.manual_seed(rank)
    layer = ParallelLinear(3, 4, dim=0)
    before = layer.weight.detach().clone()
    register_ddp_parameters_to_ignore(layer)
    ddp = DistributedDataParallel(layer)
    assert torch.equal(layer.weight, before)
    ddp(torch.ones(2, 3)).sum().backward()
    return layer.bias.detach()


def test_a_parallel_layer_may_be_the_whole_model(ranks):
    first, second = ranks.run(2, ddp_of_one_layer)
    assert torch.equal(first, second)
