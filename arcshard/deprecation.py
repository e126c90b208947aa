"""Old names of arguments that work for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a decorator that accepts old keywords of a function beside the present ones.

    Args:
        names: New keywords by old ones.

    Returns:
        A decorator. The decorated function issues a DeprecationWarning for an old keyword, and
        raises a TypeError if the old and the new one are given together.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*arguments: P.args, **keywords: P.kwargs) -> R:
            for old in names.keys() & keywords.keys():
                new = names[old]
                if new in keywords:
                    raise TypeError(f"{old} and {new} are one argument: leave {old} out")
                warnings.warn(
                    f"the argument {old} is called {new} now; the old name goes away with 0.2",
                    DeprecationWarning,
                    stacklevel=2,
                )
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return call

    return decorate
