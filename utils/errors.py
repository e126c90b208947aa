"""The error of all wrong input."""

from __future__ import annotations


class UserError(ValueError):
    """What was given cannot be used. The message says what came, what is allowed, what to do.

    A command ends with this message in one line instead of a traceback (utils/cli.py). A class of
    its own derives from it only where a caller tells it from others.
    """
