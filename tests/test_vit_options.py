"""Stochastic depth and masking are the config's, in training; a trained model does not ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from backbones import model_names
from backbones.vit import DropPath, VisionTransformer
from backbones.weights import load_model
from configs.base import Config
from tests.run_helpers import CHECKPOINTED_RUN, copy_of_run
from train_v2 import run_on
from training.build import TrainComponents
from training.build_backbone import make_backbone
from training.checkpoint.checkpointer import CheckpointError
from utils.distributed import DistContext
from utils.errors import UserError

VIT = {
    **CHECKPOINTED_RUN,
    "network": "vit_t_dp005_mask0",
    "max_steps": 2,
    "lr": 1e-3,
    "checkpoint_every": 0,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path, **changes: Any) -> TrainComponents:
    folder.mkdir(exist_ok=True)
    cfg = Config(**{**VIT, "output": str(folder), **changes})
    assert not cfg.problems()
    return run_on(cfg, DistContext(0, 0, 1, torch.device("cpu")), folder)


def test_the_config_decides_and_none_leaves_what_the_name_says() -> None:
    for depth, mask in ((0.3, 0.4), (0.0, 0.0), (None, None)):
        net = make_backbone(Config(**{**VIT, "drop_path_rate": depth, "mask_ratio": mask}))
        assert isinstance(net, VisionTransformer)
        rates = [module.rate for module in net.modules() if isinstance(module, DropPath)]
        assert rates[-1] == pytest.approx(0.05 if depth is None else depth)
        assert net.mask_ratio == (0.0 if mask is None else mask)


@pytest.mark.parametrize("key", ["drop_path_rate", "mask_ratio"])
def test_networks_without_the_option_are_refused_and_those_with_it_named(key: str) -> None:
    able = ", ".join(name for name in model_names() if name.startswith("vit"))
    with pytest.raises(UserError, match=rf"{key}=0.2: network='r_nano' has no such.*{able}$"):
        make_backbone(Config(**{**CHECKPOINTED_RUN, key: 0.2}))
    with pytest.raises(ValidationError, match=f"{key}.*\n.*less than 1"):
        Config(**{**VIT, key: 1.0})
    with pytest.raises(UserError, match=r"mask_ratio=0.95 leaves none of 9 patches"):
        make_backbone(Config(**{**VIT, "mask_ratio": 0.95}))


def test_a_model_trained_with_masking_loads_by_its_name_alone_and_a_run_keeps_to_it(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    parts = run(out, mask_ratio=0.4, drop_path_rate=0.2)
    token = dict(parts.backbone.named_parameters())["mask_token"]
    assert parts.step.optimizer.state[token]["momentum_buffer"].any()
    images = next(iter(parts.loader)).images
    model, metadata = load_model(out)
    assert metadata.network == VIT["network"]
    alone = model((images.float() - 127.5) / 127.5).detach()
    torch.testing.assert_close(alone, parts.embedder(images))
    resumed = copy_of_run(out, tmp_path / "resumed", 2)
    with pytest.raises(CheckpointError, match=r"mask_ratio was 0.4, is None"):
        run(resumed, drop_path_rate=0.2, resume="auto")
    run(resumed, drop_path_rate=0.0, mask_ratio=0.4, resume="auto", max_steps=3)
