"""The old name of arcshard.parallel; it works for one release."""

from arcshard.parallel import __all__ as __all__  # for star imports
from utils.moved import moved

__getattr__ = moved(__name__, "arcshard.parallel")
