"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

_LISTED = 20  # problems named in an error; the rest is counted


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is the old one, the new one, or absent."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600; a data set is meant to be shared
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def list_some(problems: Sequence[str], limit: int = _LISTED) -> str:
    """The first problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*problems[:limit], *more])
