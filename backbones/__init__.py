"""The backbones: `get_model(name, ...)` over a registry with one family of networks per file."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from backbones import iresnet, mobilefacenet, resnet, vit
from backbones.base import Backbone
from utils.errors import UserError

__all__ = ["Backbone", "backbone_class", "get_model", "model_names"]

# name -> (class, arguments of this variant). A new family adds its file and a line here.
_REGISTRY: Mapping[str, tuple[type[Backbone], Mapping[str, Any]]] = {
    **{name: (iresnet.IResNet, variant) for name, variant in iresnet.VARIANTS.items()},
    **{name: (mobilefacenet.MobileFaceNet, v) for name, v in mobilefacenet.VARIANTS.items()},
    **{name: (resnet.ResNet, variant) for name, variant in resnet.VARIANTS.items()},
    **{name: (vit.VisionTransformer, variant) for name, variant in vit.VARIANTS.items()},
}

_SMALLEST_INPUT = 16  # pixels; one pixel is left after four halvings


def model_names() -> list[str]:
    """Return every name that `get_model` knows, family by family."""
    return list(_REGISTRY)


def backbone_class(name: str) -> type[Backbone]:
    """Return the class behind a network's name.

    Raises:
        UserError: No network has this name.
    """
    return _lookup(name)[0]


def get_model(
    name: str,
    *,
    num_features: int = 512,
    dropout: float = 0.0,
    input_size: int = 112,
    in_channels: int = 3,
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> Backbone:
    """Make a freshly initialized backbone, fp32, in training mode, on torch's default device.

    Args:
        name: One of `model_names()`.
        num_features: Size of the embedding.
        dropout: Probability before the fully connected layer. It must be 0 except for IResNet.
        input_size: Height and width of the images in pixels.
        in_channels: Channels of the images.
        gradient_checkpointing: Whether training recomputes activations in backward, block by block.
        kwargs: Options of the family, such as `zero_init_residual` (IResNet) or `drop_path_rate`
            and `mask_ratio` (ViT).

    Returns:
        The backbone, built for the variant that the name stands for.

    Raises:
        UserError: The name, a size or an option is not allowed. The message says what is allowed.
    """
    cls, variant = _lookup(name)
    _check_options(name, cls, kwargs)
    for option, value, least in (
        ("num_features", num_features, 1),
        ("input_size", input_size, _SMALLEST_INPUT),
        ("in_channels", in_channels, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{option}={value!r} must be an integer of at least {least}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} must be at least 0 and below 1")
    build: Callable[..., Backbone] = cls
    return build(
        **{**variant, **kwargs},
        num_features=num_features,
        dropout=dropout,
        input_size=input_size,
        in_channels=in_channels,
        gradient_checkpointing=gradient_checkpointing,
    )


def _lookup(name: str) -> tuple[type[Backbone], Mapping[str, Any]]:
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(str(name), _REGISTRY, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"there is no backbone {name!r}.{hint} The backbones are: {', '.join(_REGISTRY)}"
    )


def _check_options(name: str, cls: type[Backbone], kwargs: Mapping[str, Any]) -> None:
    unknown = sorted(set(kwargs) - set(cls.OPTIONS))
    if not unknown:
        return
    allowed = ", ".join(cls.OPTIONS) or "none"
    hint = (
        " Precision is the trainer's choice (autocast), not the backbone's: drop fp16."
        if "fp16" in unknown
        else ""
    )
    raise UserError(
        f"backbone {name!r} has no option {', '.join(unknown)}. Beside the arguments of get_model "
        f"it takes: {allowed}.{hint}"
    )
