"""Fixed cases of the fuzz harness (tests/head_fuzz.py), and faults that it has to notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from arcshard import losses
from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.partial_fc import PartialFC
from tests.head_fuzz import Case, check_case, draw_case, run_case


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_cases_equal_the_dense_truth(ranks, world_size):
    for seed in range(100 * world_size, 100 * world_size + (14 if world_size < 3 else 11)):
        case = draw_case(seed, ranks=(world_size,))
        check_case(case, ranks.run(world_size, run_case, case))


FAULTS: dict[str, tuple[Callable[[Case], bool], Callable[..., None]]] = {}
"""Name -> (whether a case can show the fault, function that brings it in by a monkeypatch)."""


def fault(shows: Callable[[Case], bool]) -> Callable[..., Any]:
    def register(bring: Callable[..., None]) -> Callable[..., None]:
        FAULTS[bring.__name__] = (shows, bring)
        return bring

    return register


def scale_result(patch: pytest.MonkeyPatch, owner: Any, name: str, change: Callable) -> None:
    """Passes what a method returns through `change`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: change(original(*a, **k)))


def steeper(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """A value and its slope, which is wrong by a millionth."""
    return pair[0], pair[1] * (1 + 1e-6)


def moves(case: Case) -> bool:
    """The first step updates the centers by more than rounding."""
    step = case.steps[0]
    return not step.bad and step.parts[0].size >= 1 and step.learning_rate > 0.1


def deferred(case: Case) -> bool:
    return moves(case) and not (case.steps[0].in_backward and case.update == "fused")


@fault(lambda c: c.loss == "CombinedMargin" and c.scale == 8 and c.options["gradient"] == "exact")
def slope_of_the_combined_margin(patch):
    scale_result(patch, losses.CombinedMargin, "target", steeper)


@fault(lambda c: c.loss == "MagFace" and c.options["l_a"] == 0.5 and c.scale == 8)
def slope_of_magface_to_the_norm(patch):
    scale_result(patch, losses.MagFace, "norm_slope", lambda slope: slope * (1 + 1e-6))


@fault(lambda c: c.loss == "MagFace" and c.options["l_a"] == 0.5 and c.options["lambda_g"] > 0)
def slope_of_the_regularizer(patch):
    scale_result(patch, losses.MagFace, "penalty", steeper)


@fault(lambda c: c.loss == "CurricularFace" and c.scale == 8 and c.options["alpha"] == 0.7)
def running_mean_of_target_cosines(patch):
    def change(pair):
        return pair[0], {"t": pair[1]["t"] * (1 + 1e-6)}

    scale_result(patch, losses.CurricularFace, "begin", change)


@fault(lambda c: c.loss == "CurricularFace" and c.scale == 8 and c.num_classes > 20)
def slope_of_hard_classes(patch):
    def change(pair):
        return pair[0], torch.where(pair[1] == 1, 1.0, pair[1] * (1 + 1e-6))

    scale_result(patch, losses.CurricularFace, "others", change)


@fault(lambda c: c.loss == "AdaFace" and c.scale == 8 and c.num_classes > 5)
def standardized_norm(patch):
    def change(pair):
        return {"quality": pair[0]["quality"] * (1 + 1e-6)}, pair[1]

    scale_result(patch, losses.AdaFace, "begin", change)


@fault(lambda c: c.loss == "ElasticFace" and c.options["std"] == 0.3 and c.scale == 8)
def draws_of_another_seed(patch):
    def begin(self, facts, state):
        return original(self, facts._replace(draw=facts.draw ^ 1), state)

    original = losses.ElasticFace.begin
    patch.setattr(losses.ElasticFace, "begin", begin)


@fault(
    lambda c: (
        c.options.get("interclass_filtering_threshold", 0) == 0.1
        and c.options["interclass_filtering_mode"] == "legacy"
        and c.num_classes > 20
        and c.scale == 8
    )
)
def gradient_of_filtered_classes(patch):
    def change(pair):
        return pair[0], pair[1].clamp(min=1e-6)

    scale_result(patch, losses.CombinedMargin, "others", change)


def with_step(patch: pytest.MonkeyPatch, step: Callable[..., None]) -> None:
    original = PartialFC.step
    patch.setattr(PartialFC, "step", lambda head, *a: step(head, original, *a))


@fault(lambda c: deferred(c) and c.rule == "SGDRows")
def learning_rate_of_sgd(patch):
    with_step(patch, lambda head, do, rate, *a: do(head, rate * (1 + 1e-6), *a))


@fault(lambda c: deferred(c) and c.rule == "AdamWRows")
def learning_rate_of_adamw(patch):
    with_step(patch, lambda head, do, rate, *a: do(head, rate * (1 + 1e-6), *a))


@fault(lambda c: deferred(c) and c.steps[0].divide and c.steps[0].factor != 1)
def scale_of_the_loss(patch):
    with_step(
        patch,
        lambda head, do, rate, bad, scale: do(
            head, rate, bad, None if scale is None else scale * (1 + 1e-6)
        ),
    )


@fault(lambda c: c.steps[0].bad is True)
def veto_without_effect(patch):
    with_step(patch, lambda head, do, rate, bad, scale: do(head, rate, None, scale))


def after_step(patch: pytest.MonkeyPatch, change: Callable[[PartialFC], None]) -> None:
    def step(head, do, *arguments):
        do(head, *arguments)
        with torch.no_grad():
            change(head)

    with_step(patch, step)


@fault(lambda c: c.sample_rate == 0 and c.num_classes > 40)
def a_row_outside_the_sample_moves_by_one_bit(patch):
    after_step(patch, lambda head: head.weight.copy_(torch.nextafter(head.weight, head.weight + 1)))


@fault(lambda c: c.sample_rate == 0 and c.num_classes > 40 and c.rule == "AdamWRows")
def state_of_a_row_outside_the_sample_moves(patch):
    def change(head):
        head.row_optimizer.state(head.weight)["exp_avg"].add_(1e-300)

    after_step(patch, change)


@fault(lambda c: moves(c) and c.rule == "AdamWRows")
def count_of_steps_per_row(patch):
    after_step(patch, lambda head: head.row_optimizer.state(head.weight)["step"].add_(1))


@fault(lambda c: moves(c) and c.rule_options.get("momentum", 0) > 0)
def momentum(patch):
    after_step(
        patch,
        lambda head: head.row_optimizer.state(head.weight)["momentum_buffer"].mul_(1 + 1e-6),
    )


@fault(lambda c: moves(c) and c.rule_options["weight_decay"] > 0 and c.weight_size == 1)
def weight_decay(patch):
    for rule in (SGDRows, AdamWRows):
        original = rule.__init__

        def init(self, *arguments, _original=original, **options):
            _original(self, *arguments, **options)
            self.weight_decay *= 1 + 1e-4

        patch.setattr(rule, "__init__", init)


def with_forward(patch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> None:
    original = PartialFC.forward
    patch.setattr(PartialFC, "forward", lambda head, *a: forward(head, original, *a))


@fault(lambda c: c.scale == 64)
def loss(patch):
    with_forward(patch, lambda head, do, *a: do(head, *a) * (1 + 1e-7))


@fault(lambda c: c.scale == 64 and moves(c) and not c.steps[0].frozen)
def gradient_of_the_embeddings(patch):
    def forward(head, do, x, *arguments):
        if x.requires_grad:
            x = x * 1.0
            x.register_hook(lambda gradient: gradient * (1 + 1e-6))
        return do(head, x, *arguments)

    with_forward(patch, forward)


@fault(lambda c: c.centers_per_class > 1 and c.num_classes > 5 and moves(c))
def centers_of_a_class_in_another_order(patch):
    def forward(head, do, x, labels, *arguments):
        with torch.no_grad():
            head.weight.copy_(head.weight.roll(1, 0))
        return do(head, x, labels, *arguments)

    with_forward(patch, forward)


def cases_for(shows: Callable[[Case], bool], orders: tuple[str, ...] = ()) -> list[Case]:
    """The first three cases on one rank that can show a fault."""
    drawn = (draw_case(seed, orders, (1,)) for seed in range(10_000))
    fitting = (case for case in drawn if shows(case))
    return [next(fitting) for _ in range(3)]


def number_of_failures(cases: list[Case]) -> int:
    failures = 0
    for case in cases:
        try:
            check_case(case, [run_case(0, 1, case)])
        except AssertionError:
            failures += 1
    return failures


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAULTS)
def test_the_harness_notices_a_fault(name, monkeypatch):
    shows, bring = FAULTS[name]
    cases = cases_for(shows)
    assert number_of_failures(cases) == 0
    bring(monkeypatch)
    assert number_of_failures(cases) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "order", ["evaluation before", "evaluation between", "evaluation after", "no_grad between"]
)
def test_the_harness_notices_a_trace_of_a_forward_that_may_leave_none(order, monkeypatch):
    """Here the forward moves a running value, or is itself wrong."""
    cases = cases_for(
        lambda c: c.loss == "AdaFace" and c.sample_rate == 1 and order in c.orders, (order,)
    )
    for moved, factor in ((1e-6, 1.0), (0.0, 1 + 1e-6)):

        def forward(head, do, *arguments, _moved=moved, _factor=factor):
            loss = do(head, *arguments)
            if head.training and torch.is_grad_enabled():
                return loss
            with torch.no_grad():
                head.margin_norm_mean += _moved
            return loss * _factor

        with monkeypatch.context() as patch:
            with_forward(patch, forward)
            assert number_of_failures(cases) > 0
