"""The template of docs/custom_parallel_layer.md, read from the page, equals its twin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcshard.parallel import collect_state_dict, relocate_state_dict
from arcshard.parallel.split import local_part

PAGE = Path(__file__).resolve().parent.parent / "docs" / "custom_parallel_layer.md"


def template() -> str:
    """The code of the blocks that are marked as template."""
    blocks = re.findall(r"<!-- template: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    assert [name for name, _ in blocks] == ["layer", "loss"]
    return "\n".join(code for _, code in blocks)


class TwinPrototypes(nn.Module):
    """The layer for one rank, as one would write it."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, width))

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.weight).square().sum(2)


def twin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    wanted = nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    each = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return each.sum(1).mean()


def run_template(rank, world_size, code, state, x, labels) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    num_classes, width = state["weight"].shape
    layer = names["ParallelPrototypes"](width, num_classes)
    layer.load_state_dict(relocate_state_dict(layer, state))
    x = x.clone().requires_grad_(True)
    loss = names["ParallelSigmoidLoss"]()(layer(x), labels)
    loss.backward()
    whole = collect_state_dict(layer)
    dw = local_part(layer.weight.grad)
    return {"loss": loss.detach(), "dx": x.grad, "dw": dw, "whole": whole}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_classes", [11, 2])
def test_the_documented_layer_and_loss_equal_their_twin(ranks, num_classes, world_size):
    torch.manual_seed(0)
    twin, x = TwinPrototypes(3, num_classes), torch.randn(5, 3)
    labels = torch.tensor([0, 1, 1, num_classes - 1, 0])
    parts = ranks.run(world_size, run_template, template(), twin.state_dict(), x, labels)
    leaf = x.clone().requires_grad_(True)
    loss = twin_loss(twin(leaf), labels)
    loss.backward()
    for part in parts:
        torch.testing.assert_close(part["loss"], loss.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(part["dx"], leaf.grad, rtol=1e-6, atol=2e-6)
    joined = torch.cat([part["dw"] for part in parts])
    torch.testing.assert_close(joined, twin.weight.grad, rtol=1e-6, atol=2e-6)
    assert torch.equal(parts[0]["whole"]["weight"], twin.weight.detach())


def initial(rank, world_size, code) -> Tensor:
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(3)
    return local_part(names["ParallelPrototypes"](3, 600).weight.detach())


def test_the_documented_layer_starts_alike_on_any_number_of_ranks(ranks):
    (whole,) = ranks.run(1, initial, template())
    assert torch.equal(torch.cat(ranks.run(4, initial, template())), whole)
