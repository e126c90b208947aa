"""Margins follow their formulas: value, derivative, and what happens at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from arcshard.losses import ArcFace, CombinedMargin, CosFace, SphereFace
from tests.reference import dense_target

ALL = [
    ArcFace(0.5),
    CosFace(0.4),
    SphereFace(1.7),
    SphereFace(4.0),
    CombinedMargin(0.9, 0.4, 0.15),
    CombinedMargin(1.0, 0.3, 0.2),
    CombinedMargin(3.0, 1.5, 0.1),
]


@pytest.mark.parametrize("margin", ALL, ids=lambda m: m.describe())
def test_value_and_derivative_equal_autograd_on_the_formula(margin):
    cosine = torch.linspace(-0.999, 0.999, 401, dtype=torch.float64, requires_grad=True)
    expected = dense_target(margin, cosine)
    (slope,) = torch.autograd.grad(expected.sum(), cosine)
    phi, derivative = margin.target(cosine)
    torch.testing.assert_close(phi, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("margin", ALL, ids=lambda m: m.describe())
def test_phi_is_monotone_and_never_above_the_cosine_less_m3(margin):
    cosine = torch.linspace(-1, 1, 20001, dtype=torch.float64)
    phi, _ = margin.target(cosine)
    assert bool((phi.diff() > -1e-12).all())
    if margin.m1 >= 1:
        assert bool((phi <= cosine - margin.m3 + 1e-12).all())


def test_phi_is_the_published_one_up_to_pi():
    cosine = torch.linspace(math.cos(math.pi - 0.5), 1, 1001, dtype=torch.float64)
    phi, _ = ArcFace(0.5).target(cosine)
    torch.testing.assert_close(phi, torch.cos(torch.acos(cosine) + 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("margin", ALL, ids=lambda m: m.describe())
def test_edges_are_finite(margin, dtype):
    one = torch.ones((), dtype=dtype)
    below = torch.nextafter(one.float(), torch.zeros(())).to(dtype)
    edges = torch.stack([one, -one, below, -below, one * 1.0001, -one * 1.0001])
    for gradient in ("exact", "straight_through"):
        changed = CombinedMargin(margin.m1, margin.m2, margin.m3, gradient=gradient)
        phi, derivative = changed.target(edges)
        assert bool(torch.isfinite(phi).all())
        assert bool(torch.isfinite(derivative).all())


def test_straight_through_passes_the_gradient_of_the_cosine():
    _, derivative = ArcFace(0.5, gradient="straight_through").target(torch.linspace(-1, 1, 11))
    assert bool((derivative == 1).all())


def test_a_removed_class_leaves_the_softmax_and_a_legacy_one_stays_as_zero():
    cosines = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    target = torch.tensor([0, -1])
    options = {"interclass_filtering_threshold": 0.4}
    removed = CosFace(0.0, 10.0, **options).logits(cosines, target)
    legacy = CosFace(0.0, 10.0, interclass_filtering_mode="legacy", **options).logits(
        cosines, target
    )
    expected = torch.tensor([[9.0, -math.inf, 1.0], [-math.inf, -math.inf, 1.0]])
    torch.testing.assert_close(removed, expected)
    torch.testing.assert_close(legacy, torch.tensor([[9.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"m1": 0.0},
        {"m1": -1.0},
        {"m1": math.inf},
        {"m2": -0.1},
        {"m2": 4.0},
        {"m3": -0.1},
        {"m3": 2.5},
        {"scale": 0.0},
        {"scale": math.nan},
        {"gradient": "none"},
        {"interclass_filtering_threshold": 1.5},
        {"interclass_filtering_mode": "drop"},
    ],
)
def test_a_margin_outside_its_domain_is_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"^{next(iter(arguments))}="):
        CombinedMargin(**arguments)
