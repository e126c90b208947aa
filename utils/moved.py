"""Old names of modules and functions, which still work for one release with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

GONE_IN = "0.2"


def moved(old: str, new: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a module whose content is in another module now.

    Args:
        old: Name of the module that is left for those who import it.
        new: Name of the module that holds its content.
        renamed: New names by old ones, where names changed too. With `None` every name of `new`
            is found under `old`; otherwise only these.

    Returns:
        A function that looks a name up in `new` and issues a DeprecationWarning.
    """

    def look_up(name: str) -> Any:
        present = name if renamed is None else renamed.get(name)
        if name.startswith("__") or present is None:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(new), present)
        warnings.warn(
            f"{old}.{name} is now in {new}: write `from {new} import {present}`. "
            f"The old name goes away with version {GONE_IN}",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return look_up
