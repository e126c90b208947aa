"""The old name of arcshard.shard; it works for one release."""

from utils.moved import moved

__all__ = ["class_range"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "arcshard.shard")
