"""Build the backbone that a config names."""

from __future__ import annotations

import logging
from typing import Any

from backbones import backbone_class, get_model, model_names
from backbones.base import Backbone
from backbones.weights import load_matching
from configs.base import Config
from training.setup import is_classification
from utils.errors import UserError

logger = logging.getLogger("train")


def make_backbone(cfg: Config) -> Backbone:
    """Build the network that the config names, and load `init_backbone` into it.

    Raises:
        UserError: The network cannot be built with these options, or not be trained for this task.
        WeightsError: `init_backbone` cannot be used.
        FileNotFoundError: There is no file or run of that name.
    """
    options = _options_of_the_network(cfg)
    if is_classification(cfg):
        if backbone_class(cfg.network).CLASSIFIER is None:
            able = [n for n in model_names() if backbone_class(n).CLASSIFIER is not None]
            raise UserError(
                f'network={cfg.network!r} ends in an embedding; task="classification" trains '
                f"networks that end in a classifier: {', '.join(able)}"
            )
        options["with_fc"] = False  # the head is the fc
    backbone = get_model(
        cfg.network,
        num_features=cfg.embedding_size,
        dropout=cfg.dropout,
        input_size=cfg.input_size,
        gradient_checkpointing=cfg.gradient_checkpointing,
        **options,
    )
    if cfg.init_backbone is not None:
        report = load_matching(backbone, cfg.init_backbone)
        logger.info("init_backbone %s: %s", cfg.init_backbone, report)
    return backbone


def _options_of_the_network(cfg: Config) -> dict[str, Any]:
    """Return the config keys that are options of some networks only, where they are set."""
    options: dict[str, Any] = {}
    for key in ("drop_path_rate", "mask_ratio"):
        value = getattr(cfg, key)
        if value is None:
            continue
        if key not in backbone_class(cfg.network).OPTIONS:
            able = [name for name in model_names() if key in backbone_class(name).OPTIONS]
            raise UserError(
                f"{key}={value!r}: network={cfg.network!r} has no such option; leave it at None, "
                f"or choose one of {', '.join(able)}"
            )
        options[key] = value
    return options
