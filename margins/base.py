"""The old name of arcshard.margins.base; it works for one release."""

from utils.moved import moved

__all__ = ["BatchFacts", "Margin"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "arcshard.margins.base")
