"""The head's Triton kernels: through Triton's interpreter on a CPU, compiled, and when not used.

The interpreter must be on before Triton is imported, so that `interpreter` is a process of its own.
"""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from arcshard.head import kernels
from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows
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
from benchmarks.compile_kernels import compile_all
from benchmarks.count_head import count
from tests.reference import dense_loss
from training.planner.trace import MemoryTracker
from utils.worker import Worker

EIGHTY_GB = 10_188.0  # MiB, the automatic workspace of a GPU of 79.6 GiB


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Runs functions of this module in a process where kernels run on CPU tensors."""
    with Worker() as worker, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        worker.run(_one_thread, seconds=60)
        patch.undo()
        yield worker.run


def _one_thread() -> None:
    torch.set_num_threads(1)


# --- a step against the reference in float64 -------------------------------------------------

# Margins whose logits the kernels compute, and others, of which they do the update.
SERVED = (
    ArcFace(),
    CosFace(),
    CombinedMargin(m1=0.9, m2=0.4, m3=0.15, scale=64.0),
    NormFace(64.0),
    AdaFace(),
    MagFace(),
    ElasticFace(),
)
OTHERS = (CurricularFace(), CosFace(interclass_filtering_threshold=0.1), NormFace(96.0))
PLAIN = Softmax(bias=True)


def make_head(
    kind: str, margin: Margin, rule: RowOptimizer, num_classes: int, width: int, **options: Any
) -> PartialFC:
    """A head with kernels ("triton"), without ("torch"), or the reference path in float64."""
    torch.manual_seed(7)
    if kind == "reference":
        options = {k: v for k, v in options.items() if k in ("seed", "centers_per_class")}
        options |= {"update": "autograd", "dtype": torch.float64}
    else:
        options = {"kernels": kind, "workspace_mib": 0.04, **options}
    head = PartialFC(margin, width, num_classes, row_optimizer=rule, **options)
    with torch.no_grad():
        head.weight.mul_(10)
    return head


def run_steps(
    head: PartialFC, batch: int, deferred: bool = False, padded: int = 0, passes: int = 1
) -> list[Tensor]:
    """Losses, gradients, centers and state of two steps, in float64."""
    seen: list[Tensor] = []
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for number in range(passes):
            x = torch.randn(batch, head.embedding_size, generator=generator, dtype=torch.float64)
            labels = torch.randint(head.num_classes, (batch,), generator=generator)
            labels[0] = head.num_classes - 1 if number == 0 else labels[0]
            x = x.float().to(head.work_dtype).requires_grad_(True)
            loss = head(x, labels, None if deferred or passes > 1 else 0.1)
            loss.backward()
            assert x.grad is not None
            seen += [loss.detach(), x.grad]
        head.step(0.1)
    assert head.row_optimizer is not None
    seen += [head.weight.detach(), *head.row_optimizer.state(head.weight).values()]
    if head.bias is not None:
        seen.append(head.bias.detach())
    return [part.double() for part in seen]


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """The largest relative error."""
    return max(
        float((one - two).norm() / two.norm().clamp_min(1e-9))
        for one, two in zip(ours, truth, strict=True)
    )


def step_error(
    margin: Margin,
    rule: type[RowOptimizer],
    num_classes: int,
    batch: int,
    width: int,
    centers_per_class: int = 1,
    padded: int = 0,
    deferred: bool = False,
    passes: int = 1,
) -> tuple[float, int, str]:
    """Error of a head with kernels against the reference, its blocks, and what it says of itself.

    AdamW's eps is large, so that its steps follow the gradient's size.
    """

    def make_rule() -> RowOptimizer:
        return AdamWRows(eps=1e-3) if rule is AdamWRows else SGDRows()

    options = {"centers_per_class": centers_per_class, "seed": 5}
    head = make_head(
        "triton",
        margin,
        make_rule(),
        num_classes,
        width,
        batch_size_per_rank=batch + padded,
        **options,
    )
    assert head.has_kernels
    ours = run_steps(head, batch, deferred, passes=passes)
    truth = run_steps(
        make_head("reference", margin, make_rule(), num_classes, width, **options),
        batch,
        passes=passes,
    )
    return distance(ours, truth), len(head.planned_blocks().blocks()), head.describe_kernels()


@pytest.mark.parametrize("rule", [SGDRows, AdamWRows])
@pytest.mark.parametrize("margin", SERVED, ids=lambda margin: margin.describe())
def test_a_step_with_kernels_equals_the_reference_for_every_margin(interpreter, margin, rule):
    """C = 75, B = 7, D = 20: no size divides a tile, and the last block is smaller."""
    error, blocks, said = interpreter(step_error, margin, rule, 75, 7, 20)
    assert error < 2e-5
    assert blocks > 3
    assert said == "kernels: Triton (interpreted) for the logits and the update"


@pytest.mark.parametrize("rule", [SGDRows, AdamWRows])
@pytest.mark.parametrize("margin", [*OTHERS, PLAIN], ids=lambda margin: margin.describe())
def test_margins_that_the_logits_kernel_does_not_know_have_its_update(interpreter, margin, rule):
    error, _, said = interpreter(step_error, margin, rule, 75, 7, 20)
    assert error < 2e-5
    assert said.startswith("kernels: Triton (interpreted) for the update, those of PyTorch")


@pytest.mark.parametrize(
    ("num_classes", "batch", "width", "options"),
    [
        (33, 1, 16, {}),  # one row
        (1, 3, 16, {}),  # one class, which is everybody's
        (1, 1, 1, {}),
        (64, 17, 33, {"padded": 4}),  # masked rows; more columns than a tile
        (40, 16, 16, {"deferred": True}),
        (50, 5, 12, {"passes": 2}),
        (20, 5, 12, {"centers_per_class": 3}),
        (20, 5, 700, {}),
    ],
)
def test_a_step_with_kernels_equals_the_reference_at_odd_sizes(
    interpreter, num_classes, batch, width, options
):
    passes = {"rule": SGDRows, "num_classes": num_classes, "batch": batch, "width": width}
    error, *_ = interpreter(_step_error, {"margin": ArcFace(), **passes, **options})
    assert error < 2e-5


def _step_error(options: dict[str, Any]) -> tuple[float, int, str]:
    return step_error(**options)


def errors_in_bf16() -> tuple[float, float]:
    """Errors of a head with kernels, and of torch's dense computation, both in bf16."""
    num_classes, batch, width, margin = 300, 24, 64, CosFace()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, width, generator=generator)
    x = torch.randn(batch, width, generator=generator)
    labels = torch.randint(num_classes, (batch,), generator=generator)

    def dense(dtype: torch.dtype) -> list[Tensor]:
        w, e = weight.clone().requires_grad_(True), x.clone().requires_grad_(True)
        if dtype == torch.bfloat16:
            with torch.autocast("cpu", torch.bfloat16):
                cosine = torch.nn.functional.linear(
                    torch.nn.functional.normalize(e), torch.nn.functional.normalize(w)
                )
            loss = torch.nn.functional.cross_entropy(margin.logits(cosine.float(), labels), labels)
        else:
            e, w = (part.detach().double().requires_grad_(True) for part in (e, w))
            loss = dense_loss(margin, e, labels, w)
        loss.backward()
        assert e.grad is not None
        assert w.grad is not None
        return [loss.detach().double(), e.grad.double(), w.grad.double()]

    rule = SGDRows(momentum=0.0, weight_decay=0.0)
    head = PartialFC(
        margin,
        width,
        num_classes,
        row_optimizer=rule,
        half=torch.bfloat16,
        kernels="triton",
        workspace_mib=0.05,
    )
    assert head.has_kernels
    with torch.no_grad():
        head.weight.copy_(weight)
    e = x.clone().requires_grad_(True)
    loss = head(e, labels, 1.0)
    loss.backward()
    assert e.grad is not None
    ours = [loss.detach().double(), e.grad.double(), (weight - head.weight.detach()).double()]
    truth = dense(torch.float64)
    return distance(ours, truth), distance(dense(torch.bfloat16), truth)


def test_the_error_in_bf16_is_at_most_twice_that_of_torchs_dense_computation(interpreter):
    ours, theirs = interpreter(errors_in_bf16)
    assert 0 < ours <= 2 * theirs


def strided_embeddings() -> float:
    """Distance between embeddings as columns of a matrix and the same embeddings as its rows."""
    results = []
    for is_strided in (True, False):
        head = make_head("triton", ArcFace(), SGDRows(), 50, 24)
        x = torch.randn(24, 8, generator=torch.Generator().manual_seed(0)).t()
        x = (x if is_strided else x.contiguous()).requires_grad_(True)
        loss = head(x, torch.arange(16)[::2], 0.1)
        loss.backward()
        assert x.grad is not None
        results.append([loss.detach(), x.grad, head.weight.detach()])
    return distance(*results)


def test_embeddings_may_be_strided(interpreter):
    assert interpreter(strided_embeddings) < 1e-6


# --- sampled, sharded and stored elsewhere ---------------------------------------------------


def difference_from_torch(rule: str, options: dict[str, Any]) -> float:
    """Distance of a head with kernels from one without."""
    results = []
    for kind in ("triton", "torch"):
        dtype = torch.bfloat16 if options.get("dtype") == torch.bfloat16 else None
        made: RowOptimizer = (
            AdamWRows(eps=1e-3, state_dtype=dtype)
            if rule == "adamw"
            else SGDRows(state_dtype=dtype)
        )
        head = make_head(kind, ArcFace(), made, 90, 20, batch_size_per_rank=8, **options)
        assert head.has_kernels == (kind == "triton")
        results.append(run_steps(head, 8))
    return distance(*results)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"sample_rate": 0.3}, 2e-5),
        ({"sample_rate": 0.3, "center_device": "cpu"}, 2e-5),
        # The same random bits: what differs are single roundings of numbers that differ in fp32.
        ({"dtype": torch.bfloat16}, 3e-3),
        ({"dtype": torch.bfloat16, "sample_rate": 0.3}, 3e-3),
        ({"dtype": torch.bfloat16, "sample_rate": 0.3, "center_device": "cpu"}, 3e-3),
    ],
)
def test_samples_and_bf16_centers_are_updated_as_without_kernels(
    interpreter, rule, options, tolerance
):
    assert interpreter(difference_from_torch, rule, options) < tolerance


def veto_keeps_every_bit() -> None:
    for rule in (SGDRows(), AdamWRows(), SGDRows(state_dtype=torch.bfloat16)):
        torch.manual_seed(0)
        weight = torch.randn(13, 20).bfloat16()
        parts = [weight, *rule.state(weight).values()]
        before = [part.clone() for part in parts]
        for bad, gradient in ((True, torch.full((13, 20), math.nan)), (False, torch.ones(13, 20))):
            kernels.update_rows(rule, weight, gradient, 0.1, torch.tensor(bad))
            same = [torch.equal(one, two) for one, two in zip(parts, before, strict=True)]
            assert same == [bad] * len(parts)
            assert all(bool(torch.isfinite(part).all()) for part in parts)


def test_a_veto_keeps_every_bit_whatever_the_gradient(interpreter):
    interpreter(veto_keeps_every_bit)


def an_empty_shard() -> None:
    weight = torch.empty(0, 16)
    operand, norm = kernels.normalize_rows(weight, None, torch.float32)
    assert (operand.shape, norm.shape) == ((0, 16), (0,))
    unit, column = torch.randn(5, 16), torch.full((5,), -1)
    numerators, sums = kernels.softmax_numerators(unit, operand, column, 0, None, True)
    assert (numerators.shape, sums.sum(0).tolist()) == ((0, 5), [0.0] * 5)
    kernels.fill_targets(numerators, column, 0, unit[:, 0].contiguous())
    kernels.update_rows(SGDRows(), weight, weight, 0.1, None)


def test_a_rank_without_a_class_launches_nothing(interpreter):
    interpreter(an_empty_shard)


# --- the rounding ----------------------------------------------------------------------------


def rounded(first_row: int, blocks: list[tuple[int, int]], seed: int = 1, step: int = 4) -> Tensor:
    """Rows first_row, ... of centers of 1 + 1/3 of bf16's spacing, updated by a learning rate 0."""
    rule = SGDRows(momentum=0.0, weight_decay=0.0, state_dtype=torch.bfloat16)
    rule.seed, rule.sr_counter = seed, step
    count = blocks[-1][1]
    weight = torch.ones(count, 64).bfloat16()
    gradient = torch.full((count, 64), -(1 + 2**-7 / 3) + 1)
    for start, stop in blocks:
        kernels.update_rows(
            rule,
            weight[start:stop],
            gradient[start:stop],
            1.0,
            None,
            state={},
            first_row=first_row + start,
            normalizes=False,
        )
    return weight.float()


def check_rounding() -> None:
    whole = rounded(0, [(0, 300)])
    assert set(whole.unique().tolist()) == {1.0, 1 + 2**-7}
    share = float((whole > 1).float().mean())
    assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / whole.numel())
    # Every row and every column has its own bits, which blocks and ranks do not change.
    assert torch.equal(whole, rounded(0, [(0, 100), (100, 101), (101, 300)]))
    ranges = [class_range(300, rank, 3) for rank in range(3)]
    parts = [rounded(part.start, [(0, len(part))]) for part in ranges]
    assert torch.equal(whole, torch.cat(parts))
    for other in (rounded(0, [(0, 300)], seed=2), rounded(0, [(0, 300)], step=5)):
        assert 0.3 < float((other != whole).float().mean()) < 0.6  # 4/9 if independent
    columns = (whole > 1).float()
    assert columns.mean(0).min() > 0.2
    assert columns.mean(1).min() > 0.05
    far = rounded(2**33, [(0, 300)])  # row numbers beyond 32 bits
    assert 0.3 < float((far != whole).float().mean()) < 0.6


def test_the_rounding_is_right_on_average_and_independent_of_blocks_and_ranks(interpreter):
    interpreter(check_rounding)


def same_bits_as_torch() -> None:
    """Numbers without a rounding error in fp32, so that only the random bits matter."""
    for rule in (SGDRows(momentum=0.5, weight_decay=0.0), SGDRows(0.5, 0.0, torch.bfloat16)):
        results = []
        for uses_kernel in (True, False):
            torch.manual_seed(0)
            weight = torch.randn(40, 24).bfloat16()
            gradient = torch.randint(-512, 512, (40, 24)).float() / 2**12
            state = rule.create_state(weight)
            for _ in range(2):
                if uses_kernel:
                    kernels.update_rows(
                        rule, weight, gradient.clone(), 0.5, None, state=state, normalizes=False
                    )
                else:
                    rule.update_rows(weight, gradient.clone(), None, 0.5, state=state)
                rule.end_step()
            rule.sr_counter = 0
            results.append([weight, *state.values()])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_the_kernel_and_torch_round_by_the_same_bits(interpreter):
    interpreter(same_bits_as_torch)


# --- large matrices --------------------------------------------------------------------------


def update_beyond_32_bits() -> None:
    """Two rows of a matrix of 2.2e9 numbers, of which nothing else is ever touched."""
    rows = torch.tensor([1, 4_299_999])
    weight = torch.empty(4_300_000, 512)
    assert weight.numel() > 2**31
    weight[rows] = 1.0
    rule = SGDRows(momentum=0.0, weight_decay=0.0)
    operand, norm = kernels.normalize_rows(weight, rows, torch.float32)
    assert torch.allclose(operand, torch.full((2, 512), 512**-0.5))
    assert torch.allclose(norm, torch.full((2,), 512**0.5))
    gradient = torch.arange(2.0)[:, None].expand(2, 512).contiguous()
    kernels.update_rows(rule, weight, gradient, 0.25, None, state={}, rows=rows, normalizes=False)
    assert weight[1].unique().tolist() == [1.0]
    assert weight[4_299_999].unique().tolist() == [0.75]


def test_offsets_beyond_32_bits_reach_their_rows(interpreter):
    interpreter(update_beyond_32_bits)


def test_a_block_may_have_more_than_32_bits_of_numerators():
    """4.6e9 numerators, on the meta device."""
    unit = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    operand = torch.empty(4_500_000, 512, dtype=torch.bfloat16, device="meta")
    column = torch.empty(1024, dtype=torch.int64, device="meta")
    numerators, sums = kernels.softmax_numerators(unit, operand, column, 2**33, None, True)
    assert numerators.shape == (4_500_000, 1024)
    assert sums.shape == (-(-4_500_000 // kernels.SETTINGS[9, 0].tile.n), 1024)


# --- compiled --------------------------------------------------------------------------------


def test_all_kernels_compile_for_both_kinds_of_gpu_without_spills():
    with Worker() as worker:
        rows = worker.run(compile_all, seconds=300)
    most_shared = {"8.0": 99 * 1024, "9.0": 227 * 1024}  # consumer GPUs of 8.x have 99 KiB
    assert {row["capability"] for row in rows} == set(most_shared)
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 255
        assert row["shared"] <= most_shared[row["capability"]]
        if row["kernel"].startswith("softmax_numerators_kernel"):
            assert row["wgmma"] if row["capability"] == "9.0" else row["mma"]
    assert len({row["kernel"] for row in rows}) == len(rows) / 2


# --- what a step costs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "batch", "optimizer", "dtypes", "launches", "gigabytes"),
    [
        (2_000_000, 1024, "sgd", ("fp32", "fp32"), 175, 52),
        (2_000_000, 1024, "adamw", ("fp32", "fp32"), 175, 61),
        (29_000_000, 512, "sgd", ("bf16", "bf16"), 900, 570),
    ],
)
def test_a_step_with_kernels_starts_and_moves_no_more_than_was_counted(
    classes, batch, optimizer, dtypes, launches, gigabytes
):
    row = count(classes, batch, 1.0, EIGHTY_GB, optimizer, *dtypes)
    assert row["launches"] <= launches
    assert max(row["gigabytes"], row["gigabytes_moved"]) <= gigabytes
    assert row["products"] == pytest.approx(4 - row["kept_share"], abs=0.01)


def test_a_step_with_kernels_passes_over_the_matrices_only_as_often_as_it_must():
    """Passes over the centers [C, D] and over the logits [B, C], in bytes of a number."""
    row = count(2_000_000, 1024, 1.0, EIGHTY_GB)
    # Forward: the operand is made and kept (4 + 2) and multiplied (2). Backward: two products
    # (2 + 4), the update (4 + 4 x 4).
    of_centers = 6 + 2 + 6 + 20
    of_logits = 2 + 2 + 2  # written, and read by two products
    moved = 2_000_000 * (512 * of_centers + 1024 * of_logits) / 1e9
    assert row["gigabytes_moved"] == pytest.approx(moved, rel=0.01)


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["triton", "torch"])
@pytest.mark.parametrize(
    ("batch", "rate", "dtype", "rule", "mib"),
    [
        (4096, 1.0, torch.float32, SGDRows, 2048),
        (8192, 1.0, torch.bfloat16, AdamWRows, 1024),
        (1024, 1.0, torch.float32, SGDRows, 8192),
        (2048, 0.3, torch.float32, AdamWRows, 512),
    ],
)
def test_a_step_holds_no_more_than_its_plan(kind, batch, rate, dtype, rule, mib):
    """On the meta device, beside what is O(B D)."""
    head = PartialFC(
        ArcFace(),
        512,
        500_000,
        rate,
        row_optimizer=rule(state_dtype=torch.bfloat16 if dtype == torch.bfloat16 else None),
        batch_size_per_rank=batch,
        device="meta",
        dtype=dtype,
        half=torch.bfloat16,
        workspace_mib=mib,
        kernels=kind,
    )
    assert head.row_optimizer is not None
    state = head.row_optimizer.state(head.weight)
    x = torch.empty(batch, 512, device="meta", requires_grad=True)
    labels = torch.empty(batch, dtype=torch.int64, device="meta")
    with MemoryTracker([head.weight, *state.values(), x, labels]) as tracker:
        head(x, labels, 0.1).backward()
    plan = head.planned_blocks()
    assert len(plan.blocks()) > 1
    allowed = plan.total_bytes + 16 * batch * 512 * 4 + 64 * 500_000 * (rate < 1)
    assert 0.5 * plan.total_bytes < tracker.peak < allowed


# --- when they are not used ------------------------------------------------------------------


class OwnRule(SGDRows):
    """A row optimizer that the kernels do not know."""


@pytest.mark.parametrize(
    ("capability", "operand", "width", "rule", "why"),
    [
        ((7, 0), torch.bfloat16, 512, SGDRows(), "compute capability 8.0, and this GPU has 7.0"),
        ((9, 0), torch.float32, 512, SGDRows(), "the products are fp32, and those of Triton's"),
        ((9, 0), torch.float64, 512, SGDRows(), "the products are fp64"),
        ((9, 0), torch.bfloat16, 9000, SGDRows(), "embedding_size=9000"),
        ((9, 0), torch.bfloat16, 512, OwnRule(), "and not as OwnRule"),
        ((9, 0), torch.bfloat16, 512, SGDRows(), "Triton fails here: "),  # there is no GPU
    ],
)
def test_why_a_gpu_has_no_kernels_is_said(monkeypatch, capability, operand, width, rule, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels._launch_problem.cache_clear()
    kernels.settings_of.cache_clear()
    assert why in kernels.why_not("auto", torch.device("cuda:0"), operand, width, rule)
    kernels.settings_of.cache_clear()


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (None, "Triton cannot be imported (python -m pip install triton)"),
        ("3.1.0", "Triton 3.6 is needed, and 3.1.0 is installed"),
        ("unknown", "Triton 3.6 is needed, and unknown is installed"),
        ("", "Triton cannot be imported: AttributeError"),
        ("3.6.0rc1", ""),
        ("3.10.0+git", ""),
    ],
)
def test_a_triton_that_is_missing_too_old_or_broken_is_said(monkeypatch, module, why):
    found = None if module is None else types.ModuleType("triton")
    if found is not None and module:
        found.__version__ = module
    monkeypatch.setitem(sys.modules, "triton", found)
    kernels._triton_problem.cache_clear()
    try:
        said = kernels._triton_problem()
    finally:
        kernels._triton_problem.cache_clear()
    assert said.startswith(why)
    assert bool(said) == bool(why)


def test_the_interpreter_is_not_used_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device, rule = torch.device("cuda:0"), SGDRows()
    said = kernels.why_not("auto", device, torch.bfloat16, 512, rule)
    assert said == "TRITON_INTERPRET is set"


def kernels_of_modes() -> list[bool]:
    return [
        PartialFC(ArcFace(), 8, 10, row_optimizer=SGDRows(), kernels=mode).has_kernels
        for mode in ("auto", "triton", "torch")
    ]


def test_the_interpreter_is_used_where_it_is_asked_for(interpreter):
    assert interpreter(kernels_of_modes) == [False, True, False]


@pytest.mark.parametrize("value", ["1", "0", "off"])
def test_an_interpreter_that_comes_too_late_leaves_the_path_of_pytorch(monkeypatch, value):
    """Triton is imported already, without it."""
    importlib.import_module("triton")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    kernels._launch_problem.cache_clear()
    head = PartialFC(ArcFace(), 8, 10, row_optimizer=SGDRows(), kernels="triton")
    kernels._launch_problem.cache_clear()
    assert not head.has_kernels
    why = "Triton fails here: InterpreterError" if value == "1" else "need a CUDA device"
    assert why in head.describe_kernels()


@pytest.mark.parametrize("mode", ["auto", "triton", "torch"])
def test_a_cpu_takes_the_path_of_pytorch_and_says_so(mode):
    head = PartialFC(ArcFace(), 8, 10, row_optimizer=SGDRows(), half=torch.bfloat16, kernels=mode)
    assert not head.has_kernels
    why = "as kernels='torch' says" if mode == "torch" else "Triton's need a CUDA device"
    assert why in head.describe_kernels()
    head(torch.randn(2, 8, requires_grad=True), torch.tensor([1, 9]), 0.1).backward()


@pytest.mark.parametrize("kernel", ["normalize_rows", "softmax_numerators", "update_rows"])
def test_a_kernel_that_computes_something_else_is_found_before_work_starts(interpreter, kernel):
    assert interpreter(said_of_a_wrong_kernel, kernel).startswith("Triton fails here: Arithmetic")


def said_of_a_wrong_kernel(kernel: str) -> str:
    real = getattr(kernels, kernel)

    def wrong(*arguments: Any, **options: Any) -> Any:
        if kernel == "update_rows":
            return None
        first, second = real(*arguments, **options)
        return first * 1.05, second

    args = (torch.device("cpu"), SGDRows, torch.float32, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, kernel, wrong)
        return kernels._launch_problem.__wrapped__(*args)


def huge_center() -> tuple[float, bool]:
    head = make_head("triton", ArcFace(), SGDRows(), 20, 16)
    with torch.no_grad():
        head.weight[3] = 1e25
    before = head.weight.detach().clone()
    loss = head(torch.randn(4, 16, requires_grad=True), torch.arange(4), 0.1)
    loss.backward()
    return float(loss.detach()), torch.equal(before, head.weight.detach())


def test_a_center_whose_norm_overflows_makes_a_skipped_step(interpreter):
    loss, is_unchanged = interpreter(huge_center)
    assert math.isnan(loss)
    assert is_unchanged


@pytest.mark.parametrize("kind", ["triton", "torch"])
def test_centers_written_between_forward_and_backward_are_refused(interpreter, kind):
    said = interpreter(written_between, kind)
    assert said == "class centers were loaded or written between this forward and its backward"


def written_between(kind: str) -> str:
    head = make_head(kind, ArcFace(), SGDRows(), 20, 16)
    loss = head(torch.randn(4, 16, requires_grad=True), torch.arange(4), 0.1)
    head.load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError) as error:
        loss.backward()
    return str(error.value)


def test_an_unknown_kind_of_kernels_is_refused():
    with pytest.raises(ValueError, match="kernels='cuda': one of auto, triton, torch"):
        PartialFC(ArcFace(), 8, 10, row_optimizer=SGDRows(), kernels="cuda")


def test_settings_follow_the_capability(monkeypatch):
    for found, wanted in (
        ((8, 0), (8, 0)),
        ((8, 9), (8, 0)),
        ((9, 0), (9, 0)),
        ((10, 3), (10, 0)),
        ((12, 1), (10, 0)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=found: c)
        kernels.settings_of.cache_clear()
        assert kernels.settings_of(torch.device("cuda:0")) == kernels.SETTINGS[wanted]
    kernels.settings_of.cache_clear()
    assert kernels.settings_of(torch.device("meta")) == kernels.SETTINGS[9, 0]
    assert kernels.settings_of(torch.device("cpu")) == kernels.SMALL
