"""The old name of eval.model; it works for one release."""

from utils.moved import moved

__getattr__ = moved(__name__, "eval.model")
