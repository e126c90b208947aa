"""Old module names that work for one release, with a warning that names the new ones."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

GONE_IN = "0.2"


def moved(old: str, new: str) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a module whose content is in another module now.

    Args:
        old: The name of the module that is left for those who import it.
        new: The module that holds its content.

    Returns:
        A function that looks a name up in `new` and issues a DeprecationWarning.
    """

    def look_up(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(new), name)
        warnings.warn(
            f"{old} is {new} now: write `from {new} import {name}`. "
            f"The old name goes away with version {GONE_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return look_up
