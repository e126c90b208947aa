"""How a command ends: its exit code, and one line on stderr where its input was wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from utils.errors import UserError

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
P = ParamSpec("P")


def cli_command(
    interrupted: str = "stopped", also: tuple[type[Exception], ...] = ()
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Makes a decorator for a function that returns the exit code of a command.

    The function then returns 2 after a line `error: ...` on stderr where it raised a UserError or
    an OSError, and 130 after Ctrl-C. Any other exception keeps its traceback.

    Args:
        interrupted: The line on stderr after Ctrl-C: what is left of the work.
        also: Further exceptions whose message is enough for the user.
    """
    told: tuple[type[Exception], ...] = (UserError, OSError, *also)

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except told as error:
                print(f"error: {error}", file=sys.stderr)
                return EXIT_BAD_INPUT
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return EXIT_INTERRUPTED

        return run

    return decorate
