"""Rows of a benchmark that are quick, fail or hang; a child process imports no torch for them."""

from __future__ import annotations

import os
import time
from typing import Any


def process() -> dict[str, Any]:
    """Which process measured the row."""
    return {"pid": os.getpid()}


def broken() -> dict[str, Any]:
    """A row that fails."""
    raise RuntimeError("planted")


def hanging() -> dict[str, Any]:
    """A row that takes a minute."""
    time.sleep(60)
    return {}
