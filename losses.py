"""Losses by name: what each does to the cosine of an embedding with its class center.

The functions and classes are in arcshard/losses.py, the formulas in arcshard/margins/.
"""

from arcshard.losses import *  # noqa: F403
from arcshard.losses import __all__ as __all__
