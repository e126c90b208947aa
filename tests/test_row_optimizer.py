"""Row optimizers: equal to one torch.optim per row, and a veto that is exact to the bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows

ROWS, WIDTH = 12, 8
CASES: dict[str, tuple[RowOptimizer, Any, dict[str, Any]]] = {
    "sgd": (SGDRows(0.9, 1e-2), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "sgd, no momentum": (SGDRows(0.0, 1e-2), torch.optim.SGD, {"weight_decay": 1e-2}),
    "adamw": (AdamWRows(weight_decay=1e-2), torch.optim.AdamW, {"weight_decay": 1e-2}),
    "adamw, other betas": (
        AdamWRows((0.0, 0.5), 1e-3, 0.0),
        torch.optim.AdamW,
        {"betas": (0.0, 0.5), "eps": 1e-3, "weight_decay": 0.0},
    ),
}


def bits(parts: list[Tensor]) -> list[Tensor]:
    """Return the bits of tensors, which tell -0.0 from 0.0 and one NaN from another."""
    return [part.clone().view(torch.uint8) for part in parts]


def rule_of(name: str) -> RowOptimizer:
    rule = CASES[name][0]
    rule._state = {}
    return rule


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_50_steps_equal_one_torch_optim_per_row(name, sampled, on_device):
    """`on_device` takes the path of an accelerator, which may not read `bad`."""
    rule, (_, kind, options) = rule_of(name), CASES[name]
    torch.manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    rows = [torch.nn.Parameter(row.clone()) for row in weight]
    optimizers = [kind([row], 0.1, **options) for row in rows]
    state = rule.state(weight)
    for step in range(50):
        taken = torch.randperm(ROWS)[:5].sort().values if sampled else torch.arange(2, ROWS)
        gradient = torch.randn(len(taken), WIDTH, dtype=torch.float64) * 10.0 ** (step % 5 - 2)
        lr = 0.1 / (1 + step % 7)
        for place, row in enumerate(taken.tolist()):
            rows[row].grad = gradient[place].clone()
            optimizers[row].param_groups[0]["lr"] = lr
            optimizers[row].step()
        if on_device:
            work = {key: part[taken] for key, part in {"weight": weight, **state}.items()}
            of_rows = {key: part for key, part in work.items() if key != "weight"}
            rule.move(work["weight"], gradient, of_rows, lr, torch.tensor(False))
            for key, part in {"weight": weight, **state}.items():
                part[taken] = work[key]
        else:
            rule.update_rows(weight, gradient, taken if sampled else slice(2, ROWS), lr)
        expected = torch.stack([row.detach() for row in rows])
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [0.0, 0.1])
@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_veto_decided_on_the_device_changes_no_bit(name, steps_before, lr, dtype):
    """What an accelerator runs: `move` may not look at `bad`."""
    rule = rule_of(name)
    torch.manual_seed(0)
    weight = torch.randn(ROWS, WIDTH, dtype=dtype)
    state = rule.create_state(weight)
    for _ in range(steps_before):
        rule.move(weight, torch.randn_like(weight), state, 0.1, None)
    parts = [weight, *state.values()]
    for part in parts:
        if part.dim() > 1:
            part[0, :2] = torch.tensor([-0.0, 0.0])
    before = bits(parts)
    for value in (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, torch.finfo(dtype).max):
        gradient = torch.randn_like(weight)
        gradient[:4] = value
        gradient[5, 3] = value
        # The rows of a block within a shard, and with them their state.
        inner = slice(0, 6)
        of_rows = {key: part[inner] for key, part in state.items()}
        rule.move(weight[inner], gradient[inner], of_rows, lr, torch.tensor(True))
        for ours, kept in zip(bits(parts), before, strict=True):
            assert torch.equal(ours, kept)


@pytest.mark.parametrize("name", CASES)
def test_without_a_veto_a_step_decided_on_the_device_is_the_plain_step(name):
    rule = rule_of(name)
    torch.manual_seed(0)
    weight, gradient = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    results = []
    for bad in (torch.tensor(False), None):
        work, state = weight.clone(), rule.create_state(weight)
        rule.move(work, gradient.clone(), state, 0.1, bad)
        results.append([work, *state.values()])
    untouched = [weight, *rule.create_state(weight).values()]
    for free, plain, before in zip(*results, untouched, strict=True):
        torch.testing.assert_close(free, plain, rtol=1e-6, atol=1e-8)
        assert not torch.equal(free, before)


def test_a_bf16_shard_under_a_veto_keeps_every_bit_and_else_is_rounded_from_fp32():
    torch.manual_seed(0)
    weight = torch.randn(ROWS, WIDTH).bfloat16()
    rule = AdamWRows(state_dtype=torch.bfloat16)
    parts = [weight, *rule.state(weight).values()]
    before = bits(parts)
    rule.update_rows(weight, torch.full((ROWS, WIDTH), math.nan), None, 0.1, torch.tensor(True))
    for ours, kept in zip(bits(parts), before, strict=True):
        assert torch.equal(ours, kept)
    rule.update_rows(weight, torch.ones(ROWS, WIDTH), None, 0.1, torch.tensor(False))
    assert rule.sr_counter == 0  # until the step ends
    assert (rule.state(weight)["step"] == 1).all()


@pytest.mark.parametrize("name", CASES)
def test_the_rounding_follows_seed_step_row_and_column_and_not_the_blocks(name):
    torch.manual_seed(0)
    weight, gradient = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(ROWS, WIDTH)

    def updated(parts: list[slice], seed: int = 0, steps: int = 0, first_row: int = 0) -> Tensor:
        rule, rows = copy.deepcopy(rule_of(name)), weight.clone()
        rule.seed, rule.first_row = seed, first_row
        for _ in range(steps):
            rule.end_step()
        for part in parts:
            rule.update_rows(rows, gradient[part].clone(), part, 0.1)
        return rows

    whole = updated([slice(0, ROWS)])
    assert torch.equal(whole, updated([slice(0, 2), slice(2, ROWS)]))
    for options in ({"seed": 1}, {"steps": 1}, {"first_row": 1}):
        assert not torch.equal(whole, updated([slice(0, ROWS)], **options))
