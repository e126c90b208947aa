"""Steps of the head: what belongs to one, what leaves no trace, and what moves nothing."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from arcshard.head.block import matmul
from arcshard.head.centers import ClassCenters
from arcshard.head.distillation import DistillationInputs, TeacherCenters, sharded_divergence
from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.losses import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
)
from arcshard.partial_fc import PartialFC
from arcshard.shard import class_range
from tests.conftest import Ranks
from tests.run_helpers import batch_for

CLASSES, WIDTH, RATE = 41, 8, 0.1
UPDATES = ("fused", "autograd")
PATHS = ("fused", "deferred", "autograd")
"""The fused path with a learning rate in forward and without one, and the reference path."""

pytestmark = pytest.mark.usefixtures("one_thread")


def make(path: str = "fused", margin: Margin | None = None, rate: float = 1.0, **options: Any):
    options = {"row_optimizer": AdamWRows(), "dtype": torch.float64, "seed": 1, **options}
    options["update"] = "autograd" if path == "autograd" else "fused"
    return PartialFC(margin or CosFace(0.2, 8.0), WIDTH, CLASSES, rate, **options)


def batch(seed: int, rank: int = 0, world_size: int = 1, size: int = 5) -> tuple[Tensor, Tensor]:
    return batch_for(rank, [size] * world_size, CLASSES, WIDTH, seed)[:2]


def in_forward(path: str) -> float | None:
    """The learning rate that a forward of this path gets."""
    return RATE if path == "fused" else None


def everything(head: PartialFC) -> dict[str, Tensor]:
    """Copies of the centers, of their optimizer state, and of the running values."""
    assert head.row_optimizer is not None
    tensors = {"weight": head.weight.detach(), **dict(head.named_buffers())}
    tensors |= head.row_optimizer.state(head.weight)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def run(ranks: Ranks, world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls function(rank, world_size, *arguments) on each rank; a single one is this process."""
    if world_size == 1:
        function(0, 1, *arguments)
    else:
        ranks.run(world_size, function, *arguments)


def refusal(kind: type[Exception], call: Callable[..., Any], *arguments: Any) -> str:
    """What the call is refused with; on a rank, where pytest.raises would end the process."""
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    return "nothing was refused"


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def continued(head: PartialFC, **counts: int) -> PartialFC:
    """The head with other numbers of draws and forwards behind it."""
    head.set_extra_state({**head.get_extra_state(), **counts})
    return head


# --- sampled heads: a step has one sample ------------------------------------------------------


def first_loss_of_two(rank: int, world_size: int, update: str) -> None:
    head = make(update, rate=0.3)
    first, second = (head(*batch(seed, rank, world_size)) for seed in (0, 1))
    before = everything(head)
    assert "another step" in refusal(RuntimeError, first.backward)
    assert_equal(everything(head), before)
    second.backward()
    head.step(RATE)

    alone = continued(make(update, rate=0.3), samples_drawn=1, forwards=1)
    loss = alone(*batch(1, rank, world_size))
    loss.backward()
    alone.step(RATE)
    assert torch.equal(loss, second)
    assert not torch.equal(head.weight, before["weight"])
    assert_equal(everything(head), everything(alone))


def sum_of_two_losses(rank: int, world_size: int, update: str) -> None:
    head = make(update, rate=0.3)
    losses = [head(*batch(seed, rank, world_size)) for seed in (0, 1)]
    before = everything(head)
    assert "another step" in refusal(RuntimeError, sum(losses).backward)
    assert_equal(everything(head), before)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("refused", [first_loss_of_two, sum_of_two_losses])
def test_a_loss_before_another_forward_is_refused_and_the_last_one_counts(
    ranks, refused, update, world_size
):
    run(ranks, world_size, refused, update)


PLACES = ("before forward", "before backward", "before step")


def train_and_evaluate(
    rank: int, world_size: int, path: str, kind: str, places: tuple[str, ...], is_prepared: bool
) -> None:
    """Steps of a head with evaluations in some places, and of one without them, are the same."""
    head, plain = (make(path, CurricularFace(0.3, 0.5, 8.0), 0.1) for _ in range(2))

    def evaluate(place: str) -> None:
        if place not in places:
            return
        seen = {head.class_range.start + int(c) for c in plain.sampled_centers()[1]}
        x, labels = batch(99, rank, world_size)
        if not is_prepared:  # only classes that are not in the sample of this step
            labels = torch.tensor([c for c in head.class_range if c not in seen][:5])
        assert not seen.issuperset(labels.tolist())
        state, running = head.get_extra_state(), everything(head)
        head.train(kind != "eval")
        with torch.set_grad_enabled(kind == "eval"):
            assert torch.isfinite(head(x, labels))
        head.train()
        assert head.get_extra_state() == state
        assert_equal(everything(head), running)

    for step in range(2):
        batches = [batch(2 * step + n, rank, world_size) for n in range(1 + is_prepared)]
        if is_prepared:
            for one in (plain, head):
                one.prepare([labels for _, labels in batches])
        for x, labels in batches:
            rate = None if is_prepared else in_forward(path)
            losses = [plain(x, labels, rate)]
            evaluate("before forward")
            losses.append(head(x, labels, rate))
            assert torch.equal(*losses)
            evaluate("before backward")
            sum(losses).backward()
            evaluate("before step")
        for one in (plain, head):
            one.step(RATE)
        assert_equal(everything(head), everything(plain))
        assert head.get_extra_state() == plain.get_extra_state()


@pytest.mark.parametrize(("world_size", "places"), [*((1, (p,)) for p in PLACES), (2, PLACES)])
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("kind", ["no_grad", "eval"])
@pytest.mark.parametrize("path", PATHS)
def test_an_evaluation_of_other_classes_leaves_no_trace_in_a_step(
    ranks, path, kind, is_prepared, world_size, places
):
    run(ranks, world_size, train_and_evaluate, path, kind, places, is_prepared)


@pytest.mark.parametrize("path", PATHS)
def test_a_sampled_loss_of_evaluation_mode_has_a_gradient_and_is_no_part_of_a_step(path):
    head = make(path, rate=0.3)
    x, labels = batch(0)
    head(x, labels, in_forward(path)).backward()
    expected, x.grad = x.grad, None
    head = make(path, rate=0.3).eval()
    before = everything(head)
    head(x, labels).backward()
    torch.testing.assert_close(x.grad, expected)
    assert_equal(everything(head), before)
    assert head.weight.grad is None
    assert "evaluation mode" in refusal(RuntimeError, lambda: head.step(RATE))


# --- ranks that bring different things ---------------------------------------------------------


def embeddings_here(rank: int, odd: str) -> tuple[Tensor, Tensor]:
    """A batch of rank 0 or 1; rank 1's is of the `odd` kind."""
    x, labels = batch(0, rank, 2)
    if rank == 0 or odd == "none":
        return x, labels
    if "empty" in odd:
        return torch.empty(0, WIDTH, dtype=x.dtype, requires_grad=odd == "empty"), labels[:0]
    return x.detach(), labels


def head_gradient(rank: int, world_size: int, path: str, odd: str) -> list[Tensor | None]:
    head = make(path, AdaFace(scale=8.0))
    x, labels = embeddings_here(rank, odd)
    head(x, labels, in_forward(path)).backward()
    head.step(RATE)
    return [x.grad, *everything(head).values()]


def divergence_gradient(rank: int, world_size: int, path: str, odd: str) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    mine = class_range(CLASSES, rank, world_size)
    ours, teachers = draw[:, mine.start : mine.stop]
    known = torch.ones(len(mine), dtype=torch.bool)
    teacher = TeacherCenters(normalize(teachers, dim=1)[:, None], known)
    centers = ClassCenters(ours, None)
    sides = DistillationInputs(
        centers, 1, None, teacher, 8.0, 2.0, 5, dist.group.WORLD, budget_bytes=10**4
    )
    x, _ = embeddings_here(rank, odd)
    loss = sharded_divergence(normalize(x), normalize(x.detach().flip(1)), sides)
    if loss.requires_grad:
        loss.backward()
    return [x.grad, loss.detach()]


@pytest.mark.parametrize(
    ("odd", "alike"), [("empty without gradient", "empty"), ("rows without gradient", "none")]
)
@pytest.mark.parametrize(
    ("compute", "path"), [*((head_gradient, p) for p in PATHS), (divergence_gradient, "")]
)
def test_a_rank_that_wants_no_gradient_changes_none_of_the_others(ranks, compute, path, odd, alike):
    ours, expected = (ranks.run(2, compute, path, kind) for kind in (odd, alike))
    assert ours[0][0].abs().max() > 1e-3
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(ours[1][1:], expected[1][1:], rtol=0, atol=0)
    assert ours[1][0] is None


def bring_an_unprepared_label(
    rank: int, world_size: int, update: str, bringer: int, owner: int
) -> None:
    head = make(update, rate=0.1)
    before = everything(head)
    x, labels = batch(0, rank, world_size)
    given = batch(0, 0, 1, 5 * world_size)[1]
    start = class_range(CLASSES, owner, world_size).start
    unknown = next(c for c in range(start, CLASSES) if c not in given)
    head.prepare([labels])
    wrong = labels.clone()
    if rank == bringer:
        wrong[2] = unknown
    refused = refusal(ValueError, head, x, wrong)
    assert f"label {unknown} " in refused
    assert "head.prepare()" in refused
    assert_equal(everything(head), before)
    alone = continued(make(update, rate=0.1), samples_drawn=1)
    for one in (head, alone):
        one.prepare([labels])
        one(x, labels).backward()
        one.step(RATE)
    assert_equal(everything(head), everything(alone))
    assert not torch.equal(head.weight, before["weight"])


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("bringer", [0, 1])
@pytest.mark.parametrize("update", UPDATES)
def test_every_rank_names_a_label_that_prepare_was_not_given(ranks, update, bringer, owner):
    ranks.run(2, bring_an_unprepared_label, update, bringer, owner)


# --- numbers at the edge -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [3e-12, 1e-12, 1e-13, 0.0])
@pytest.mark.parametrize("margin", [CosFace(0.4, 64.0), CosFace(0.4, 96.0), NormFace(64.0)])
@pytest.mark.parametrize("workspace_mib", [256, 0.004])
def test_the_shortest_centers_have_the_right_loss_and_gradients(margin, length, workspace_mib):
    """Center 0 has the direction of an embedding of its own class, center 1 of another class."""
    head = make(
        "fused",
        margin,
        dtype=torch.float32,
        row_optimizer=SGDRows(0, 0),
        workspace_mib=workspace_mib,
    )
    x = batch(0)[0].detach().float()
    labels = torch.tensor([0, 2, 3, 1, 4])
    with torch.no_grad():
        head.weight[:2] = normalize(x[:2]) * length
    w = head.weight.detach().double().requires_grad_(True)
    e = x.double().requires_grad_(True)
    x.requires_grad_(True)
    loss = head(x, labels)
    loss.backward()
    head.step(RATE)

    # The floor 1e-12; lower where fp32 rounding decides on which side of it a center is.
    unit = normalize(w, eps=1e-12 if length < 1e-12 else 0.9e-12)
    unit.retain_grad()
    cosine = normalize(e) @ unit.t()
    own = torch.nn.functional.one_hot(labels, CLASSES)
    shift = margin.m3 if isinstance(margin, CombinedMargin) else 0.0
    expected = torch.nn.functional.cross_entropy(margin.scale * (cosine - shift * own), labels)
    expected.backward()
    after = (w - RATE * w.grad).detach()
    assert torch.isfinite(head.weight).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), e.grad, rtol=1e-4, atol=1e-5)
    known = slice(0 if length >= 1e-12 else 2, None)  # below, there is no right gradient
    error = (head.weight.detach().double() - after).norm(dim=1)
    allowed = 1e-6 + 1e-6 * unit.grad.norm(dim=1) / w.detach().norm(dim=1)
    assert bool((error <= allowed)[known].all())


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    ("make_margin", "names"),
    [
        (CurricularFace, ("margin",)),
        (AdaFace, ("margin",)),
        (MagFace, ("l_margin", "u_margin")),
        (ElasticFace, ("margin", "std")),
        (CosFace, ("margin",)),
        (ArcFace, ("margin",)),
    ],
)
def test_a_margin_of_whole_numbers_is_the_margin_of_the_same_floats(update, make_margin, names):
    results = []
    for zero, scale in ((0, 8), (0.0, 8.0)):
        x, labels = batch(0)
        head = make(update, make_margin(**dict.fromkeys(names, zero), scale=scale))
        loss = head(x, labels)
        loss.backward()
        head.step(RATE)
        results.append({"loss": loss.detach(), "grad": x.grad, **everything(head)})
    assert_equal(*results)


STATEFUL = (AdaFace(scale=8.0), CurricularFace(0.3, scale=8.0), MagFace(scale=8.0))


@pytest.mark.parametrize(
    ("value", "gives_bad"), [(1e20, True), (1e20, False), (math.inf, False), (math.nan, False)]
)
@pytest.mark.parametrize("margin", [CosFace(0.2, 8.0), *STATEFUL])
@pytest.mark.parametrize("path", PATHS)
def test_embeddings_or_norms_that_are_not_finite_move_nothing(path, margin, value, gives_bad):
    """The square of 1e20 is more than fp32 holds."""
    head = make(path, margin, dtype=torch.float32)
    x, labels = batch(0)
    x = x.detach().float()
    x[2, 3] = value
    before = everything(head)
    loss = head(x.requires_grad_(True), labels, in_forward(path))
    assert not torch.isfinite(loss)
    loss.backward()
    head.step(RATE, ~torch.isfinite(loss) if gives_bad else None)
    assert_equal(everything(head), before)


@pytest.mark.parametrize("path", PATHS)
def test_an_infinite_embedding_of_a_plain_softmax_has_no_finite_loss(path):
    """Its logits are inf for the own class and -inf for the other one: a loss of 0."""
    update = "autograd" if path == "autograd" else "fused"
    head = PartialFC(Softmax(), 2, 2, row_optimizer=SGDRows(), update=update)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    head.weight.data.copy_(weight)
    x = torch.tensor([[math.inf, 1.0]], requires_grad=True)
    loss = head(x, torch.tensor([0]), in_forward(path))
    assert not torch.isfinite(loss)
    loss.backward()
    head.step(RATE)
    assert torch.equal(head.weight, weight)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("margin", STATEFUL)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_non_finite_micro_batch_takes_the_running_values_of_its_step_back(
    update, margin, value, rate
):
    head = make(update, margin, rate)
    batches = [batch(seed) for seed in (0, 1)]
    with torch.no_grad():
        batches[1][0][2, 3] = value
    before = everything(head)
    head.prepare([labels for _, labels in batches])
    for x, labels in batches:
        head(x, labels).backward()
    head.step(RATE)
    assert_equal(everything(head), before)


def test_bf16_products_on_a_cpu_are_the_fp32_sums_of_exact_products():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 64, 64, generator=generator).bfloat16()
    product = matmul(left, right)
    assert product.dtype == torch.float32
    assert torch.equal(product, left.float() @ right.float())
    assert not torch.equal(product, product.bfloat16().float())


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("center_device", [None, "cpu"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_smallest_workspace_that_the_constructor_takes_serves_a_step(
    k, center_device, dtype, half
):
    options = {"dtype": dtype, "half": half, "center_device": center_device}
    options |= {"centers_per_class": k, "batch_size_per_rank": 6}
    rates = (0.3, 0.0) if center_device else (1.0, 0.3, 0.0)
    for rate, rule in itertools.product(rates, (SGDRows, AdamWRows)):

        def sized(size: int, rate=rate, rule=rule) -> PartialFC | None:
            mib = size / 2**20
            try:
                return make(rate=rate, row_optimizer=rule(), workspace_mib=mib, **options)
            except ValueError as error:
                assert "does not hold one class" in str(error)  # noqa: PT017
                return None

        refused, taken = 1, 2**12
        while taken - refused > 1:
            middle = (refused + taken) // 2
            refused, taken = (refused, middle) if sized(middle) else (middle, taken)
        assert taken < 2**12
        for size in (taken, 2 * taken):
            head = sized(size)
            for path, labels in (("fused", torch.arange(6)), ("deferred", torch.zeros(2).long())):
                x = torch.ones(len(labels), WIDTH, requires_grad=True)
                head(x, labels, in_forward(path)).backward()
                head.step(RATE)


class Products(TorchDispatchMode):
    """Lists the three sizes, sorted, of each product of matrices that has all classes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[list[int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = [a for a in arguments if isinstance(a, Tensor)][-2:]
            size = sorted([*left.shape, right.shape[1]])
            self.sizes += [size] if CLASSES in size else []
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize(("is_frozen", "expected"), [(True, 2), (False, 3)])
def test_a_frozen_backbone_costs_no_product_for_the_gradient_of_the_embeddings(
    path, is_frozen, expected
):
    head = make(path)
    before = everything(head)
    x, labels = batch(0)
    with Products() as products:
        head(x.detach() if is_frozen else x, labels, in_forward(path)).backward()
        head.step(RATE)
    assert products.sizes == [[5, WIDTH, CLASSES]] * expected
    assert not torch.equal(head.weight, before["weight"])


# --- order of calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_rate_after_a_waiting_gradient_is_refused_and_the_gradient_still_counts(rate):
    head, alone = make(rate=rate), make(rate=rate)
    labels = [batch(seed)[1] for seed in (0, 1)]
    for one in (head, alone):
        one.prepare(labels)
        one(*batch(0)).backward()
    before = everything(head)
    loss = head(*batch(1), RATE)
    assert "leave learning_rate out" in refusal(RuntimeError, loss.backward)
    assert_equal(everything(head), before)
    for one in (head, alone):
        one.step(RATE)
    assert_equal(everything(head), everything(alone))
    assert not torch.equal(head.weight, before["weight"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_loss_whose_centers_have_moved_is_refused(path, rate):
    head = make(path, rate=rate)
    head.prepare([batch(seed)[1] for seed in (0, 1)])
    stale, used = head(*batch(0), in_forward(path)), head(*batch(1), in_forward(path))
    used.backward()
    head.step(RATE)
    before = everything(head)
    assert "class centers have moved" in refusal(RuntimeError, stale.backward)
    assert_equal(everything(head), before)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_step_without_a_gradient_of_its_own_is_refused(update, rate):
    head = make(update, rate=rate)
    before = everything(head)

    def refused() -> None:
        assert "loss.backward() before head.step" in refusal(RuntimeError, head.step, RATE)
        assert_equal(everything(head), before)

    refused()
    head.eval()(*batch(0))
    refused()
    head.train()(*batch(0)).backward()
    head.step(RATE)
    before = everything(head)
    refused()
    with torch.no_grad():
        head(*batch(1))
    refused()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_state_taken_over_in_the_middle_of_a_step_ends_it(path, rate, has_gradient):
    head, alone = (make(path, AdaFace(scale=8.0), rate) for _ in range(2))
    saved = copy.deepcopy(head.state_dict())
    head.prepare([batch(0)[1]])
    loss = head(*batch(0))
    if has_gradient:
        loss.backward()
    head.load_state_dict(saved)
    assert "loss.backward() before head.step" in refusal(RuntimeError, head.step, RATE)
    for one in (head, alone):
        one(*batch(1), in_forward(path)).backward()
        one.step(RATE)
    assert_equal(everything(head), everything(alone))


@pytest.mark.parametrize("path", ["fused", "deferred", "autograd"])
def test_centers_that_require_no_gradient_stay(path):
    update = "autograd" if path == "autograd" else "fused"
    head = PartialFC(CosFace(), 8, 41, row_optimizer=AdamWRows(), update=update, seed=1)
    before = head.weight.detach().clone()
    x, y = torch.randn(6, 8), torch.arange(6)
    gradients = []
    for is_frozen in (True, False):
        head.weight.requires_grad_(not is_frozen)
        embeddings = x.clone().requires_grad_(True)
        head(embeddings, y, 0.1 if path == "fused" else None).backward()
        head.step(0.1)
        gradients.append(embeddings.grad)
        assert torch.equal(head.weight, before) == is_frozen
    torch.testing.assert_close(gradients[0], gradients[1])


def gradient_beside_an_evaluation(rank: int, world_size: int, path: str) -> Tensor | None:
    head = make(path, rate=0.3)
    if rank == 0:
        head.eval()
    x, labels = batch(0, rank, world_size)
    head(x, labels, in_forward(path)).backward()
    return x.grad


@pytest.mark.parametrize("path", PATHS)
def test_a_rank_in_evaluation_mode_lets_no_other_rank_wait(ranks, path):
    for gradient in ranks.run(2, gradient_beside_an_evaluation, path):
        assert torch.isfinite(gradient).all()


def two_steps_of_few_classes(rank: int, world_size: int, path: str) -> dict[str, Tensor]:
    head = PartialFC(
        CurricularFace(0.3, 0.5, 16.0),
        WIDTH,
        3,
        row_optimizer=SGDRows(),
        dtype=torch.float64,
        update="autograd" if path == "autograd" else "fused",
    )
    for number in range(2):
        x, labels, _, _ = batch_for(rank, [3] * world_size, 3, WIDTH, number)
        head(x, labels, in_forward(path)).backward()
        head.step(RATE)
    return {"weight": head.weight.detach(), **dict(head.named_buffers())}


def test_a_rank_without_a_class_has_the_running_values_of_the_others(ranks):
    expected = ranks.run(4, two_steps_of_few_classes, "autograd")
    assert len(expected[3]["weight"]) == 0
    assert all(part["margin_t"] == expected[0]["margin_t"] != 0 for part in expected)
    for path in ("fused", "deferred"):
        parts = ranks.run(4, two_steps_of_few_classes, path)
        for part, reference in zip(parts, expected, strict=True):
            for name, value in reference.items():
                torch.testing.assert_close(part[name], value, rtol=1e-9, atol=1e-12)


# --- what is held, and for how long --------------------------------------------------------------


@pytest.mark.parametrize("is_lost", [True, False])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("path", PATHS)
def test_a_loss_and_what_it_holds_are_freed_with_the_last_reference(path, rate, is_lost):
    head = make(path, rate=rate)
    gc.collect()
    gc.disable()
    try:
        x, labels = batch(0)
        unit = x * 1.0
        loss = head(unit, labels, in_forward(path))
        watched = [weakref.ref(loss), weakref.ref(unit)]
        if not is_lost:
            loss.backward()
            head.step(RATE)
        del loss, unit
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_rows_of_a_step_are_on_the_device_once_although_the_loss_is_kept():
    head = make("fused", rate=0.3, center_device="cpu")
    losses, held = [], []
    for number in range(3):
        x, labels = batch(number)
        losses.append(head(x, labels, RATE))
        held.append(weakref.ref(head.sampled_centers()[0]))
        losses[-1].backward()
        if number != 1:  # without `step`, as a loop may be that updates in backward
            head.step(RATE)
            assert [ref() for ref in held] == [None] * len(held)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_an_update_that_an_error_interrupts_is_not_made_twice(rate, monkeypatch):
    head = make("deferred", rate=rate, workspace_mib=0.004)
    x, labels = batch(0)
    head(x, labels).backward()
    real, calls = AdamWRows.move, []

    def fail_once(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        real(self, *arguments)

    monkeypatch.setattr(AdamWRows, "move", fail_once)
    with pytest.raises(MemoryError):
        head.step(RATE)
    moved = everything(head)
    assert "no gradient" in refusal(RuntimeError, lambda: head.step(RATE))
    assert_equal(everything(head), moved)
    head(x, labels).backward()
    head.step(RATE)


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_a_head_is_copied_and_pickled_while_a_gradient_waits(rate):
    head = make("deferred", rate=rate)
    x, labels = batch(0)
    head(x, labels).backward()
    copies = [copy.deepcopy(head), pickle.loads(pickle.dumps(head))]
    for each in (head, *copies):
        each.step(RATE)
        assert_equal(everything(each), everything(head))


def test_a_loss_scale_of_2_to_the_16_does_not_overflow_at_the_far_end_of_the_cosine():
    """All other classes are opposite to the embedding: exp(-lse) is as large as it gets."""
    head = PartialFC(CosFace(0.4, 64.0), 8, 4, row_optimizer=SGDRows(0, 0))
    x = torch.nn.functional.normalize(torch.randn(1, 8))
    with torch.no_grad():
        head.weight.copy_(-x.expand(4, 8))
    embeddings = x.clone().requires_grad_(True)
    (head(embeddings, torch.tensor([1])) * 65536).backward()
    assert torch.isfinite(embeddings.grad).all()
    head.step(0.1, gradient_scale=torch.tensor(65536.0))
    assert torch.isfinite(head.weight).all()


def test_a_gradient_that_overflows_although_the_loss_is_finite_moves_nothing():
    """Very many classes at the embedding, and a center of its own of norm 1e-12."""
    classes = 300_000
    head = PartialFC(CosFace(0.4, 64.0), 2, classes, row_optimizer=SGDRows(0, 0))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([1.0, 0.0]).expand(classes, 2))
        head.weight[7] = torch.tensor([6e-13, 8e-13])
    for rate in (0.1, None):
        x = torch.tensor([[1.0, 0.0]], requires_grad=True)
        loss = head(x, torch.tensor([7]), rate)
        assert torch.isfinite(loss)
        loss.backward()
        head.step(0.1)
        assert torch.isfinite(head.weight).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_from_above_that_is_not_finite_moves_nothing(path):
    head = make(path)
    before = everything(head)
    x, labels = batch(0)
    (head(x, labels, in_forward(path)) * math.inf).backward()
    head.step(RATE)
    assert_equal(everything(head), before)


@pytest.mark.parametrize("path", PATHS)
def test_a_skipped_step_of_frozen_centers_restores_the_running_values(path):
    head = make(path, AdaFace(scale=8.0))
    head.weight.requires_grad_(False)
    before = everything(head)
    x, labels = batch(0)
    head(x, labels, in_forward(path)).backward()
    assert head.get_buffer("margin_norm_mean") != before["margin_norm_mean"]
    head.step(RATE, torch.tensor(True))
    assert_equal(everything(head), before)
