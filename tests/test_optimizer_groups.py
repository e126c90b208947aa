"""Which parameters share a weight decay and a learning rate, and how they then move."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones import get_model, model_names
from configs.base import Config
from tests.conftest import Ranks
from tests.run_helpers import CHECKPOINTED_RUN, assert_same, copy_of_run, whole_run
from training.build import build
from training.optimizer import make_optimizer, parameter_groups
from utils.distributed import DistContext

ALONE = DistContext(0, 0, 1, torch.device("cpu"))
FINE_TUNING: dict[str, Any] = {"decay_norms_and_biases": False, "layer_decay": 0.5}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", model_names())
def test_every_parameter_has_one_place_in_the_order_of_depth(name: str) -> None:
    with torch.device("meta"):
        net = get_model(name)
    layers = net.layers_by_depth()
    for parameter, _ in net.named_parameters():
        places = [
            part
            for parts in layers
            for part in parts
            if parameter == part or parameter.startswith(f"{part}.")
        ]
        assert len(places) == 1, parameter
    assert net.STEM_KEY.startswith(layers[0])
    assert net.EMBEDDING_KEY.startswith(layers[-1])


def named_groups(name: str, decays: bool, layer_decay: float) -> dict[str, tuple[float, float]]:
    """(weight decay, share of the learning rate) by parameter."""
    with torch.device("meta"):
        net = get_model(name)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["lr_factor"])
        for group in parameter_groups(net, 0.1, decays, layer_decay)
        for parameter in group["params"]
    }


def test_weights_of_convolutions_and_linear_layers_decay_and_nothing_else() -> None:
    found = named_groups("vit_t", False, 1.0)
    decayed = {name for name, (decay, _) in found.items() if decay}
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{i}.{layer}.weight" for i in range(12) for layer in block}
    expected |= {"patch_embed.proj.weight", "feature.0.weight", "feature.2.weight"}
    assert decayed == expected
    assert {"pos_embed", "mask_token", "norm.weight", "feature.3.bias"} < found.keys() - decayed
    found = named_groups("r_nano", False, 1.0)
    for name, wanted in {
        "conv1.weight": 0.1,
        "prelu.weight": 0.0,
        "layer2.0.bn3.weight": 0.0,
        "layer2.0.downsample.0.weight": 0.1,
        "fc.weight": 0.1,
        "fc.bias": 0.0,
        "features.bias": 0.0,
    }.items():
        assert found[name] == (wanted, 1.0), name
    assert "features.weight" not in found  # not trained


def test_the_rate_falls_by_one_factor_per_layer_from_the_embedding_to_the_stem() -> None:
    found = named_groups("vit_t", True, 0.5)
    for name, power in {
        "feature.0.weight": 0,
        "norm.bias": 0,
        "mask_token": 0,
        "blocks.11.norm1.weight": 1,
        "blocks.0.mlp.fc1.bias": 12,
        "pos_embed": 13,
        "patch_embed.proj.bias": 13,
    }.items():
        assert found[name] == (0.1, 0.5**power), name
    found = named_groups("resnet_nano", True, 0.5)
    assert found["fc.bias"] == (0.1, 1.0)
    assert found["layer4.0.conv1.weight"] == (0.1, 0.5)
    assert found["bn1.weight"] == (0.1, 0.5**5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_defaults_make_one_group_of_all_in_their_order(optimizer: str) -> None:
    net = get_model("vit_t", embed_dim=16, depth=2, input_size=36)
    made = make_optimizer(net, optimizer, lr=0.3, momentum=0.9, weight_decay=0.1)
    (group,) = made.param_groups
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    assert len(group["params"]) == len(trained)
    assert all(a is b for a, b in zip(group["params"], trained, strict=True))
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.1)


def sgd(weight: Tensor, gradient: Tensor, kept: list[Tensor], lr: float, decay: float) -> Tensor:
    kept[0] = 0.9 * kept[0] + gradient + decay * weight
    return weight - lr * kept[0]


def adamw(weight: Tensor, gradient: Tensor, kept: list[Tensor], lr: float, decay: float) -> Tensor:
    kept[0] = 0.9 * kept[0] + 0.1 * gradient
    kept[1] = 0.999 * kept[1] + 0.001 * gradient**2
    kept[2] = kept[2] + 1
    mean, square = kept[0] / (1 - 0.9 ** kept[2]), kept[1] / (1 - 0.999 ** kept[2])
    return weight * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_the_formula_with_each_groups_decay_and_rate(
    tmp_path: Path, optimizer: str
) -> None:
    changes = {"precision": "fp64", "clip_grad_norm": 0.0, "weight_decay": 0.1}
    changes |= {"output": str(tmp_path), "optimizer": optimizer}
    settings = {**CHECKPOINTED_RUN, **FINE_TUNING, **changes}
    parts = build(Config(**settings), ALONE)
    parts.step.model.train()
    rules = {"sgd": sgd, "adamw": adamw}
    trained = {n: p for n, p in parts.backbone.named_parameters() if p.requires_grad}
    expected = {name: parameter.detach().clone() for name, parameter in trained.items()}
    kept = {n: [torch.zeros_like(p) for _ in range(3)] for n, p in trained.items()}
    stages = ("features", "fc", "bn2"), ("layer4",), ("layer3",), ("layer2",), ("layer1",)
    for batch, rate in zip(islice(iter(parts.loader), 3), (0.02, 0.0, 0.05), strict=True):
        parts.step([batch], rate)
        for name, parameter in trained.items():
            assert parameter.grad is not None
            power = next((i for i, part in enumerate(stages) if name.startswith(part)), 5)
            decays = parameter.dim() > 1  # IResNet has no other matrices
            expected[name] = rules[optimizer](
                expected[name], parameter.grad, kept[name], rate * 0.5**power, 0.1 * decays
            )
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


def test_groups_spread_over_ranks_give_the_same_run_and_go_on_from_its_middle(
    ranks: Ranks, tmp_path: Path
) -> None:
    changes = {**FINE_TUNING, "precision": "fp16", "optimizer": "adamw", "lr": 1e-3, "max_steps": 7}
    plain = ranks.run(2, whole_run, str(tmp_path / "plain"), changes)
    spread = ranks.run(2, whole_run, str(tmp_path / "spread"), {**changes, "zero_stage": 1})
    assert_same(spread, plain)
    resumed = copy_of_run(tmp_path / "spread", tmp_path / "resumed", 5)
    again = ranks.run(2, whole_run, str(resumed), {**changes, "resume": "auto"})
    assert_same(again, plain)
