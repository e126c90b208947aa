"""The old name of arcshard.parallel.split; it works for one release."""

from utils.moved import moved

__all__ = ["Split", "fill_split", "split_of"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "arcshard.parallel.split")
