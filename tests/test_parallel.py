"""Every parallel layer and loss equals its non-parallel twin: forward and all gradients, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from arcshard.head.cross_entropy import BLOCK_ELEMENTS
from arcshard.losses import AdaFace, ArcFace, CosFace, Margin, Softmax
from arcshard.parallel import (
    ParallelArcLinear,
    ParallelArcLoss,
    ParallelCrossEntropyLoss,
    ParallelEmbedding,
    ParallelLinear,
    convert_parallel_linear,
    copy,
    gather,
    mark_split,
    parallel_splits,
    reduce,
    relocate_state_dict,
    scatter,
    split_of,
)
from arcshard.parallel.split import local_part
from arcshard.partial_fc import PartialFC
from tests.conftest import RankFailure

RANKS = [1, 2, 3, 4]  # lowest in each stack: a new size means a new process group
DIMS = [None, 0, 1, -1]


def close(actual: Tensor, expected: Tensor | None) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, tuple[Tensor, int | None]]:
    """Each parameter's gradient and the dimension it is split along."""
    splits = parallel_splits(model)
    return {
        name: (local_part(p.grad), splits[name].dim if name in splits else None)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_gradients(parts: list[dict[str, Any]], twin: nn.Module) -> None:
    """Parts of all ranks, joined, are the twin's gradients; whole ones are equal on every rank."""
    for name, parameter in twin.named_parameters():
        dim = parts[0]["gradients"][name][1]
        found = [part["gradients"][name][0] for part in parts]
        for whole in found if dim is None else [torch.cat(found, dim)]:
            close(whole, parameter.grad)


# --- linear ---------------------------------------------------------------------------------


def run_linear(rank, world_size, state, x, probe, dim, options) -> dict[str, Any]:
    out_features, in_features = state["weight"].shape
    layer = ParallelLinear(in_features, out_features, "bias" in state, dim, **options)
    layer.load_state_dict(relocate_state_dict(layer, state))
    x = x.clone().requires_grad_(True)
    y = layer(x)
    split = split_of(y)
    (y * (probe if split is None else split.take(probe))).sum().backward()
    is_split = split is not None
    return {"y": y.detach(), "split": is_split, "dx": x.grad, "gradients": gradients(layer)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("shape", "out_features"), [((5, 13), 11), ((2, 3, 7), 3), ((0, 4), 6), ((3, 2), 1)]
)
@pytest.mark.parametrize("world_size", RANKS)
def test_linear_equals_its_twin(ranks, shape, out_features, dim, bias, world_size):
    twin = nn.Linear(shape[-1], out_features, bias)
    x, probe = random(*shape), random(*shape[:-1], out_features, seed=1)
    parts = ranks.run(world_size, run_linear, twin.state_dict(), x, probe, dim, {})
    leaf = x.clone().requires_grad_(True)
    y = twin(leaf)
    (y * probe).sum().backward()
    is_split = dim in (1, -1)
    assert all(part["split"] == is_split for part in parts)
    joined = [torch.cat([part["y"] for part in parts], -1)] if is_split else [p["y"] for p in parts]
    for whole in joined:
        close(whole, y.detach())
    for part in parts:
        close(part["dx"], leaf.grad)
    assert_gradients(parts, twin)


@pytest.mark.parametrize("world_size", [2, 3])
def test_column_outputs_can_be_gathered(ranks, world_size):
    twin, x, probe = nn.Linear(5, 7), random(4, 5), random(4, 7, seed=1)
    parts = ranks.run(
        world_size, run_linear, twin.state_dict(), x, probe, 1, {"gather_output": True}
    )
    (twin(x) * probe).sum().backward()
    for part in parts:
        assert not part["split"]
        close(part["y"], twin(x).detach())
    assert_gradients(parts, twin)


def run_pair(rank, world_size, state, x) -> dict[str, Any]:
    """Column then row, nothing whole in between."""
    model = nn.Sequential(
        ParallelLinear(5, 9, dim=1), nn.ReLU(), ParallelLinear(9, 4, dim=0, input_is_split=True)
    )
    model.load_state_dict(relocate_state_dict(model, state))
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients(model)}


@pytest.mark.parametrize("world_size", RANKS)
def test_a_row_layer_takes_what_a_column_layer_leaves(ranks, world_size):
    twin = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 4))
    x = random(6, 5)
    parts = ranks.run(world_size, run_pair, twin.state_dict(), x)
    leaf = x.clone().requires_grad_(True)
    y = twin(leaf)
    y.square().sum().backward()
    for part in parts:
        close(part["y"], y.detach())
        close(part["dx"], leaf.grad)
    assert_gradients(parts, twin)


def run_convert(rank, world_size, build, x, dim) -> dict[str, Any]:
    torch.manual_seed(0)
    model = convert_parallel_linear(build().eval(), dim)
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.square().mean().backward()
    kinds = [type(module).__name__ for module in model.modules()]
    return {"y": y.detach(), "dx": x.grad, "gradients": gradients(model), "kinds": kinds}


class Reused(nn.Module):
    """One linear layer under two names, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 10), nn.LayerNorm(10), nn.GELU(), nn.Sequential(nn.Linear(10, 7), nn.ReLU())
    )


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("build", [mlp, Reused])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_a_converted_model_computes_the_same(ranks, build, dim, world_size):
    torch.manual_seed(0)
    twin, x = build(), random(5, 6)
    parts = ranks.run(world_size, run_convert, build, x, dim)
    leaf = x.clone().requires_grad_(True)
    y = twin(leaf)
    y.square().mean().backward()
    for part in parts:
        assert "Linear" not in part["kinds"]
        close(part["y"], y.detach())
        close(part["dx"], leaf.grad)
    assert_gradients(parts, twin)


def test_conversion_keeps_what_the_layer_was():
    layer = nn.Linear(4, 3, dtype=torch.float64).eval()
    layer.bias.requires_grad_(False)
    new = convert_parallel_linear(layer, 1)
    assert isinstance(new, ParallelLinear)
    assert new.weight.dtype == torch.float64
    assert not new.training
    assert (new.weight.requires_grad, new.bias.requires_grad) == (True, False)
    assert new.weight is not layer.weight


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_conversion_leaves_the_layer_its_own_values(dim):
    layer = nn.Linear(4, 3)
    new = convert_parallel_linear(layer, dim)
    for name, parameter in layer.named_parameters():
        assert torch.equal(new.get_parameter(name), parameter)
        assert new.get_parameter(name).data_ptr() != parameter.data_ptr()


def test_conversion_refuses_shared_weights():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5)})
    model["out"].weight = model["table"].weight
    with pytest.raises(ValueError, match="out shares its weights with another module"):
        convert_parallel_linear(model, 1)


@pytest.mark.parametrize("dim", [2, -2, "row", True, 0.5])
@pytest.mark.parametrize(
    "make",
    [
        lambda dim: ParallelLinear(3, 4, dim=dim),
        lambda dim: ParallelEmbedding(3, 4, dim=dim),
        lambda dim: ParallelArcLinear(3, 4, dim),
        lambda dim: convert_parallel_linear(nn.Linear(3, 4), dim),
    ],
)
def test_a_bad_dim_is_refused(make, dim):
    with pytest.raises(ValueError, match=r"dim=.*: None .* 0 \(row parallel.* 1, the same as -1"):
        make(dim)


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="gather_output=True with dim=0: only dim=1"):
        ParallelLinear(3, 4, dim=0, gather_output=True)
    with pytest.raises(ValueError, match="input_is_split=True with dim=1: only dim=0"):
        ParallelLinear(3, 4, dim=1, input_is_split=True)
    with pytest.raises(ValueError, match="out_features=0: at least 1"):
        ParallelLinear(3, 0)
    with pytest.raises(ValueError, match="should be in_features=3"):
        ParallelLinear(3, 4, dim=0)(torch.zeros(2, 5))


def initial_values(rank, world_size, dim):
    torch.manual_seed(5)
    parameters = ParallelLinear(300, 7, dim=dim).weight, ParallelLinear(3, 700, dim=dim).bias
    return [local_part(parameter.detach()) for parameter in parameters]


@pytest.mark.parametrize("dim", [0, 1])
def test_initial_values_do_not_depend_on_the_ranks(ranks, dim):
    ((weight, bias),) = ranks.run(1, initial_values, dim)
    parts = ranks.run(3, initial_values, dim)
    assert torch.equal(torch.cat([part[0] for part in parts], 1 - dim), weight)
    for part in [torch.cat([p[1] for p in parts])] if dim == 1 else [p[1] for p in parts]:
        assert torch.equal(part, bias)
    assert float(weight.abs().max()) <= 300**-0.5
    assert float(weight.std()) == pytest.approx((300 * 3) ** -0.5, rel=0.1)


# --- embedding ------------------------------------------------------------------------------


def run_embedding(rank, world_size, table, indices, probe, dim, padding_idx, gather_output=False):
    layer = ParallelEmbedding(*table.shape, padding_idx, dim, gather_output=gather_output)
    layer.load_state_dict(relocate_state_dict(layer, {"weight": table}))
    y = layer(indices)
    split = split_of(y)
    (y * (probe if split is None else split.take(probe))).sum().backward()
    return {"y": y.detach(), "split": split is not None, "gradients": gradients(layer)}


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("rows", "width", "padding_idx"), [(11, 5, None), (3, 2, -1), (1, 1, 0)])
@pytest.mark.parametrize("world_size", RANKS)
def test_embedding_equals_its_twin(ranks, rows, width, padding_idx, dim, world_size):
    twin = nn.Embedding(rows, width, padding_idx)
    indices = torch.randint(rows, (4, 3), generator=torch.Generator().manual_seed(0))
    probe = random(4, 3, width)
    parts = ranks.run(
        world_size, run_embedding, twin.weight.detach(), indices, probe, dim, padding_idx
    )
    y = twin(indices)
    (y * probe).sum().backward()
    is_split = dim in (1, -1)
    joined = [torch.cat([part["y"] for part in parts], -1)] if is_split else [p["y"] for p in parts]
    for whole in joined:
        close(whole, y.detach())
    assert_gradients(parts, twin)


def test_embedding_features_can_be_gathered(ranks):
    table, indices, probe = random(4, 5), torch.tensor([3, 0, 3]), random(3, 5, seed=1)
    parts = ranks.run(3, run_embedding, table, indices, probe, 1, None, True)
    for part in parts:
        assert not part["split"]
        close(part["y"], table[indices])


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_an_index_outside_the_table_is_an_error(dim):
    layer = ParallelEmbedding(5, 2, dim=dim)
    with pytest.raises(ValueError, match=r"index 5 \(number 1 of the input\) is outside \[0, 5\)"):
        layer(torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="padding_idx=5"):
        ParallelEmbedding(5, 2, padding_idx=5)


# --- cross-entropy --------------------------------------------------------------------------


def run_loss(rank, world_size, logits, labels, probe, num_classes, options):
    loss = ParallelCrossEntropyLoss(num_classes=num_classes, **options)
    part = loss.split.take(logits).clone().requires_grad_(True)
    value = loss(part, labels)
    before = part.detach().clone()
    (value * probe).sum().backward()
    assert torch.equal(part.detach(), before)  # the logits are the caller's
    return {"loss": value.detach(), "gradient": part.grad}


LOSSES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 2},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted, smoothed, ignored": {"weight": True, "label_smoothing": 0.3, "ignore_index": 1},
    "all of it, row by row": {
        "weight": True,
        "label_smoothing": 1.0,
        "ignore_index": 0,
        "reduction": "none",
    },
}


@pytest.mark.parametrize("num_classes", [13, 3, 1])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world_size", RANKS)
def test_cross_entropy_equals_its_twin(ranks, name, num_classes, world_size):
    options = dict(LOSSES[name])
    if "weight" in options:
        options["weight"] = torch.linspace(0.5, 2.0, num_classes)
    batch = 7
    logits, probe = 3 * random(batch, num_classes), random(batch, seed=1)
    labels = torch.randint(num_classes, (batch,), generator=torch.Generator().manual_seed(2))
    if options.get("ignore_index", -100) >= num_classes:
        options["ignore_index"] = -100
    if options.get("reduction") != "none":
        probe = torch.tensor(0.7)
    parts = ranks.run(world_size, run_loss, logits, labels, probe, num_classes, options)
    leaf = logits.clone().requires_grad_(True)
    expected = cross_entropy(leaf, labels, **options)
    (expected * probe).sum().backward()
    for part in parts:
        torch.testing.assert_close(
            part["loss"], expected.detach(), rtol=1e-6, atol=1e-6, equal_nan=True
        )
    gradient = torch.cat([part["gradient"] for part in parts], 1)
    if torch.isfinite(expected).all():  # a mean of nothing is NaN in both
        close(gradient, leaf.grad)


def test_cross_entropy_in_several_blocks_of_rows(ranks):
    """Wide enough for the rows to be visited in more than one block, the last one short."""
    num_classes, batch = BLOCK_ELEMENTS // 2, 5
    logits = random(batch, num_classes)
    labels = torch.tensor([0, num_classes - 1, num_classes // 2, 7, -100])
    options = {"label_smoothing": 0.2}
    (part,) = ranks.run(1, run_loss, logits, labels, torch.tensor(1.0), num_classes, options)
    leaf = logits.clone().requires_grad_(True)
    expected = cross_entropy(leaf, labels, **options)
    expected.backward()
    torch.testing.assert_close(part["loss"], expected.detach(), rtol=2e-6, atol=2e-6)
    close(part["gradient"], leaf.grad)


def test_large_logits_do_not_overflow(ranks):
    logits = torch.tensor([[1e4, -1e4, 0.0, 9.9e3], [-1e30, -1e30, -1e30, 1e30]])
    labels = torch.tensor([3, 3])
    parts = ranks.run(3, run_loss, logits, labels, torch.tensor(1.0), 4, {"reduction": "sum"})
    close(parts[0]["loss"], cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_summed_in_fp32(ranks, dtype):
    logits, labels = (4 * random(6, 9)).to(dtype), torch.arange(6)
    parts = ranks.run(2, run_loss, logits, labels, torch.tensor(1.0), 9, {})
    leaf = logits.float().requires_grad_(True)
    expected = cross_entropy(leaf, labels)
    expected.backward()
    for part in parts:
        assert part["loss"].dtype == torch.float32
        close(part["loss"], expected.detach())
    gradient = torch.cat([part["gradient"] for part in parts], 1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, leaf.grad.to(dtype))


def whole_logits(rank, world_size, logits, labels) -> Tensor:
    return ParallelCrossEntropyLoss(label_smoothing=0.1)(mark_split(logits, None), labels)


def test_whole_logits_need_no_other_rank(ranks):
    logits, labels = random(4, 6), torch.tensor([5, -100, 0, 1])
    for loss in ranks.run(2, whole_logits, logits, labels):
        close(loss, cross_entropy(logits, labels, label_smoothing=0.1))


@pytest.mark.parametrize("label", [5, -1, 2**40])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_label_outside_the_range_is_an_error_on_every_rank(ranks, world_size, label):
    labels = torch.tensor([0, label, -100])
    with pytest.raises(RankFailure) as caught:
        ranks.run(world_size, run_loss, random(3, 5), labels, torch.tensor(1.0), 5, {})
    assert len(caught.value.errors) == world_size
    for error in caught.value.errors.values():
        assert f"label {label} in row 1 is outside [0, 5)" in str(error)


def test_what_the_loss_cannot_know_or_take_is_an_error():
    loss = ParallelCrossEntropyLoss(num_classes=5)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="do not say whether they are all classes or a part"):
        ParallelCrossEntropyLoss()(torch.zeros(2, 5), labels)
    with pytest.raises(ValueError, match=r"rank 0 of 1 owns 5 of 5 classes"):
        loss(torch.zeros(2, 4), labels)
    with pytest.raises(ValueError, match=r"\[B, classes\] and \[B\]"):
        loss(torch.zeros(3, 5), labels)
    with pytest.raises(ValueError, match="class numbers in int64"):
        loss(torch.zeros(2, 5), labels.float())
    with pytest.raises(ValueError, match="weight has 4 numbers and the logits 5 classes"):
        ParallelCrossEntropyLoss(num_classes=5, weight=torch.ones(4))(torch.zeros(2, 5), labels)
    with pytest.raises(ValueError, match="reduction='avg': mean, sum or none"):
        ParallelCrossEntropyLoss(reduction="avg")
    with pytest.raises(ValueError, match=r"label_smoothing=1.5"):
        ParallelCrossEntropyLoss(label_smoothing=1.5)


# --- linear and loss together ---------------------------------------------------------------


def run_classifier(rank, world_size, state, x, labels, dim):
    layer = ParallelLinear(*reversed(state["weight"].shape), dim=dim)
    layer.load_state_dict(relocate_state_dict(layer, state))
    x = x.clone().requires_grad_(True)
    loss = ParallelCrossEntropyLoss(label_smoothing=0.1)(layer(x), labels)
    loss.backward()
    return {"loss": loss.detach(), "dx": x.grad, "gradients": gradients(layer)}


@pytest.mark.parametrize("num_classes", [17, 2])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world_size", RANKS)
def test_a_classifier_equals_its_twin(ranks, dim, num_classes, world_size):
    twin, x = nn.Linear(6, num_classes), random(5, 6)
    labels = torch.tensor([0, 1, num_classes - 1, -100, 0])
    parts = ranks.run(world_size, run_classifier, twin.state_dict(), x, labels, dim)
    leaf = x.clone().requires_grad_(True)
    loss = cross_entropy(twin(leaf), labels, label_smoothing=0.1)
    loss.backward()
    for part in parts:
        close(part["loss"], loss.detach())
        close(part["dx"], leaf.grad)
    assert_gradients(parts, twin)


# --- arc ------------------------------------------------------------------------------------


def run_arc(rank, world_size, weight, x, labels, dim, margin) -> dict[str, Any]:
    layer = ParallelArcLinear(weight.shape[1], weight.shape[0], dim)
    layer.load_state_dict(relocate_state_dict(layer, {"weight": weight}))
    x = x.clone().requires_grad_(True)
    loss = ParallelArcLoss(margin)(layer(x), labels)
    loss.backward()
    return {"loss": loss.detach(), "dx": x.grad, "gradients": gradients(layer)}


MARGINS = {"arcface": ArcFace(0.5, 8.0), "cosface": CosFace(0.35, 8.0)}


def arc_case(num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    weight, x = random(num_classes, 10), random(6, 10, seed=1)
    if num_classes > 4:
        weight[4] = 0.0  # a center of no length has cosine 0 and no NaN
    return weight, x, torch.tensor([0, 1, 2, num_classes - 1, 0, 1]) % num_classes


@pytest.mark.parametrize("num_classes", [11, 3])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("world_size", RANKS)
def test_arc_layers_equal_their_twin(ranks, name, dim, num_classes, world_size):
    weight, x, labels = arc_case(num_classes)
    parts = ranks.run(world_size, run_arc, weight, x, labels, dim, MARGINS[name])
    twin = nn.Module()
    twin.weight = nn.Parameter(weight.clone())
    leaf = x.clone().requires_grad_(True)
    cosines = normalize(leaf) @ normalize(twin.weight).t()
    loss = cross_entropy(MARGINS[name].logits(cosines, labels), labels)
    loss.backward()
    for part in parts:
        close(part["loss"], loss.detach())
        close(part["dx"], leaf.grad)
    split_dim = parts[0]["gradients"]["weight"][1]
    found = [part["gradients"]["weight"][0] for part in parts]
    for whole in found if split_dim is None else [torch.cat(found, split_dim)]:
        if num_classes > 4:  # the center of no length: its direction, hence its slope, is no one's
            assert torch.isfinite(whole[4]).all()
            whole[4] = twin.weight.grad[4] = 0.0
        close(whole, twin.weight.grad)


def run_partial_fc(rank, world_size, weight, x, labels, margin) -> dict[str, Any]:
    """Rank 0 brings all rows: the same global batch as a gathered one."""
    head = PartialFC(margin, weight.shape[1], len(weight), row_optimizer=None)
    with torch.no_grad():
        head.weight.copy_(weight[head.class_range.start : head.class_range.stop])
    rows = slice(None) if rank == 0 else slice(0, 0)
    x = x[rows].clone().requires_grad_(True)
    loss = head(x, labels[rows])
    loss.backward()
    return {"loss": loss.detach(), "dx": x.grad, "gradient": head.weight.grad}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_size", [1, 3])
def test_arc_layers_equal_partial_fc(ranks, dim, world_size):
    weight, x, labels = random(11, 10), random(6, 10, seed=1), torch.tensor([0, 10, 3, 3, 7, 5])
    margin: Margin = ArcFace(0.5, 8.0)
    ours = ranks.run(world_size, run_arc, weight, x, labels, dim, margin)
    theirs = ranks.run(world_size, run_partial_fc, weight, x, labels, margin)
    close(ours[0]["loss"], theirs[0]["loss"])
    close(ours[0]["dx"], theirs[0]["dx"])
    joined = torch.cat([part["gradients"]["weight"][0] for part in ours], 1 - dim)
    close(joined, torch.cat([part["gradient"] for part in theirs]))


def test_margins_that_need_more_than_cosines_are_sent_to_partial_fc():
    for margin in (AdaFace(), Softmax()):
        with pytest.raises(ValueError, match="PartialFC serves it"):
            ParallelArcLoss(margin)


# --- collectives ----------------------------------------------------------------------------


def run_collectives(rank, world_size, x, batch_sizes) -> dict[str, Any]:
    """f(x) = sum of (x w_rank)^2 over ranks, once per way of moving x; all gradients whole."""
    leaf = x.clone().requires_grad_(True)
    total = reduce((copy(leaf) * (rank + 1)).square().sum())
    total.backward()
    back = x.clone().requires_grad_(True)
    there = gather(scatter(back, 1), 1)
    (there * x.cos()).sum().backward()
    start = sum(batch_sizes[:rank])
    rows = x[start : start + batch_sizes[rank]].clone().requires_grad_(True)
    whole = gather(rows, 0)
    (whole * x.sin()).sum().backward()
    scaled = rows.detach().clone().requires_grad_(True)
    gather(scaled, 0, under_ddp=True).sum().backward()
    labels = gather(torch.arange(start, start + batch_sizes[rank]), 0)
    return {
        "total": total.detach(),
        "copy": leaf.grad,
        "there": there.detach(),
        "back": back.grad,
        "whole": whole.detach(),
        "rows": rows.grad,
        "scaled": scaled.grad,
        "labels": labels,
    }


@pytest.mark.parametrize("world_size", RANKS)
def test_collectives_carry_whole_values_and_whole_gradients(ranks, world_size):
    sizes = [3, 0, 4, 1][:world_size]
    x = random(sum(sizes), 5)
    parts = ranks.run(world_size, run_collectives, x, sizes)
    factor = sum((rank + 1) ** 2 for rank in range(world_size))
    for rank, part in enumerate(parts):
        torch.testing.assert_close(part["total"], factor * x.square().sum())
        torch.testing.assert_close(part["copy"], 2 * factor * x)
        assert torch.equal(part["there"], x)
        assert torch.equal(part["back"], x.cos())
        assert torch.equal(part["whole"], x)
        start = sum(sizes[:rank])
        assert torch.equal(part["rows"], x.sin()[start : start + sizes[rank]])
        assert torch.equal(part["scaled"], torch.full((sizes[rank], 5), float(world_size)))
        assert part["labels"].tolist() == list(range(sum(sizes)))


def gather_with_wrong_sizes(rank, world_size) -> None:
    gather(torch.zeros(2, 3), 0, sizes=[1, 1])


def test_sizes_that_are_not_this_ranks_are_an_error(ranks):
    with pytest.raises(RankFailure, match=r"sizes=\[1, 1\] on rank 1 of 2, whose part is 2 long"):
        ranks.run(2, gather_with_wrong_sizes)
