"""The old name of eval.model; it works for one release."""

from utils.moved import moved

__all__ = ["Embedder", "open_model"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "eval.model")
