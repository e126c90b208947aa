"""The old name of arcshard.shard; it works for one release."""

from utils.moved import moved

__getattr__ = moved(__name__, "arcshard.shard")
