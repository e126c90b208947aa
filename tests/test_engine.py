"""The engine: every loss equals its dense twin, whatever the blocks, ranks and sample rate."""

from __future__ import annotations

import copy
import itertools
import math
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.head.workspace import BlockCost, Workspace, plan_blocks
from arcshard.losses import (
    AdaFace,
    ArcFace,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    NormFace,
    Softmax,
)
from arcshard.partial_fc import PartialFC
from arcshard.random import hash_key
from tests.conftest import RankFailure
from tests.reference import dense_loss_by_paper
from tests.run_helpers import PATHS, batch_for, loss_and_gradients

NUM_CLASSES, WIDTH, SEED = 37, 8, 3
SIZES = [5, 3, 0, 4]  # ragged, one rank without a row

LOSSES = {
    "softmax": (Softmax(), 1),
    "softmax with bias": (Softmax(scale=2.0, bias=True), 1),
    "softmax, normalized, with bias": (Softmax(scale=8.0, normalize=True, bias=True), 1),
    "normface": (NormFace(16.0), 1),
    "normface, scale above 64": (NormFace(96.0), 1),
    "adaface": (AdaFace(0.4, scale=16.0, t_alpha=0.9), 1),
    "magface": (MagFace(1.0, 4.0, 0.3, 0.8, 2.0, 16.0), 1),
    "curricularface": (CurricularFace(0.3, 0.5, 16.0), 1),
    "elasticface_arc": (ElasticFace("arc", 0.4, 0.1, scale=16.0), 1),
    "elasticface_cos": (ElasticFace("cos", 0.3, 0.1, scale=16.0), 1),
    "elasticface_arc+": (ElasticFace("arc", 0.4, 0.1, plus=True, scale=16.0), 1),
    "subcenter_arcface": (ArcFace(0.4, 16.0), 3),
    "subcenter_curricularface": (CurricularFace(0.3, 0.5, 16.0), 2),
    "subcenter_softmax with bias": (Softmax(bias=True), 2),
    "subcenter_cosface_filtered": (CosFace(0.4, 16.0, interclass_filtering_threshold=0.3), 2),
}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("path", ["autograd", "fused, blocks of a few classes", "deferred"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_its_dense_twin(ranks, name, path, sample_rate, world_size):
    margin, k = LOSSES[name]
    sizes = SIZES[:world_size]
    way, options = PATHS[path]
    parts = ranks.run(
        world_size,
        loss_and_gradients,
        margin,
        NUM_CLASSES,
        sizes,
        sample_rate,
        WIDTH,
        way,
        {**options, "centers_per_class": k},
    )
    _, _, embeddings, labels = batch_for(0, sizes, NUM_CLASSES, WIDTH)
    embeddings.requires_grad_(True)
    weight = torch.cat([part["weight"] for part in parts]).requires_grad_(True)
    bias = None
    if margin.bias:
        bias = torch.cat([part["bias"] for part in parts]).double().requires_grad_(True)
    capacity = max(sizes)  # draws go to the rows of the gathered, padded batch
    generator = torch.Generator().manual_seed(hash_key(SEED, 0xD4A3, 0))
    drawn = torch.randn(capacity * world_size, generator=generator, dtype=torch.float64)
    places = [rank * capacity + row for rank, size in enumerate(sizes) for row in range(size)]
    margins_drawn = None
    if isinstance(margin, ElasticFace):
        margins_drawn = margin.margin + margin.std * drawn[places]
    loss, state = dense_loss_by_paper(
        margin,
        embeddings,
        labels,
        weight,
        bias=bias,
        centers_per_class=k,
        classes=torch.cat([part["classes"] for part in parts]),
        margins_drawn=margins_drawn,
    )
    loss.backward()

    for part in parts:
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
        for key, value in state.items():
            assert abs(float(part["state"][f"margin_{key}"]) - value) < 1e-12
    for key, expected in (("weight", weight), ("embeddings", embeddings), ("bias", bias)):
        if expected is None:
            continue
        gradient = torch.cat([part[f"grad_{key}"] for part in parts])
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-8, atol=1e-11)


def steps(
    rank: int, world_size: int, rule: str, sample_rate: float, options: dict[str, Any], path: str
) -> dict[str, torch.Tensor]:
    """Weight and state after 12 steps on changing batches."""
    update = SGDRows(0.9, 1e-2) if rule == "sgd" else AdamWRows(weight_decay=1e-2)
    head = PartialFC(
        CosFace(0.2, 8.0),
        8,
        41,
        sample_rate,
        row_optimizer=update,
        dtype=torch.float64,
        seed=1,
        update="autograd" if path == "autograd" else "fused",
        **options,
    )
    for step in range(12):
        embeddings, labels, _, _ = batch_for(rank, [3] * world_size, 41, 8, seed=step)
        rate = 0.1 / (1 + step)
        head(embeddings, labels, rate if path == "fused" else None).backward()
        head.step(rate)
    state = update.state(head.weight)
    return {"weight": head.weight.detach().clone(), **{k: v.clone() for k, v in state.items()}}


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_12_steps_end_where_the_readable_path_ends(ranks, rule, sample_rate):
    expected = ranks.run(2, steps, rule, sample_rate, {}, "autograd")
    settings = [{}, {"workspace_mib": 0.006}]
    if sample_rate < 1:
        settings.append({"center_device": "cpu"})  # host memory serves sampled centers
    for options, path in itertools.product(settings, ("fused", "deferred")):
        ours = ranks.run(2, steps, rule, sample_rate, options, path)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def one_step(head: PartialFC, scale: float = 1.0, bad: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    embeddings = torch.randn(6, 8, generator=generator, requires_grad=True)
    labels = torch.randint(41, (6,), generator=generator)
    (head(embeddings, labels) * scale).backward()
    head.step(0.1, bad, torch.tensor(scale))
    return head.weight.detach().clone()


def test_a_loss_scale_is_taken_out_and_a_veto_after_backward_holds():
    def make() -> PartialFC:
        return PartialFC(CosFace(), 8, 41, row_optimizer=AdamWRows())

    before = make().weight.detach()
    torch.testing.assert_close(one_step(make(), 1024.0), one_step(make()), rtol=1e-6, atol=1e-7)
    assert torch.equal(one_step(make(), 1024.0, torch.tensor(True)), before)
    assert not torch.equal(one_step(make(), 1024.0, torch.tensor(False)), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_embeddings_move_no_center_no_state_and_no_running_value(bad):
    head = PartialFC(AdaFace(), 8, 41, 0.3, row_optimizer=AdamWRows())
    embeddings = torch.randn(6, 8)
    embeddings[2, 3] = bad
    embeddings.requires_grad_(True)
    before = [tensor.clone() for tensor in (head.weight, *head.buffers())]
    loss = head(embeddings, torch.arange(6), 0.1)
    assert not torch.isfinite(loss)
    loss.backward()
    head.step(0.1, ~torch.isfinite(loss))
    for tensor, kept in zip((head.weight, *head.buffers()), before, strict=True):
        assert torch.equal(tensor, kept)
    assert all(not part.any() for part in head.row_optimizer.state(head.weight).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_finite_at_the_ends_of_the_cosine(name, dtype):
    """Embeddings on, opposite to, and one ulp from their own center and another's."""
    margin, k = LOSSES[name]
    half = dtype if dtype == torch.bfloat16 else None
    head = PartialFC(
        margin, 8, 6, row_optimizer=SGDRows(0, 0), half=half, centers_per_class=k, seed=SEED
    )
    centers = head.weight.detach().view(6, k, 8)[:, 0].clone()
    rows = [sign * centers[c] for c in (0, 1) for sign in (1.0, -1.0)]
    up = torch.tensor(2.0)
    rows += [torch.nextafter(row, row.sign() * up) for row in rows]
    rows += [torch.eye(8)[0] * torch.finfo(torch.float32).tiny, torch.zeros(8)]
    embeddings = torch.stack(rows).to(dtype).requires_grad_(True)
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 1, 1, 2, 3])
    loss = head(embeddings, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embeddings.grad).all()
    head.step(1.0)
    assert torch.isfinite(head.weight).all()
    for value in (-1.0, 1.0):
        cosine = torch.full((10,), value, dtype=dtype)
        inner = torch.nextafter(cosine, torch.zeros_like(cosine))
        context = {"quality": torch.zeros(10), "margin": torch.full((10,), 0.4)}
        context |= {"t": torch.tensor(0.3), "threshold": torch.full((10,), 0.5)}
        context["slope"] = torch.ones(10)
        for point in (cosine, inner):
            for part in margin.target(point, context):
                assert torch.isfinite(part).all()


@pytest.mark.parametrize("update", ["fused", "autograd"])
def test_bf16_matmuls_are_as_accurate_as_torchs_own_bf16_dense_head(update):
    generator = torch.Generator().manual_seed(0)
    batch, width, classes = 64, 128, 2000
    embeddings = torch.randn(batch, width, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    weight = torch.randn(classes, width, generator=generator) * 0.01

    def ours(dtype: torch.dtype, half: torch.dtype | None) -> list[torch.Tensor]:
        head = PartialFC(
            CosFace(0.2, 16.0),
            width,
            classes,
            row_optimizer=SGDRows(0, 0),
            dtype=dtype,
            half=half,
            update=update,
        )
        head.weight.data.copy_(weight)
        e = embeddings.clone().to(dtype).requires_grad_(True)
        loss = head(e, labels)
        loss.backward()
        head.step(1.0)
        return [loss.detach(), e.grad, weight.to(dtype) - head.weight.detach()]

    e = embeddings.clone().requires_grad_(True)
    w = weight.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine = torch.nn.functional.linear(
            torch.nn.functional.normalize(e), torch.nn.functional.normalize(w)
        )
        shifted = cosine.float() - 0.2 * torch.nn.functional.one_hot(labels, classes)
        dense = torch.nn.functional.cross_entropy(16.0 * shifted, labels)
    dense.backward()
    truth = ours(torch.float64, None)
    half = ours(torch.float32, torch.bfloat16)
    for exact, mine, torchs in zip(truth, half, [dense.detach(), e.grad, w.grad], strict=True):
        error, allowed = ((x.double() - exact).norm() for x in (mine, torchs))
        assert error <= 2 * allowed
        assert error > 0  # it really was computed in bf16


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_bf16_state_and_centers_follow_fp32_within_their_rounding(rule):
    """300 steps towards fixed labels: the loss ends where fp32's ends, within a tenth."""
    ends = {}
    for name, dtype, state in (
        ("fp32", torch.float32, None),
        ("state", torch.float32, torch.bfloat16),
        ("both", torch.bfloat16, torch.bfloat16),
    ):
        rule_ = SGDRows(0.9, 1e-4, state) if rule == "sgd" else AdamWRows(state_dtype=state)
        head = PartialFC(CosFace(0.1, 8.0), 16, 50, row_optimizer=rule_, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(50, 16, generator=generator, requires_grad=True)
        for _ in range(300):
            loss = head(embeddings, torch.arange(50), 0.02)
            loss.backward()
            head.step(0.02)
        ends[name] = float(loss.detach())
        if name == "both":
            assert head.weight.dtype == torch.bfloat16
    start = 3.9
    for name in ("state", "both"):
        assert abs(ends[name] - ends["fp32"]) <= 0.1 * (start - ends["fp32"])


@settings(deadline=None)
@given(
    st.integers(0, 5000),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 4),
    st.integers(1, 1 << 22),
    st.booleans(),
    st.sampled_from([1 / 16, 1 / 8, 1 / 2]),
)
def test_blocks_cover_all_rows_in_whole_classes_within_the_budget(
    classes, batch, width, k, budget, copies, share
):
    cost = BlockCost(8 * batch + 12 * width + 4, 4 * batch + 4, 4 * width * copies)
    if cost.work * k > budget:
        with pytest.raises(ValueError, match="head_workspace_mib"):
            plan_blocks(classes * k, cost, Workspace(budget, int(budget * share)), k)
        return
    plan = plan_blocks(classes * k, cost, Workspace(budget, int(budget * share)), k)
    blocks = plan.blocks()
    assert [a for a, _ in blocks[1:]] == [b for _, b in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, classes * k) if blocks else classes == 0
    assert all(a % k == 0 and b % k == 0 for a, b in blocks)
    assert plan.total_bytes <= budget
    assert plan.kept_rows in {0, classes * k} or plan.kept_rows % plan.rows_per_block == 0
    aligned = plan.rows_per_block % (8 * k) == 0
    assert aligned or len(blocks) <= 1 or plan.rows_per_block < 8 * k


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, while they live."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                key = storage._cdata
                if key not in self.known and key not in self.live and storage.nbytes():
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("rule", "sample_rate", "options"),
    [
        (SGDRows(), 1.0, {}),
        (SGDRows(), 0.2, {}),
        (AdamWRows(), 1.0, {}),
        (AdamWRows(), 0.2, {}),
        (SGDRows(), 1.0, {"half": BF16}),
        (SGDRows(state_dtype=BF16), 1.0, {}),
        (SGDRows(state_dtype=BF16), 1.0, {"dtype": BF16}),
        (AdamWRows(state_dtype=BF16), 0.2, {"dtype": BF16, "half": BF16}),
        (SGDRows(), 1.0, {"margin": CurricularFace()}),
        (SGDRows(), 1.0, {"margin": CosFace(interclass_filtering_threshold=0.3)}),
        (SGDRows(), 1.0, {"centers_per_class": 3}),
        (SGDRows(), 0.2, {"centers_per_class": 3, "half": BF16}),
    ],
    ids=lambda value: re.sub(r" object at 0x\w+", "", str(value)),
)
@pytest.mark.parametrize("mib", [3, 12])  # blocks and, with 12, numerators that are all kept
@pytest.mark.parametrize("learning_rate", [None, 0.1])
def test_all_that_lives_during_a_step_fits_the_work_buffer(
    rule, sample_rate, options, mib, learning_rate
):
    batch, width, num_classes = 64, 64, 15_000
    rule = copy.deepcopy(rule)
    head = PartialFC(
        **{
            "margin": CosFace(),
            "embedding_size": width,
            "num_classes": num_classes,
            "sample_rate": sample_rate,
            "row_optimizer": rule,
            "batch_size_per_rank": batch,
            "workspace_mib": mib,
            **options,
        }
    )
    known = [head.weight, *rule.state(head.weight).values()]
    embeddings = torch.randn(batch, width, requires_grad=True)
    labels = torch.randint(num_classes, (batch,))
    with LiveBytes(known) as memory:
        for _ in range(2):
            head(embeddings, labels, learning_rate).backward()
            head.step(0.1)
    sampling = 200 * 8 + num_classes * sample_rate * 8 * 4 if sample_rate < 1 else 0
    assert memory.peak <= mib * 2**20 + 40 * batch * width * 4 + sampling
    assert memory.peak > 2**20


@pytest.mark.parametrize("workspace_mib", [256, 0.02, 0.006])
@pytest.mark.parametrize("sizes", [(8, 4), (4, 8), (8, 4, 2), (4, 4)])
@pytest.mark.parametrize("k", [1, 2])
def test_micro_batches_of_any_size_add_up(sizes, k, workspace_mib):
    """Each with a backward of its own, or all with one; no batch size announced."""

    def moved(update: Any, together: bool) -> torch.Tensor:
        head = PartialFC(
            CosFace(0.2, 8.0),
            8,
            41,
            row_optimizer=SGDRows(),
            dtype=torch.float64,
            update=update,
            workspace_mib=workspace_mib,
            centers_per_class=k,
        )
        losses = []
        for number, size in enumerate(sizes):
            embeddings, labels, _, _ = batch_for(0, [size], 41, 8, seed=number)
            losses.append(head(embeddings, labels))
            if not together:
                losses[-1].backward()
        if together:
            sum(losses).backward()
        head.step(0.1)
        return head.weight.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as resizing an `out`
        for together in (False, True):
            torch.testing.assert_close(
                moved("fused", together), moved("autograd", together), rtol=1e-9, atol=1e-12
            )


def test_backward_and_step_inside_autocast_compute_as_outside():
    def moved(inside: bool) -> list[Any]:
        head = PartialFC(ArcFace(), 64, 300, row_optimizer=SGDRows())
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(16, 64, generator=generator, requires_grad=True)
        loss = head(embeddings, torch.arange(16))
        with torch.autocast("cpu", dtype=BF16, enabled=inside):
            loss.backward()
            head.step(0.1)
        return [embeddings.grad, head.weight.detach()]

    for inside, outside in zip(moved(True), moved(False), strict=True):
        assert torch.equal(inside, outside)


def test_no_matrix_of_batch_times_classes_and_no_gradient_of_the_centers_exists():
    """The largest tensor that any operator makes is a matrix of one block, or the blocks' sums."""

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            out = function(*arguments, **(options or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor):
                    storage = one.untyped_storage()
                    if storage.nbytes() and storage.data_ptr() not in known:
                        Largest.bytes = max(Largest.bytes, storage.nbytes())
            return out

    rule = SGDRows()
    head = PartialFC(
        CosFace(), 64, 20_000, row_optimizer=rule, batch_size_per_rank=64, workspace_mib=1
    )
    state = rule.state(head.weight)
    known = {t.untyped_storage().data_ptr() for t in (head.weight, *state.values())}
    embeddings, labels = torch.randn(64, 64, requires_grad=True), torch.randint(20_000, (64,))
    with Largest():
        head(embeddings, labels, 0.1).backward()
        head.step(0.1)
        loss = head(embeddings, labels)
        loss.backward()
        head.step(0.1)
    plan = head.planned_blocks()
    slots = len(plan.blocks()) + 1  # of sums, [blocks + 1, B]
    assert Largest.bytes == 64 * 4 * max(plan.rows_per_block, slots) <= 2**17
    assert head.weight.grad is None


def test_two_losses_in_one_step_add_up_without_a_learning_rate_and_are_refused_with_one():
    def make() -> PartialFC:
        return PartialFC(CosFace(), 8, 41, row_optimizer=SGDRows(), dtype=torch.float64)

    batches = [batch_for(0, [4], 41, 8, seed=s)[:2] for s in (0, 1)]
    ours, readable = make(), make()
    readable.fused, readable.update = None, "autograd"
    for head in (ours, readable):
        sum(head(e, y) for e, y in batches).backward()
        head.step(0.1)
    torch.testing.assert_close(ours.weight, readable.weight, rtol=1e-9, atol=1e-12)

    head = make()
    losses = [head(e, y, 0.1) for e, y in batches]
    with pytest.raises(RuntimeError, match="leave learning_rate out"):
        sum(losses).backward()


def test_a_second_backward_and_a_step_without_one_are_refused():
    head = PartialFC(CosFace(), 8, 41, row_optimizer=SGDRows())
    with pytest.raises(RuntimeError, match=r"loss\.backward"):
        head.step(0.1)
    loss = head(torch.randn(4, 8, requires_grad=True), torch.arange(4), 0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_frozen_backbone_trains_the_centers_alone():
    head = PartialFC(CosFace(), 8, 41, row_optimizer=SGDRows())
    before = head.weight.detach().clone()
    head(torch.randn(4, 8), torch.arange(4), 0.1).backward()
    head.step(0.1)
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("margin", [ElasticFace(), Softmax(bias=True)])
def test_a_saved_head_goes_on_as_if_it_had_not_been_interrupted(margin):
    def run(stop: int | None) -> torch.Tensor:
        def make() -> PartialFC:
            rule = SGDRows(state_dtype=torch.bfloat16)
            return PartialFC(margin, 8, 301, 0.1, row_optimizer=rule)

        head = make()
        for step in range(8):
            if step == stop:
                saved, old = head.state_dict(), head.optimized_parameters()
                head = make()
                head.load_state_dict(saved)
                for (new, new_rule), (was, rule) in zip(
                    head.optimized_parameters(), old, strict=True
                ):
                    for name, part in new_rule.state(new).items():
                        part.copy_(rule.state(was)[name])
            embeddings, labels, _, _ = batch_for(0, [6], 301, 8, seed=step)
            head(embeddings.detach().float().requires_grad_(True), labels, 0.1).backward()
            head.step(0.1)
        return head.weight.detach()

    assert torch.equal(run(None), run(4))


def too_small(rank: int, world_size: int, capacity: int | None) -> None:
    head = PartialFC(
        CosFace(), 8, 41, row_optimizer=SGDRows(), workspace_mib=1e-4, batch_size_per_rank=capacity
    )
    head(torch.randn(4, 8), torch.arange(4))


@pytest.mark.parametrize("capacity", [None, 4])
def test_every_rank_refuses_a_buffer_too_small_for_one_class(ranks, capacity):
    with pytest.raises(RankFailure, match="does not hold one class") as failure:
        ranks.run(2, too_small, capacity)
    assert all(isinstance(error, ValueError) for error in failure.value.errors.values())
    assert sorted(failure.value.errors) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"centers_per_class": 0}, "centers_per_class"),
        ({"workspace_mib": 0}, "workspace_mib"),
        ({"update": "magic"}, "fused or autograd"),
        ({"update": "fused", "row_optimizer": None}, "row_optimizer"),
        ({"half": torch.float16}, "bfloat16"),
        ({"center_device": "cpu", "sample_rate": 1.0}, "sample_rate < 1"),
        ({"dtype": torch.bfloat16, "update": "autograd"}, "bfloat16"),
        ({"dtype": torch.float16}, "float32"),
        ({"dtype": torch.float64, "row_optimizer": SGDRows(state_dtype=BF16)}, "state_dtype"),
    ],
)
def test_arguments_of_the_engine_outside_their_domain_are_refused(arguments, words):
    common = {
        "margin": CosFace(),
        "embedding_size": 8,
        "num_classes": 4,
        "row_optimizer": SGDRows(),
    }
    with pytest.raises(ValueError, match=words):
        PartialFC(**{**common, **arguments})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaFace(2.0), "margin"),
        (lambda: AdaFace(h=0), "h="),
        (lambda: AdaFace(t_alpha=0), "t_alpha"),
        (lambda: MagFace(5.0, 4.0), "l_a < u_a"),
        (lambda: MagFace(l_margin=0.9, u_margin=0.5), "l_margin"),
        (lambda: CurricularFace(alpha=2.0), "alpha"),
        (lambda: ElasticFace("tan"), "arc or cos"),
        (lambda: ElasticFace(std=-1.0), "std"),
        (lambda: Softmax(scale=0.0), "scale"),
        (lambda: SGDRows(state_dtype=torch.float16), "state_dtype"),
    ],
)
def test_margins_outside_their_domain_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
