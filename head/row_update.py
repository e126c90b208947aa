"""The old name of arcshard.head.row_optimizer; it works for one release."""

from utils.moved import moved

NEW_NAMES = {name: name for name in ("SGDRows", "AdamWRows")} | {"RowUpdate": "RowOptimizer"}

__all__ = ["AdamWRows", "RowUpdate", "SGDRows"]  # noqa: F822 - looked up below
__getattr__ = moved(__name__, "arcshard.head.row_optimizer", NEW_NAMES)
