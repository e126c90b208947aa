"""The old name of arcshard.head.row_optimizer; it works for one release."""

from utils.moved import moved

__getattr__ = moved(__name__, "arcshard.head.row_optimizer")
